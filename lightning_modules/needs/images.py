"""Stages that train a Kontext transformer on pictures: flow matching, reinforcement, distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_modules.folders import planned_checkpoint
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute, Precision
from lightning_modules.networks.flops import passes_flops
from lightning_modules.networks.footprint import (
    Geometry,
    Load,
    Needs,
    Part,
    Workload,
    outline,
    recomputed_share,
    saved_bytes,
)
from lightning_modules.networks.loading import read_json, stored_shapes
from lightning_modules.networks.published import (
    SD35_CLIP_TOKENS,
    SD35_FACTOR,
    SD35_MEDIUM,
    frozen_parameters,
    transformer_config,
)
from lightning_modules.planning import Run


class ImageStage(Protocol):
    """Settings of a stage that trains a transformer alone."""

    pretrained: str
    lora: Lora | None
    compute: Compute
    max_sequence_length: int | None

    def workload(self) -> Workload:
        """What a sample costs."""


@dataclass(frozen=True)
class Pictures:
    """What a checkpoint folder says of pictures, and how a run serves them.

    Attributes:
        folder: of the checkpoint, which need not be here.
        run: the config's numbers.
    """

    folder: Path
    run: Run

    @property
    def config(self) -> Mapping[str, Any]:
        """The transformer's; SD3.5-Medium's where the folder is not here."""
        return transformer_config(self.folder) or SD35_MEDIUM

    @property
    def assumed(self) -> tuple[str, ...]:
        """What is said where the folder is not here."""
        return () if self.folder.is_dir() else (f"{self.folder} is not here: SD3.5-Medium's sizes are assumed",)

    @property
    def factor(self) -> int:
        """Pixels of a side that are one of a latent's."""
        if not (self.folder / "vae").is_dir():
            return SD35_FACTOR
        return 2 ** (len(read_json(self.folder / "vae" / "config.json")["block_out_channels"]) - 1)

    def text_tokens(self, longest: int | None) -> int:
        """Length of the text sequence: a Metaquery model's queries, or CLIP's tokens and T5's, which may be limited."""
        if (self.folder / "conditioner").is_dir():
            return int(read_json(self.folder / "conditioner" / "config.json")["num_queries"])
        clip, t5 = SD35_CLIP_TOKENS, 256
        if (self.folder / "tokenizer").is_dir():
            clip = int(read_json(self.folder / "tokenizer" / "tokenizer_config.json")["model_max_length"])
        if (self.folder / "tokenizer_3").is_dir():
            t5 = min(t5, int(read_json(self.folder / "tokenizer_3" / "tokenizer_config.json")["model_max_length"]))
        return clip + (longest or t5)

    def samples(self, text: int) -> dict[str, Geometry]:
        """A square sample of each set that is trained on, an edit's with one reference of its size."""
        side, found = self.run.image_size // self.factor, {}
        for name, share in self.run.ratio.items():
            if share > 0:
                references = ((side, side),) * references_of(name)
                found[name] = Geometry((side, side), references, text)
        return found

    def batch(self, name: str) -> int:
        """Samples of a set in a device's batch."""
        run = self.run
        if run.batch_tokens is None:
            return run.batch_size
        area = (1 + references_of(name)) * run.image_size**2
        return max(1, run.batch_tokens * run.size_multiple**2 // area)

    def fits(self, needs: Needs) -> Needs:
        """With what sides of pictures there may be."""
        multiple = int(self.config.get("patch_size", 2)) * self.factor
        return replace(needs, multiple=multiple, limit=int(self.config["pos_embed_max_size"]) * multiple)


def references_of(name: str) -> int:
    """Pictures that a set's samples are edited from."""
    return 2 if name == "multi_reference" else int("edit" in name or name == "multi_turn")


def image_parts(transformer: Any) -> list[Part]:
    """The transformer, which is exported in float32, and its constant table."""
    table = tuple(transformer.buffers())
    return [
        Part("transformer", tuple(transformer.parameters()), exported=4),
        Part("position table", table, constant=True, exported=4),
    ]


def frozen_parts(folder: Path, compute: Compute) -> list[Part]:
    """Text encoders and autoencoder."""
    numbers = frozen_parameters(folder)
    texts = sum(count for part, count in numbers.items() if part.startswith("text_encoder"))
    with torch.device("meta"):
        return [
            Part("text encoders", (torch.empty(texts, dtype=compute.frozen_dtype),)),
            Part("autoencoder", (torch.empty(numbers.get("vae", 0)),)),
        ]


def metaquery_parts(folder: Path, compute: Compute) -> list[Part]:
    """Queries, connector and vision-language model of a folder, all of them frozen."""
    precision = {"conditioner": torch.float32, "vlm": compute.frozen_dtype}
    shapes = {part: stored_shapes(folder / part) for part in precision if (folder / part).is_dir()}
    sizes = {part: sum(torch.Size(shape).numel() for shape in found.values()) for part, found in shapes.items()}
    with torch.device("meta"):
        return [Part(part, (torch.empty(count, dtype=precision[part]),)) for part, count in sizes.items()]


def image_needs(run: Run, stage: ImageStage, others: int = 0, precision: Precision = "float32") -> Needs:
    """Of a stage that trains a transformer; `others` are frozen ones beside it, of this precision."""
    folder, work = planned_checkpoint(stage.pretrained), stage.workload()
    pictures = Pictures(folder, run)
    transformer = outline(pictures.config, stage.compute, stage.lora)
    config, text = transformer.config, pictures.text_tokens(stage.max_sequence_length)
    share = work.backward * recomputed_share(stage.compute, config.num_layers) / work.evaluations
    adapters = 0.0 if stage.lora is None else work.backward
    loads = {}
    for name, geometry in pictures.samples(text).items():
        tokens = float(geometry.tokens(config.patch_size))
        flops = passes_flops(config, tokens, text, work.evaluations, adapters)
        kept = partial(saved_bytes, transformer, geometry, autocast=run.autocast)
        batch = pictures.batch(name)
        loads[name] = Load(batch, work.together or batch, flops, kept, again=flops * share)
    parts = [*image_parts(transformer), *frozen_parts(folder, stage.compute)]
    if (folder / "conditioner").is_dir():
        parts += metaquery_parts(folder, stage.compute)
    if others:
        frozen = outline(pictures.config, Compute(precision), None, train=False)
        parts.append(Part("other transformers", tuple([*frozen.parameters(), *frozen.buffers()] * others), exported=0))
    needs = Needs(tuple(parts), loads, work.copies, work.samples, config.num_layers, assumed=pictures.assumed)
    return pictures.fits(needs)

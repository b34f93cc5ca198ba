"""Stages that train queries and a connector before a language model, a transformer behind them, or both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lightning_modules.folders import located, planned_checkpoint, planned_vlm
from lightning_modules.needs.images import Pictures, frozen_parts, image_parts
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute
from lightning_modules.networks.flops import (
    connector_flops,
    language_attention_flops,
    language_flops,
    passes_flops,
    query_flops,
    qwen_vision_flops,
)
from lightning_modules.networks.footprint import (
    Geometry,
    Load,
    Needs,
    Part,
    image_inputs,
    kept_bytes,
    outline,
    recomputed_share,
)
from lightning_modules.networks.light_head import light_config
from lightning_modules.networks.loading import read_json
from lightning_modules.networks.outlines import QueriedStep, conditioner_outline, vlm_outline
from lightning_modules.networks.published import QWEN25_VL_7B, config_in
from lightning_modules.networks.vlm import PIXELS_A_TOKEN, ROUND, Vlm
from lightning_modules.pipelines.metaquery import Querying, querying_of
from lightning_modules.planning import Run

TEXT = 128  # tokens of a caption or an instruction in its conversation, assumed


class ConnectorStage(Protocol):
    """Settings of lightning_modules.connector.ConnectorModule."""

    pretrained: str
    vlm: str | None
    conditioner_folder: str | None
    connector: Any
    parts: list[Any]
    reference: Any
    reading: Any
    light_head: int | None
    vlm_lora: Lora | None
    feature_cache: str | None
    compute: Compute

    @property
    def passes(self) -> int:
        """The transformer's passes in a step."""


def connector_needs(run: Run, stage: ConnectorStage, teacher: bool = False) -> Needs:
    """Of a stage; `teacher` is the transformer's own prediction from its text encoders, as the target."""
    folder = planned_checkpoint(stage.pretrained)
    known = known_conditioner(stage, folder)
    before = Querying() if known is None or not known.is_dir() else querying_of(known)
    querying = Querying(stage.reference or before.reference, stage.reading or before.reading)
    language = planned_vlm(stage.vlm) if stage.vlm else (known or folder) / "vlm"
    config, assumed = config_in(language, QWEN25_VL_7B)
    pictures = Pictures(folder, run)
    transformer = outline(sized(pictures, stage), stage.compute, None, train="transformer" in stage.parts)
    vlm = vlm_outline(config, querying.reading, stage.compute.frozen_dtype, stage.vlm_lora)
    sizes = conditioner_config(stage, known, vlm, transformer)
    conditioner = conditioner_outline(sizes, stage.compute, "connector" in stage.parts)
    step = QueriedStep(transformer, conditioner, vlm, reads=stage.vlm_lora is not None)
    costs = Costs(stage, step, querying, pictures, teacher)
    said = [*pictures.assumed, f"captions and instructions of {TEXT} tokens are assumed"]
    said += [f"{language} is not here: Qwen2.5-VL-7B's sizes are assumed"] if assumed else []
    said += [f"{known} is not here: the released connector's sizes are assumed"] if known and not known.is_dir() else []
    texts, autoencoder = frozen_parts(folder, stage.compute)
    parts = image_parts(transformer)
    parts += [Part("queries and connector", tuple(conditioner.parameters()), exported=4)]
    parts += [Part("vision-language model", tuple(vlm.parameters())), autoencoder, *([texts] if teacher else [])]
    needs = Needs(
        tuple(parts),
        {name: costs.load(name, geometry) for name, geometry in costs.samples.items()},
        blocks=transformer.config.num_layers,
        other={} if stage.vlm_lora else {"what was read, at most": float(1 << 30)},
        assumed=tuple(said),
    )
    return pictures.fits(needs)


class Costs:
    """What samples of a stage cost."""

    def __init__(
        self, stage: ConnectorStage, step: QueriedStep, querying: Querying, pictures: Pictures, teacher: bool
    ) -> None:
        self.stage, self.step, self.querying, self.pictures, self.teacher = stage, step, querying, pictures, teacher
        self.samples = pictures.samples(len(step.conditioner.meta_queries))

    def load(self, name: str, geometry: Geometry) -> Load:
        """Of a set."""
        stage, step, config = self.stage, self.step, self.step.transformer.config
        read = Geometry(geometry.target, geometry.references if self.querying.reference != "transformer" else (), 0)
        seen = Geometry(geometry.target, geometry.references if self.querying.reference != "vlm" else (), geometry.text)
        prefix, reading = self.reading(len(read.references))
        tokens, queries = float(seen.tokens(config.patch_size)), geometry.text
        flops = passes_flops(config, tokens, queries, float(stage.passes), float(stage.passes == 2))
        learns = "connector" in stage.parts
        flops += (3 if learns else 1) * connector_flops(step.conditioner.config)
        flops += (2 if learns or step.reads else 1) * query_flops(step.vlm.text, queries, float(prefix))
        if self.teacher:
            own = self.pictures.text_tokens(None)
            flops += passes_flops(config, float(geometry.tokens(config.patch_size)), own, 1.0)
        again = recomputed_share(stage.compute, config.num_layers) * passes_flops(config, tokens, queries, 1.0)
        if step.reads:
            flops += 2 * reading + language_attention_flops(step.vlm.text, prefix)
        elif stage.feature_cache is None:
            again += reading
        batch, autocast = self.pictures.batch(name), self.pictures.run.autocast
        return Load(batch, batch, flops, partial(self.kept, seen, prefix, autocast), again)

    def kept(self, geometry: Geometry, prefix: int, autocast: bool, count: int) -> float:
        """Bytes that autograd keeps of so many samples."""
        config = self.step.transformer.config

        def inputs() -> dict[str, Any]:
            return {"prefix": prefix, "images": image_inputs(config, geometry, count)}

        return kept_bytes(self.step, inputs, autocast)

    def reading(self, references: int) -> tuple[int, float]:
        """Tokens that queries stand behind, and FLOPs to read them."""
        vlm, vision = self.step.vlm, self.step.vlm.model.config.vision_config
        side = int(self.pictures.run.image_size * vlm.cell / PIXELS_A_TOKEN) // vlm.cell  # tokens of a side
        prefix = TEXT + references * side**2
        patches = side * vision.spatial_merge_size
        padded = -(-prefix // ROUND) * ROUND
        return prefix, language_flops(vlm.text, padded) + references * qwen_vision_flops(vision, patches, patches)


def known_conditioner(stage: ConnectorStage, folder: Path) -> Path | None:
    """The Metaquery folder whose conditioner is gone on with, which need not be here."""
    if stage.conditioner_folder is not None:
        return located(stage.conditioner_folder)
    return folder if (folder / "conditioner").is_dir() else None


def sized(pictures: Pictures, stage: ConnectorStage) -> dict[str, Any]:
    """The transformer's config, with the blocks that are kept."""
    config = dict(pictures.config)
    if stage.light_head is not None:
        config |= light_config(config, stage.light_head)
    return config


def conditioner_config(stage: ConnectorStage, known: Path | None, vlm: Vlm, transformer: Any) -> dict[str, Any]:
    """A conditioner's, of its folder or as a new one is made."""
    if known is not None and known.is_dir():
        return read_json(known / "conditioner" / "config.json")
    return stage.connector.config(vlm.width, transformer.config, len(vlm.reading.layers))

"""Edits made by a model itself, good ones and bad ones: what a reward model learns from."""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from data_pipeline.counters import counter_seed, generator
from data_pipeline.errors import InputError
from data_pipeline.index import sample_id
from data_pipeline.records import EditRecord, EncodedImage, PromptRecord, Record, Rejected
from data_pipeline.transforms import decode, fit_size
from lightning_modules.pipelines.kontext import KontextPipeline
from lightning_modules.pipelines.scorers import folder_fingerprint

Setting = tuple[float, int, int, int]  # guidance scale, steps, height, width


@dataclass
class SampledEdits:
    """Puts a checkpoint's own picture in the place of each edit's target, or after each prompt that has sources.

    Guidance and the number of steps are drawn for each record, so that pictures of all qualities are there; every draw
    is of the seed and the record's key alone. Metadata tells the `guidance_scale` and `num_inference_steps`.

    Args:
        pretrained: a checkpoint folder, such as a run's export.
        image_size: pixels of the longer side.
        guidance_scales: one of them is drawn, with equal chances; a number listed twice has twice the chance.
        num_inference_steps: the same for Euler steps.
        negative_prompt: None takes the released text.
        seed: of the draws.
        device: where it runs.
    """

    pretrained: str = ""
    image_size: int = 512
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.5])
    num_inference_steps: list[int] = field(default_factory=lambda: [10, 28])
    negative_prompt: str | None = None
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not self.guidance_scales or not self.num_inference_steps or min(self.num_inference_steps) < 1:
            raise InputError("sampled edits need at least one guidance scale and one number of steps of at least 1")

    @cached_property
    def fingerprint(self) -> str:
        """The name and a hash of the transformer's weights."""
        return folder_fingerprint(f"{self.pretrained}/transformer", "SampledEdits.pretrained")

    @cached_property
    def _pipeline(self) -> KontextPipeline:
        logging.getLogger("diffusers").setLevel(logging.ERROR)  # CLIP is meant to read only a text's beginning
        return KontextPipeline.from_pretrained(self.pretrained).to(self.device)

    def rewrite(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """Each record with a picture of the model's own; what is no edit is rejected."""
        found: dict[str, Record | Rejected] = {}
        groups: dict[Setting, list[tuple[Record, list[Image.Image]]]] = defaultdict(list)
        for record in records:
            sources = [decode(image.data) for name, image in record.images.items() if name.startswith("source")]
            if isinstance(record, EditRecord | PromptRecord) and sources:
                groups[self._setting(record, sources[0])].append((record, sources))
            else:
                found[record.key] = Rejected(record.key, "no edit", f"a record of kind {record.kind} without sources")
        for setting, group in groups.items():
            for (record, _), picture in zip(group, self._sample(setting, group), strict=True):
                facts = {**record.metadata, "guidance_scale": setting[0], "num_inference_steps": setting[1]}
                about: tuple[Any, ...] = (record.prompt, record.origin, record.licence, record.split, facts)
                sources_ = tuple(image for name, image in record.images.items() if name.startswith("source"))
                found[record.key] = EditRecord(record.key, sources_, encoded(picture), *about)
        return [found[record.key] for record in records]

    def _setting(self, record: Record, source: Image.Image) -> Setting:
        """What is drawn for a record, and its size."""
        draws = [counter_seed(self.seed, name, 0, sample_id(record.key)) for name in ("guidance", "steps")]
        scale = self.guidance_scales[draws[0] % len(self.guidance_scales)]
        steps = self.num_inference_steps[draws[1] % len(self.num_inference_steps)]
        return scale, steps, *fit_size(source.height, source.width, self.image_size, self._pipeline.size_multiple)

    def _sample(self, setting: Setting, group: Sequence[tuple[Record, list[Image.Image]]]) -> list[Image.Image]:
        """Pictures at one setting, in one batch."""
        scale, steps, height, width = setting
        return self._pipeline(
            [record.prompt for record, _ in group],
            image=[sources for _, sources in group],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=scale,
            negative_prompt=self.negative_prompt,
            generator=[generator(self.seed, "sampled edit", 0, sample_id(record.key)) for record, _ in group],
            return_dict=False,
        )[0]


def encoded(picture: Image.Image) -> EncodedImage:
    """A picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return EncodedImage(buffer.getvalue(), "png")

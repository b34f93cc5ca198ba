"""Edits made by a model itself, good ones and bad ones: what a reward model learns from."""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_pipeline.counters import counter_seed, generator
from data_pipeline.errors import InputError
from data_pipeline.index import sample_id
from data_pipeline.records import EditRecord, EncodedImage, PromptRecord, Record, Rejected
from data_pipeline.transforms import decode, fit_size
from lightning_modules.pipelines.kontext import KontextPipeline
from lightning_modules.pipelines.opening import open_folder
from lightning_modules.pipelines.scorers import folder_fingerprint


class Setting(NamedTuple):
    """How pictures are drawn; those of one setting in one batch."""

    guidance_scale: float
    num_inference_steps: int
    height: int
    width: int


class Task(NamedTuple):
    """A record and its pictures to edit."""

    record: Record
    sources: tuple[EncodedImage, ...]
    pictures: list[Image.Image]


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
        return open_folder(Path(self.pretrained)).to(self.device)

    def rewrite(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """Each record with a picture of the model's own; what is no edit is rejected."""
        found: dict[str, Record | Rejected] = {}
        groups: dict[Setting, list[Task]] = defaultdict(list)
        for record in records:
            sources = tuple(image for name, image in record.images.items() if name.startswith("source"))
            if isinstance(record, EditRecord | PromptRecord) and sources:
                pictures = [decode(image.data) for image in sources]
                groups[self._setting(record, pictures[0])].append(Task(record, sources, pictures))
            else:
                found[record.key] = Rejected(record.key, "no edit", f"a record of kind {record.kind} without sources")
        for setting, tasks in groups.items():
            for (record, sources, _), picture in zip(tasks, self._sample(setting, tasks), strict=True):
                drawn = {name: getattr(setting, name) for name in ("guidance_scale", "num_inference_steps")}
                about = (record.prompt, record.origin, record.licence, record.split, {**record.metadata, **drawn})
                found[record.key] = EditRecord(record.key, sources, encoded(picture), *about)
        return [found[record.key] for record in records]

    def _setting(self, record: Record, source: Image.Image) -> Setting:
        """What is drawn for a record, and its size."""
        scale, steps = (
            choices[counter_seed(self.seed, what, 0, sample_id(record.key)) % len(choices)]
            for what, choices in (("guidance", self.guidance_scales), ("steps", self.num_inference_steps))
        )
        size = fit_size(source.height, source.width, self.image_size, self._pipeline.size_multiple)
        return Setting(scale, int(steps), *size)

    def _sample(self, setting: Setting, tasks: Sequence[Task]) -> list[Image.Image]:
        """Pictures at one setting, in one batch."""
        ids = [sample_id(task.record.key) for task in tasks]
        return self._pipeline(
            [task.record.prompt for task in tasks],
            image=[task.pictures for task in tasks],
            height=setting.height,
            width=setting.width,
            num_inference_steps=setting.num_inference_steps,
            guidance_scale=setting.guidance_scale,
            negative_prompt=self.negative_prompt,
            generator=[generator(self.seed, "sampled edit", 0, number) for number in ids],
            return_dict=False,
        )[0]


def encoded(picture: Image.Image) -> EncodedImage:
    """A picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return EncodedImage(buffer.getvalue(), "png")

"""Tensor records handed to modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import InputError

References = Tensor | list[list[Tensor]] | None
TASKS = ("text_to_image", "edit")


@dataclass
class ImageBatch:
    """Samples whose targets have one shape.

    Attributes:
        tasks: B times "text_to_image" or "edit"; all alike unless data of several sets is mixed in a batch.
        keys: B record keys.
        sample_ids: (B,) int64, stable numbers of the records, for draws.
        epochs: (B,) int64, how often each record's set was passed before, for draws.
        prompts: B captions or instructions.
        target: (B, 3, H, W) fp32 in [-1, 1]; posterior moments (B, 2C, h, w) if `encoded`. Prompts have none: then
            (B, 0, H, W), which says how large a picture is to be made.
        references: None, (B, R, 3, h, w) where all samples have equal ones, or per sample a list of (3, h, w); in
            [-1, 1], moments instead of pixels if `encoded`.
        encoded: whether target and references are autoencoder moments.
        contents: B lists of what names the pictures in a cache, target first; None where the pictures are of no shard.
        phase: number of the run's resolution that the batch is of.
        metadata: B records' facts, for rewards; None where they are not known.
        pictures: pixels of the references where those are moments and pixels were asked for: what a vision-language
            model reads. They stay on the CPU.
    """

    tasks: list[str]
    keys: list[str]
    sample_ids: Tensor
    epochs: Tensor
    prompts: list[str]
    target: Tensor
    references: References = None
    encoded: bool = False
    contents: list[list[str]] | None = None
    phase: int = 0
    metadata: list[dict[str, Any]] | None = None
    pictures: References = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def task(self) -> str:
        """The task of all samples, or "mixed"."""
        return self.tasks[0] if len(set(self.tasks)) == 1 else "mixed"

    @property
    def has_targets(self) -> bool:
        """Whether the samples have targets."""
        return self.target.shape[1] > 0

    def area(self, references: bool = True) -> float:
        """Height times width of a sample's pictures together, of its target alone without `references`; the mean of all
        samples, in pixels or in latents as they come."""
        images = [*self.target]
        if references and self.references is not None:
            images += [image for sample in self.references for image in sample]
        return sum(image.shape[-2] * image.shape[-1] for image in images) / len(self)

    def pixels(self) -> list[list[Tensor]]:
        """Per sample the pixels (3, h, w) of its references, in [-1, 1]; empty lists where there are none."""
        if self.references is None:
            return [[] for _ in self.keys]
        found = self.pictures if self.encoded else self.references
        if found is None:
            raise InputError(
                "the references come as moments, and a vision-language model reads pixels; set data.reference_pixels "
                "to true"
            )
        return [list(images) for images in found]

    def map_pictures(self, change: Callable[[Tensor], Tensor], **changes: Any) -> ImageBatch:
        """The batch with target and references changed, each a tensor or a list of lists of them as before."""
        references = self.references
        if isinstance(references, Tensor):
            references = change(references)
        elif references is not None:
            references = [[change(image) for image in images] for images in references]
        return replace(self, target=change(self.target), references=references, **changes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The batch with its pictures on a device; the counters of the draws stay on the CPU."""
        return self.map_pictures(lambda picture: picture.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """The batch with its pictures in page-locked memory, as a DataLoader asks for."""
        return self.map_pictures(Tensor.pin_memory)

    def sample(self, i: int) -> ImageBatch:
        """A batch of the i-th sample alone."""
        return self.rows(i, i + 1)

    def rows(self, start: int, stop: int) -> ImageBatch:
        """A batch of the samples from `start` to before `stop`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), list | Tensor)}
        return replace(self, **{name: value[start:stop] for name, value in own.items()})


def collate_references(references: Sequence[Sequence[Tensor]]) -> References:
    """None if no sample has one, a stack where all samples have equally many of equal shape, else the lists."""
    if not any(references):
        return None
    shapes = {tuple(image.shape for image in images) for images in references}
    if len(shapes) == 1 and len(set(next(iter(shapes)))) == 1:
        return torch.stack([torch.stack(list(images)) for images in references])
    return [list(images) for images in references]

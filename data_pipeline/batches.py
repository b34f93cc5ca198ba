"""Tensor records handed to modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

References = Tensor | list[list[Tensor]] | None


@dataclass
class ImageBatch:
    """Samples of one task, all targets of one shape.

    Attributes:
        task: "text_to_image" or "edit".
        keys: B record keys.
        sample_ids: (B,) int64, stable numbers of the records, for draws.
        epochs: (B,) int64, how often each record's set was passed before, for draws.
        prompts: B captions or instructions.
        target: (B, 3, H, W) fp32 in [-1, 1]; posterior moments (B, 2C, h, w) if `encoded`.
        references: None, (B, R, 3, h, w) where all samples have equal ones, or per sample a list of (3, h, w); in
            [-1, 1], moments instead of pixels if `encoded`.
        encoded: whether target and references are autoencoder moments from the cache.
    """

    task: str
    keys: list[str]
    sample_ids: Tensor
    epochs: Tensor
    prompts: list[str]
    target: Tensor
    references: References = None
    encoded: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The batch with its pictures on a device; the counters of the draws stay on the CPU."""
        references = self.references
        if isinstance(references, Tensor):
            references = references.to(device, non_blocking=non_blocking)
        elif references is not None:
            references = [[image.to(device, non_blocking=non_blocking) for image in images] for images in references]
        return replace(self, target=self.target.to(device, non_blocking=non_blocking), references=references)

    def sample(self, i: int) -> ImageBatch:
        """A batch of the i-th sample alone."""
        references = self.references
        if references is not None:
            references = references[i : i + 1]
        return replace(
            self,
            keys=self.keys[i : i + 1],
            sample_ids=self.sample_ids[i : i + 1],
            epochs=self.epochs[i : i + 1],
            prompts=self.prompts[i : i + 1],
            target=self.target[i : i + 1],
            references=references,
        )


def collate_references(references: Sequence[Sequence[Tensor]]) -> References:
    """None if no sample has one, a stack where all samples have equally many of equal shape, else the lists."""
    if not any(references):
        return None
    shapes = {tuple(image.shape for image in images) for images in references}
    if len(shapes) == 1 and len(set(next(iter(shapes)))) == 1:
        return torch.stack([torch.stack(list(images)) for images in references])
    return [list(images) for images in references]

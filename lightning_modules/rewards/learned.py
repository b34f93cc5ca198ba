"""A reward that was learned from a judge's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.networks.edit_regressor import EditRegressor
from lightning_modules.rewards.protocol import Request


@dataclass
class LearnedEditReward:
    """The product of what a regressor predicts, each kept within [0, 1]: one bad dimension cannot be bought back.

    Args:
        folder: an export of configs/edit_reward.yaml or its like.
        dimensions: those that count; None takes all.
        device: where it runs.
        batch_size: pictures at a time.
    """

    folder: str
    dimensions: list[str] | None = None
    device: str = "cpu"
    batch_size: int = 64

    @cached_property
    def _regressor(self) -> EditRegressor:
        found = EditRegressor.from_pretrained(self.folder).eval().to(self.device)
        unknown = sorted(set(self.dimensions or ()) - set(found.dimensions))
        if unknown:
            raise InputError(f"{self.folder} rates {', '.join(found.dimensions)}, and not {', '.join(unknown)}")
        return found

    @torch.no_grad()
    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        if not all(request.sources for request in requests):
            raise InputError("LearnedEditReward got a prompt without a picture to edit; keep it to the task edit")
        regressor, scores = self._regressor, list[float | None]()
        names = self.dimensions or regressor.dimensions
        columns = [regressor.dimensions.index(name) for name in names]
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            shown = [[*r.sources, p] for r, p in zip(batch, pictures[start : start + self.batch_size], strict=True)]
            rated = regressor(regressor.prepare([request.prompt for request in batch], shown))
            scores += rated[:, columns].clamp(0, 1).prod(dim=1).tolist()
        return scores

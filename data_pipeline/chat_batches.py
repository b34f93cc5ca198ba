"""Batches of conversations handed to modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ChatBatch:
    """Conversations about pictures.

    Attributes:
        keys: B record keys.
        sample_ids: (B,) int64, stable numbers of the records, for draws.
        epochs: (B,) int64, how often the set was passed before, for draws.
        turns: B conversations of (role, text).
        pictures: B lists of (3, H, W) uint8.
        metadata: B records' facts, for rewards.
    """

    keys: list[str]
    sample_ids: Tensor
    epochs: Tensor
    turns: list[tuple[tuple[str, str], ...]]
    pictures: list[list[Tensor]]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ChatBatch:
        """The batch itself: pictures become tiles on the CPU, and tiles go to the device."""
        return self

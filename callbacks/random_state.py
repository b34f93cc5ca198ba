"""The global random number generators across a resume."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

KEY = "random_state"


class RandomState(Callback):
    """Saves each rank's torch, CUDA, numpy and Python generators and restores them after a resume.

    Our own draws are counters and need none of this; it is for what libraries draw, dropout above all. Restored in
    `on_train_start` and not earlier, because building loaders and models draws too. The state is plain tensors, one
    row per rank, which a weights-only load accepts.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Tensor] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        device = trainer.strategy.root_device
        rows = {name: t.unsqueeze(0) for name, t in read_state(device).items()}
        if trainer.world_size > 1:
            rows = {
                name: trainer.strategy.all_gather(t[0].to(device)).cpu().view(trainer.world_size, -1)
                for name, t in rows.items()
            }
        checkpoint[KEY] = rows

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A rank that the saved run did not have keeps its own state.
        rows = {name: t[trainer.global_rank] for name, t in self._restored.items() if trainer.global_rank < len(t)}
        write_state(rows, trainer.strategy.root_device)
        self._restored = {}


def read_state(device: torch.device) -> dict[str, Tensor]:
    """The generators' states as tensors of fixed lengths, on the CPU."""
    version, words, gauss = random.getstate()
    twister: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = twister
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def write_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Sets every generator that `state` names; the inverse of `read_state`."""
    if "torch" in state:
        torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
    if "numpy" in state:
        *keys, position, has_gauss = state["numpy"].tolist()
        words = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", words, position, has_gauss, state["numpy_gauss"].item()))
    if "python" in state:
        version, *internal = state["python"].tolist()
        gauss = state["python_gauss"].item()
        random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))

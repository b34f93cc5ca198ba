"""A regression small enough to compute by hand, on named samples, with a loader that resumes in the middle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from callbacks import AtomicCheckpointIO, Checkpoint


@dataclass
class ToyBatch:
    task: str
    keys: list[str]
    sample_ids: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.keys)


class ToyLoader:
    """`length` batches of 4 rows of 3; batch b holds the samples s<4b> to s<4b+3>."""

    def __init__(self, length: int = 100, poison: Callable[[ToyBatch], None] | None = None) -> None:
        self.length, self.poison, self.position = length, poison, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[ToyBatch]:
        if self.position >= self.length:
            self.position = 0
        while self.position < self.length:
            ids = torch.arange(4) + 4 * self.position
            self.position += 1
            x = torch.stack([(ids.float() * k).sin() for k in (1, 2, 3)], dim=1)
            batch = ToyBatch("edit", [f"s{i}" for i in ids.tolist()], ids, x)
            if self.poison is not None:
                self.poison(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class ToyModule(LightningModule):
    """A trained layer, a frozen one and dropout, which draws from the global generator."""

    def __init__(self, dtype: torch.dtype = torch.float32, dropout: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)
        self.frozen = nn.Linear(2, 2, dtype=dtype).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.lr = lr
        self.history: list[Tensor] = []
        self.losses: list[float] = []
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) + 0.1 * i)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def training_flops(self, batch: ToyBatch) -> float:
        return 1e6 * len(batch)

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        y = self.frozen(self.dropout(self.layer(batch.x.to(self.layer.weight.dtype))))
        loss = (y - 1).square().mean()
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.history.append(self.layer.weight.detach().clone())

    def validation_step(self, batch: ToyBatch, batch_idx: int) -> None:
        self.validated = self.layer.weight.detach().clone()

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layer.parameters(), lr=self.lr, momentum=0.9)


def toy_trainer(folder: Path, callbacks: list[Callback], max_steps: int = 6, **options: Any) -> Trainer:
    defaults = {
        "logger": CSVLogger(str(folder), name="", version=0),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
    }
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        **(defaults | options),
    )


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Equal exactly when names and bits are."""
    parts = [name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in sorted(tensors.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()

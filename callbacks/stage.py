"""What callbacks ask of a stage module, which they never import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter


class Stage(Protocol):
    """The part of a stage module that callbacks use.

    `evaluations`: forward passes of the transformer so far, on this device, for one picture each; a backward pass of
    all weights counts two, of adapters one.
    """

    evaluations: int

    def pipeline(self) -> Any:
        """A diffusers pipeline that shares the live weights."""

    def gathered(self, keep: bool) -> Any:
        """The same with whole weights on the CPU, where they are sharded; all ranks ask, those that `keep` get it."""

    def trainable_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Names and parameters that the optimizer moves."""

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients since the last backward pass, computed once for all who ask."""

    def training_flops(self, batch: Any) -> float:
        """Model FLOPs of one training step on this batch on one device: 3 x forward."""


def stage(pl_module: LightningModule) -> Stage:
    """The same module, typed as what callbacks use of it."""
    return cast(Stage, pl_module)


def sharded(pl_module: LightningModule) -> bool:
    """Whether each rank has a part of the weights only: what computes with them must run on all ranks together."""
    return any(isinstance(p, DTensor) for p in pl_module.parameters())

"""The gradients of a module's trained parameters: their norm, computed once for all who ask, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from data_pipeline.errors import InputError


class Gradients:
    """Of these parameters. `changed` must be called whenever a backward pass adds to them."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = list(parameters)
        self._norm: Tensor | None = None

    def changed(self) -> None:
        """The norm that is known is of earlier gradients."""
        self._norm = None

    def norm(self) -> Float[Tensor, ""]:
        """2-norm of all gradients, on all ranks alike."""
        if self._norm is None:
            found = [p.grad for p in self.parameters if p.grad is not None]
            if found and found[0].dtype == torch.bfloat16:  # of whose norms three digits would be left
                found = list(torch._foreach_norm(found, 2, dtype=torch.float32))
            norm = torch.nn.utils.get_total_norm(found)
            self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._norm

    def clip(self, limit: float) -> None:
        """Scales all gradients so that their norm is at most `limit`."""
        norm = self.norm()
        # Asking whether it is needed would make a GPU wait; on a CPU it saves a pass over all gradients.
        if norm.is_cuda or norm > limit:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)


def require_norm_clipping(trainer: Any) -> None:
    """Refuses a Trainer that would clip by value, or that scales the loss."""
    if trainer.gradient_clip_algorithm == "value" or getattr(trainer.precision_plugin, "scaler", None):
        raise InputError(
            f"gradients are clipped by norm, and unscaled: got gradient_clip_algorithm "
            f"{trainer.gradient_clip_algorithm} and precision {trainer.precision}; use norm, and bf16-mixed in "
            "place of 16-mixed"
        )


class GradientHooks:
    """What stages do alike with the parameters that they train, and Lightning's hooks about gradients; for those that
    set `_gradients` in configure_optimizers, before LightningModule among their bases."""

    _gradients: Gradients

    def trainable_parameters(self: Any) -> Iterator[tuple[str, Parameter]]:
        """Names and parameters that the optimiser moves."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def drop_frozen(self, checkpoint: dict[str, Any]) -> None:
        """Leaves in a checkpoint the weights that are trained, and no constant or frozen ones."""
        trained = dict(self.trainable_parameters())
        checkpoint["state_dict"] = {n: tensor for n, tensor in checkpoint["state_dict"].items() if n in trained}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimiser under mixed precision, though bf16 has nothing to unscale.
        if gradient_clip_val:
            self._gradients.clip(gradient_clip_val)

    def on_before_backward(self, loss: Tensor) -> None:
        self._gradients.changed()

    def gradient_norm(self) -> Float[Tensor, ""]:
        """2-norm of all gradients since the last backward pass, computed once for all who ask."""
        return self._gradients.norm()

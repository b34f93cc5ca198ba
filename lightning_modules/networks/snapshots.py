"""Other weights for the same network: the policy that sampled, the one not to stray from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_modules.networks.loading import CheckpointError


class Snapshots:
    """Named copies of parameters, and the network under one of them, with the graph that is compiled already.

    Between a forward pass with gradients and its backward pass no copy may be put in: autograd reads the parameters.

    Args:
        parameters: those that are trained, which every copy has.
        frozen: others, which a copy may have too.
    """

    def __init__(self, parameters: Mapping[str, Parameter], frozen: Mapping[str, Parameter] | None = None) -> None:
        self.parameters, self.frozen = dict(parameters), dict(frozen or {})
        self.copies: dict[str, dict[str, Tensor]] = {}

    @property
    def every(self) -> dict[str, Parameter]:
        """All parameters that copies may have."""
        return self.parameters | self.frozen

    @torch.no_grad()
    def take(self, name: str) -> None:
        """Copies the weights as they are."""
        self.copies[name] = {key: p.detach().clone() for key, p in self.parameters.items()}

    def to(self, device: torch.device | str) -> None:
        """Moves all copies to where the network is."""
        self.copies = {
            name: {key: tensor.to(device) for key, tensor in copy.items()} for name, copy in self.copies.items()
        }

    @torch.no_grad()
    def put(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Takes weights of the same names and shapes for a copy: of all that is trained, or of what is frozen too."""
        every = self.every
        whole = weights.keys() in (self.parameters.keys(), every.keys())
        if not whole or any(w.shape != every[key].shape for key, w in weights.items()):
            raise CheckpointError(f"the weights for the {name} are of another architecture than what is trained")
        self.copies[name] = {key: w.detach().clone().to(every[key]) for key, w in weights.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The copies of what is trained, for checkpoints, which hold no frozen weights."""
        return {name: {key: copy[key] for key in self.parameters} for name, copy in self.copies.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `state`; what a copy has of frozen weights stays as it was put."""
        self.copies = {name: {**self.copies.get(name, {}), **copy} for name, copy in state.items()}

    @torch.no_grad()
    def approach(self, name: str, share: float) -> None:
        """Moves a copy towards the weights: copy + share (weights - copy)."""
        copies = [self.copies[name][key] for key in self.parameters]
        torch._foreach_lerp_(copies, [p.detach() for p in self.parameters.values()], share)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """The network under a copy inside, under its own weights after; None changes nothing."""
        if name is None:
            yield
            return
        changed = {key: p for key, p in self.every.items() if key in self.copies[name]}
        own = {key: p.data for key, p in changed.items()}
        try:
            for key, p in changed.items():
                p.data = self.copies[name][key]
            yield
        finally:
            for key, p in changed.items():
                p.data = own[key]

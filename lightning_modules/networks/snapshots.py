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
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = dict(parameters)
        self.copies: dict[str, dict[str, Tensor]] = {}

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
        """Takes weights of the same names and shapes for a copy."""
        if {key: w.shape for key, w in weights.items()} != {key: p.shape for key, p in self.parameters.items()}:
            raise CheckpointError(f"the weights for the {name} are of another architecture than what is trained")
        self.copies[name] = {key: weights[key].detach().clone().to(p) for key, p in self.parameters.items()}

    @torch.no_grad()
    def approach(self, name: str, share: float) -> None:
        """Moves a copy towards the weights: copy + share (weights - copy)."""
        copies = list(self.copies[name].values())
        torch._foreach_lerp_(copies, [p.detach() for p in self.parameters.values()], share)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """The network under a copy inside, under its own weights after; None changes nothing."""
        if name is None:
            yield
            return
        own = {key: p.data for key, p in self.parameters.items()}
        try:
            for key, p in self.parameters.items():
                p.data = self.copies[name][key]
            yield
        finally:
            for key, p in self.parameters.items():
                p.data = own[key]

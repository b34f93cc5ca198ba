"""A transformer behind its connector, as one network that is conditioned on hidden states."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.conditioner import Conditioner
from lightning_modules.networks.kontext_transformer import KontextTransformer


class Connected(nn.Module):
    """Kontext's signature, with a language model's hidden states at the queries in place of embeddings.

    Args:
        transformer: the transformer.
        conditioner: its connector; the queries in it are spent already, and are not trained here.
    """

    def __init__(self, transformer: KontextTransformer, conditioner: Conditioner) -> None:
        super().__init__()
        self.transformer, self.conditioner = transformer, conditioner

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.transformer.config

    def requires_grad_(self, requires_grad: bool = True) -> Connected:
        """Trains or freezes all but the queries."""
        super().requires_grad_(requires_grad)
        self.conditioner.meta_queries.requires_grad_(False)
        return self

    def forward(
        self,
        hidden_states: Float[Tensor, "b c h w"],
        encoder_hidden_states: Float[Tensor, "b n d"],
        pooled_projections: Float[Tensor, "b 0"],
        timestep: Float[Tensor, " b"],
        ref_hidden_states: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """Velocity of the target's latents, (B, C, h, w)."""
        sequence, pooled = self.conditioner(encoder_hidden_states)
        return self.transformer(hidden_states, sequence, pooled, timestep, ref_hidden_states, return_dict)

"""A transformer under its conditions, as the velocity that samplers walk and losses compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.rollouts.records import Rollout
from lightning_modules.samplers.guidance import guide


@dataclass
class Policy:
    """velocity(x (B, C, h, w), sigma (B,)) of P groups, each of whose conditions serves all its members.

    Attributes:
        transformer: of Kontext's signature.
        sequence, pooled: text embeddings (P, T, d) and (P, p).
        references: clean latents (P, R, C, h, w) of the pictures to edit, or None.
        guidance_scale: s of classifier-free guidance; other than 1 it evaluates a negative branch beside.
        negative: text embeddings of that branch, one for all groups or one each: (1 or P, T, d) and (1 or P, p).
    """

    transformer: Any
    sequence: Tensor
    pooled: Tensor
    references: Tensor | None
    guidance_scale: float = 1.0
    negative: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, transformer: Any, rollout: Rollout, scale: float) -> Policy:
        """Under the conditions that a rollout was sampled under."""
        return cls(transformer, rollout.sequence, rollout.pooled, rollout.references, scale, rollout.negative)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        members = len(x) // len(self.sequence)
        sequence, pooled = self.sequence.repeat_interleave(members, 0), self.pooled.repeat_interleave(members, 0)
        references = None if self.references is None else self.references.repeat_interleave(members, 0)
        if self.negative is not None:
            sequence, pooled = (
                torch.cat([n.repeat_interleave(len(own) // len(n), 0), own])
                for n, own in zip(self.negative, (sequence, pooled), strict=True)
            )
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
            references = None if references is None else torch.cat([references, references])
        v = self.transformer(
            hidden_states=x,
            ref_hidden_states=one_or_lists(references),
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )[0].float()
        if self.negative is None:
            return v
        without, with_prompt = v.chunk(2)
        return guide(without, with_prompt, self.guidance_scale)


def one_or_lists(references: Tensor | None) -> Any:
    """(B, R, C, h, w) as the transformer takes it: (B, C, h, w) of one reference each, or lists of several."""
    if references is None or references.shape[1] == 1:
        return None if references is None else references[:, 0]
    return [list(images) for images in references]

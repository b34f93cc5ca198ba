"""Joint attention of image and text tokens that honours a mask of the image keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Bool, Float
from torch import Tensor, nn


class KontextAttnProcessor:
    """SD3's joint attention (Esser et al. 2024, arXiv 2403.03206, figure 2), or image self-attention without text.

    `attention_mask` (B, N) is True for image tokens that may be attended to; text tokens always may. diffusers'
    processor for this block takes the argument and does not use it.

    Args:
        in_float32: attend in float32 whatever the precision around it is. On CPUs the backward pass in bfloat16 takes
            six times as long (torch 2.15).
    """

    def __init__(self, in_float32: bool = False) -> None:
        self.in_float32 = in_float32

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b t d"] | None = None,
        attention_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            text = heads(
                attn,
                encoder_hidden_states,
                (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                (attn.norm_added_q, attn.norm_added_k),
            )
            query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), text, strict=True))
        mask = None
        if attention_mask is not None:
            mask = F.pad(attention_mask, (0, key.shape[2] - attention_mask.shape[1]), value=True)[:, None, None, :]
        mixed = attend(query, key, value, mask, self.in_float32).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return project(attn.to_out, mixed)
        image, text_out = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return project(attn.to_out, image), text_out


def attend(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m d"],
    mask: Bool[Tensor, "b 1 1 m"] | None = None,
    in_float32: bool = False,
) -> Float[Tensor, "b h n d"]:
    """Scaled dot-product attention, in float32 whatever the precision around it is where asked for."""
    if not in_float32:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask).to(value.dtype)


def heads(
    attn: Attention, states: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]
) -> list[Tensor]:
    """Query, key and value of shape (B, heads, N, head_dim); query and key normalised where the model does so."""
    split = [p(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections]
    for i, norm in enumerate(norms):
        if norm is not None:
            split[i] = norm(split[i])
    return split


def project(layers: nn.ModuleList, states: Tensor) -> Tensor:
    """The output projection and its dropout."""
    return layers[1](layers[0](states))

"""Floating-point operations of SD3's MMDiT, by hand: two per multiply-add, matrix products only."""

from __future__ import annotations

from typing import Any


def forward_flops(config: Any, image_tokens: float, text_tokens: int) -> float:
    """FLOPs of one sample's forward pass.

    Args:
        config: the transformer's config.
        image_tokens: target and reference tokens together.
        text_tokens: length of the text sequence.
    """
    width = config.num_attention_heads * config.attention_head_dim
    patch_size = config.patch_size**2
    image, text = image_tokens, text_tokens
    linear = attention = 0.0  # multiply-adds
    for layer in range(config.num_layers):
        last, dual = layer == config.num_layers - 1, layer in config.dual_attention_layers
        linear += image * 12 * width**2 + (9 if dual else 6) * width**2  # q, k, v, out, feed-forward; adaLN
        linear += text * (3 if last else 12) * width**2 + (2 if last else 6) * width**2
        attention += 2 * (image + text) ** 2 * width
        if dual:
            linear += image * 4 * width**2
            attention += 2 * image**2 * width
    linear += image * patch_size * config.in_channels * width + text * config.joint_attention_dim * width
    linear += (256 + width + config.pooled_projection_dim + width) * width  # timestep and pooled embeddings
    linear += 2 * width**2 + image * width * patch_size * config.out_channels
    return 2 * (linear + attention)

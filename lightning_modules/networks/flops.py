"""Floating-point operations by hand, of SD3's MMDiT, of Metaquery's connector and of queries: two per multiply-add,
matrix products only."""

from __future__ import annotations

from typing import Any


def forward_flops(config: Any, image_tokens: float, text_tokens: int) -> float:
    """FLOPs of one sample's forward pass; a backward pass to inputs and weights costs twice as much.

    Args:
        config: the transformer's config.
        image_tokens: target and reference tokens together.
        text_tokens: length of the text sequence.
    """
    width = config.num_attention_heads * config.attention_head_dim
    patch_size = config.patch_size**2
    image, text = image_tokens, text_tokens
    linear = 0.0  # multiply-adds
    for layer in range(config.num_layers):
        last, dual = layer == config.num_layers - 1, layer in config.dual_attention_layers
        linear += image * 12 * width**2 + (9 if dual else 6) * width**2  # q, k, v, out, feed-forward; adaLN
        linear += text * (3 if last else 12) * width**2 + (2 if last else 6) * width**2
        if dual:
            linear += image * 4 * width**2
    linear += image * patch_size * config.in_channels * width + text * config.joint_attention_dim * width
    linear += (256 + width + config.pooled_projection_dim + width) * width  # timestep and pooled embeddings
    linear += 2 * width**2 + image * width * patch_size * config.out_channels
    return 2 * linear + attention_flops(config, image_tokens, text_tokens)


def attention_flops(config: Any, image_tokens: float, text_tokens: int) -> float:
    """FLOPs of one sample's products of queries, keys and values in a forward pass."""
    joint = config.num_layers * (image_tokens + text_tokens) ** 2
    own = len(config.dual_attention_layers) * image_tokens**2
    return 4 * (joint + own) * config.num_attention_heads * config.attention_head_dim


def passes_flops(config: Any, image_tokens: float, text_tokens: int, passes: float, frozen: float = 0.0) -> float:
    """FLOPs of a sample's passes; `frozen` of them go backward through weights that are not trained, and count once.

    Attention has no weights: there it costs twice as in any backward pass.
    """
    forward = forward_flops(config, image_tokens, text_tokens)
    return passes * forward + frozen * attention_flops(config, image_tokens, text_tokens)


def connector_flops(config: Any) -> float:
    """FLOPs of one sample's forward pass through a conditioner, from its config."""
    width, inner = (config.connector_config[name] for name in ("hidden_size", "intermediate_size"))
    n, layers = config.num_queries, config.connector_config["num_hidden_layers"]
    encoder = layers * (n * (4 * width**2 + 2 * width * inner) + 2 * n**2 * width)
    heads = n * width * (config.fused_layers * config.llm_hidden_size + config.joint_attention_dim)
    return 2.0 * (encoder + heads + width * config.pooled_projection_dim)


def query_flops(config: Any, queries: int, prefix: float) -> float:
    """FLOPs of a sample's queries through a language model behind a prefix of so many tokens, from its text config."""
    width, heads = config.hidden_size, config.num_key_value_heads / config.num_attention_heads
    linear = queries * (2 * width**2 + 2 * heads * width**2 + 3 * width * config.intermediate_size)
    attention = 2 * queries * (prefix + queries) * width
    return 2 * config.num_hidden_layers * (linear + attention)


def language_flops(config: Any, tokens: int) -> float:
    """FLOPs of one sequence's forward pass through a language model's layers, from its text config."""
    return query_flops(config, tokens, 0.0)


def language_attention_flops(config: Any, tokens: int) -> float:
    """FLOPs of one sequence's products of queries, keys and values in a language model's forward pass."""
    return 4.0 * config.num_hidden_layers * tokens**2 * config.hidden_size


def tower_flops(config: Any, patches: int, beside: int = 1) -> float:
    """FLOPs of one tile's forward pass through a ViT of R1V: `hidden_size` wide, from its vision config.

    Args:
        config: with `num_hidden_layers`, `hidden_size`, `intermediate_size` and `patch_size`.
        patches: of a tile.
        beside: tokens that are no patches.
    """
    width, tokens = config.hidden_size, patches + beside
    layer = tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 2 * tokens**2 * width
    return 2.0 * (config.num_hidden_layers * layer + patches * 3 * config.patch_size**2 * width)


def qwen_vision_flops(config: Any, rows: int, columns: int) -> float:
    """FLOPs of one picture's forward pass through Qwen2.5-VL's vision tower: most layers attend within windows.

    Args:
        config: the vision config.
        rows, columns: of patches.
    """
    width, patches, merge = config.hidden_size, rows * columns, config.spatial_merge_size
    side = config.window_size // config.patch_size  # patches of a window
    spans = [[min(side, n - at) for at in range(0, n, side)] for n in (rows, columns)]
    windowed = sum((height * breadth) ** 2 for height in spans[0] for breadth in spans[1])
    full = len(config.fullatt_block_indexes)
    attention = 2 * width * (full * patches**2 + (config.depth - full) * windowed)
    linear = config.depth * patches * (4 * width**2 + 3 * width * config.intermediate_size)
    inputs = patches * config.in_channels * config.temporal_patch_size * config.patch_size**2 * width
    joined = width * merge**2
    merger = patches // merge**2 * (joined**2 + joined * config.out_hidden_size)
    return 2.0 * (attention + linear + inputs + merger)

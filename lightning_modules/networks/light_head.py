"""A light head in place of a large transformer: its outer blocks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_modules.networks.loading import CheckpointError


def keep_blocks(transformer: Any, count: int) -> None:
    """Keeps the first `count` - 1 blocks and the last, which alone gives no text on; in place, config included."""
    blocks = transformer.transformer_blocks
    if not 1 <= count <= len(blocks):
        raise CheckpointError(
            f"light_head keeps {count} blocks; this transformer has {len(blocks)}, of which 1 or more"
        )
    config = light_config(transformer.config, count)
    transformer.transformer_blocks = nn.ModuleList(blocks[i] for i in kept_blocks(len(blocks), count))
    transformer.register_to_config(**config)


def kept_blocks(of: int, count: int) -> list[int]:
    """Numbers of the blocks that stay."""
    return [*range(count - 1), of - 1]


def light_config(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What of a transformer's config another number of blocks changes."""
    kept = kept_blocks(config["num_layers"], count)
    dual = tuple(new for new, old in enumerate(kept) if old in config.get("dual_attention_layers", ()))
    return {"num_layers": count, "dual_attention_layers": dual}

"""A light head in place of a large transformer: its outer blocks alone."""

from __future__ import annotations

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
    kept = [*range(count - 1), len(blocks) - 1]
    transformer.transformer_blocks = nn.ModuleList(blocks[i] for i in kept)
    dual = tuple(new for new, old in enumerate(kept) if old in transformer.config.dual_attention_layers)
    transformer.register_to_config(num_layers=count, dual_attention_layers=dual)

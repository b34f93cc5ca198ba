"""Sizes of released models, for planning without their weights at hand, and the configs of folders that are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_modules.networks.loading import read_json, stored_files

# SD3.5-Medium's transformer (arXiv 2403.03206 and the released checkpoint).
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
# Parameters of its frozen parts.
SD35_FROZEN = {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840}
SD35_FROZEN |= {"text_encoder_3": 4_762_310_656}
SD35_CLIP_TOKENS, SD35_FACTOR = 77, 8

# Qwen2.5-VL-7B-Instruct (arXiv 2502.13923, table 1, and the released config): 8.29 billion parameters.
QWEN25_VL_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}

# InternViT-6B-448px-V2_5 (arXiv 2412.05271): 5.5 billion parameters.
INTERNVIT_6B: dict[str, Any] = {
    "model_type": "intern_vit_6b",
    "dtype": "bfloat16",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "image_size": 448,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
}

# Qwen2.5-32B-Instruct (arXiv 2412.15115), and DeepSeek-R1-Distill-Qwen-32B, which is one: 32.8 billion parameters.
QWEN25_32B: dict[str, Any] = {
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def config_in(folder: Path, published: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A folder's config.json, or the published one where there is no such folder, and whether that was taken."""
    return (read_json(folder / "config.json"), False) if folder.is_dir() else (dict(published), True)


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The precision that a config says its weights have; float32 where it says nothing."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return torch.bfloat16 if name.endswith("bfloat16") else torch.float16 if name.endswith("float16") else torch.float32


def transformer_config(folder: Path) -> dict[str, Any] | None:
    """The config of a checkpoint folder's transformer; None where the folder is not here."""
    return read_json(folder / "transformer" / "config.json") if folder.is_dir() else None


def frozen_parameters(folder: Path) -> dict[str, int]:
    """Numbers of the frozen parts' parameters, from the headers of their files; SD3.5's where there is no folder."""
    if not folder.is_dir():
        return SD35_FROZEN
    found = {}
    for part in SD35_FROZEN:
        if (folder / part).is_dir():
            shapes = (shape for file in stored_files(folder / part) for shape in file.names.values())
            found[part] = sum(torch.Size(shape).numel() for shape in shapes)
    return found

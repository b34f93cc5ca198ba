"""Vision towers of R1V: any ViT of timm, or InternViT as transformers has it, under the released names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from lightning_modules.networks.loading import CheckpointError

TIMM, INTERN = "timm", "intern_vit_6b"
# Released name of a part of InternViT -> its name in transformers, whose queries, keys and values are apart.
INTERN_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".attn.proj.", ".attention.projection_layer."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)
JOINED, APART = ".attn.qkv.", [f".attention.{name}_proj." for name in "qkv"]


class TimmTower(nn.Module):
    """A ViT of timm without its head.

    Args:
        config: `architecture`, timm's name; `arguments` in place of its own; `image_size` and `patch_size` in pixels.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        arguments = {**config.get("arguments", {}), "img_size": config["image_size"], "num_classes": 0}
        try:
            self.model: Any = timm.create_model(
                config["architecture"], patch_size=config["patch_size"], global_pool="", **arguments
            )
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"timm makes no tower of {self.config}: {error}; name one of its ViTs") from error
        self.width = int(self.model.num_features)  # type: ignore[arg-type]

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n patches d"]:
        """Features of the patches in reading order, without class and register tokens."""
        return self.model.forward_features(pixels)[:, self.model.num_prefix_tokens :]

    def released_state(self) -> dict[str, Tensor]:
        """Weights by the names of a folder."""
        return self.model.state_dict()

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `released_state`."""
        self.model.load_state_dict(dict(state), assign=True)


class InternTower(nn.Module):
    """InternViT. The last layer's output is taken as it is, without a closing norm, as R1V's code does.

    Args:
        config: `vision_config` of a released folder.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.model: Any = InternVLVisionModel(intern_config(config))
        self.width = int(config["hidden_size"])

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n patches d"]:
        """Features of the patches in reading order, without the class token."""
        return self.model(pixel_values=pixels).last_hidden_state[:, 1:]

    def released_state(self) -> dict[str, Tensor]:
        """Weights by their released names, queries, keys and values joined."""
        found = self.model.state_dict()
        state = {
            renamed(name, backwards=True): tensor
            for name, tensor in found.items()
            if not any(part in name for part in APART)
        }
        for name in found:
            if APART[0] in name:
                joined = torch.cat([found[name.replace(APART[0], part)] for part in APART])
                state[renamed(name.replace(APART[0], JOINED), backwards=True)] = joined
        return state

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `released_state`."""
        own = {}
        for name, tensor in state.items():
            if JOINED in name:
                for part, piece in zip(APART, tensor.chunk(3), strict=True):
                    own[renamed(name).replace(JOINED, part)] = piece
            else:
                own[renamed(name)] = tensor
        self.model.load_state_dict(own, assign=True)


def intern_config(config: Mapping[str, Any]) -> InternVLVisionConfig:
    """transformers' settings of a released `vision_config`."""
    return InternVLVisionConfig(
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        attention_bias=config.get("qkv_bias", False),
        use_qk_norm=config.get("qk_normalization", False),
        hidden_act=config.get("hidden_act", "gelu"),
        norm_type=config.get("norm_type", "layer_norm"),
        layer_norm_eps=config.get("layer_norm_eps", 1e-6),
        layer_scale_init_value=config.get("initializer_factor", 0.1),
        image_size=config["image_size"],
        patch_size=config["patch_size"],
    )


def renamed(name: str, backwards: bool = False) -> str:
    """The name of an InternViT weight in transformers; `backwards` the released one.

    >>> renamed("encoder.layers.3.ls1")
    'encoder.layer.3.lambda_1'
    """
    for released, library in INTERN_NAMES:
        name = name.replace(library, released) if backwards else name.replace(released, library)
    return name


def make_tower(config: Mapping[str, Any]) -> TimmTower | InternTower:
    """The tower that a `vision_config` describes, untrained."""
    kind = config.get("model_type")
    if kind not in (TIMM, INTERN):
        raise CheckpointError(f"vision_config.model_type is {kind!r}; expected {INTERN!r} or {TIMM!r}")
    return TimmTower(config) if kind == TIMM else InternTower(config)


def pixel_unshuffle(patches: Float[Tensor, "n p d"], grid: tuple[int, int], factor: int) -> Float[Tensor, "n q e"]:
    """Each square of factor x factor patches as one token, its patches' channels end to end (InternVL's "v2").

    Args:
        patches: in reading order.
        grid: rows and columns of patches; `factor` divides both.
    """
    rows, columns = grid
    n, count, d = patches.shape
    if count != rows * columns or rows % factor or columns % factor:
        raise CheckpointError(
            f"{count} patches as {rows} x {columns} do not divide into squares of {factor} x {factor}; choose an "
            "image_size that is a multiple of patch_size x factor"
        )
    squares = patches.view(n, rows // factor, factor, columns // factor, factor, d).transpose(2, 3)
    return squares.reshape(n, count // factor**2, factor**2 * d)

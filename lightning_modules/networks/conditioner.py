"""UniPic2-Metaquery's bridge: learnable queries, and what a language model made of them to SD3's text conditioning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.attention import attend
from lightning_modules.networks.loading import CheckpointError, check_weights

RELEASED_CLASS = "StableDiffusion3Conditioner"  # the name in Skywork's config.json
KNOWN_CLASSES = {RELEASED_CLASS, "Conditioner"}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ACTIVATION = "gelu_pytorch_tanh"
OWN = "fused_layers"  # a field that the release does not have; it is not written where it says nothing


class Conditioner(ModelMixin, ConfigMixin):
    """Queries, a projection into the connector's width, a bidirectional encoder, and one head each for the sequence and
    the pooled embedding. Loads and writes Skywork's `conditioner/` folder.

    A new one has queries of N(0, 1/sqrt(d)) and heads of zero, as in DeepGen (arXiv 2602.12205): what the transformer
    is conditioned on starts at zero.

    Args:
        connector_config: `hidden_size`, `intermediate_size`, `num_hidden_layers` and `num_attention_heads` of the
            encoder; others that a release stores (such as its attention implementation) are kept and not obeyed.
        num_queries: learnable queries.
        llm_hidden_size: d, width of the language model.
        pooled_projection_dim: of the transformer.
        joint_attention_dim: of the transformer.
        fused_layers: hidden states of so many layers of the language model come stacked on channels.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        connector_config: dict[str, Any],
        num_queries: int = 256,
        llm_hidden_size: int = 3584,
        pooled_projection_dim: int = 2048,
        joint_attention_dim: int = 4096,
        fused_layers: int = 1,
    ) -> None:
        super().__init__()
        missing = [name for name in SIZES if not isinstance(connector_config.get(name), int)]
        if missing:
            raise CheckpointError(f"connector_config lacks {', '.join(missing)}; expected a whole number for each")
        if (activation := connector_config.get("hidden_act", ACTIVATION)) != ACTIVATION:
            raise CheckpointError(
                f"connector_config: hidden_act is {activation}; the release's, {ACTIVATION}, is built in"
            )
        width = connector_config["hidden_size"]
        self.connector = Encoder(connector_config)
        self.projector_1 = nn.Linear(fused_layers * llm_hidden_size, width)
        self.projector_2 = nn.Linear(width, pooled_projection_dim)
        self.projector_3 = nn.Linear(width, joint_attention_dim)
        self.meta_queries = nn.Parameter(torch.randn(num_queries, llm_hidden_size) / llm_hidden_size**0.5)
        for head in (self.projector_2, self.projector_3):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, hidden: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b p"]]:
        """Sequence and pooled embeddings from the language model's last hidden states at the queries."""
        if hidden.shape[-1] != self.projector_1.in_features:
            raise CheckpointError(
                f"the conditioner takes hidden states of {self.projector_1.in_features} channels, got "
                f"{hidden.shape[-1]}; its llm_hidden_size must be that of the vision-language model"
            )
        encoded = self.connector(self.projector_1(hidden))
        return self.projector_3(encoded), self.projector_2(encoded.mean(dim=1))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Conditioner:
        """Loads a `conditioner/` folder; names every missing or misshapen key if it does not fit."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_weights(cls, folder, KNOWN_CLASSES)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config as Skywork's released class reads it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory, self.config_name)
        content = json.loads(path.read_text()) | {"_class_name": RELEASED_CLASS}
        if content.get(OWN) == 1:
            del content[OWN]
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class Encoder(nn.Module):
    """A transformer encoder without positions, mask or final norm: all queries see each other."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            Layer(config["hidden_size"], config["intermediate_size"], config["num_attention_heads"])
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, both with a residual; the names are the release's."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.self_attn, self.mlp = SelfAttention(width, heads), FeedForward(width, inner)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Bidirectional attention of several heads; `in_float32` is as KontextAttnProcessor's."""

    in_float32 = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise CheckpointError(f"connector_config: hidden_size {width} is no multiple of {heads} heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        xavier(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        return self.out_proj(attend(q, k, v, in_float32=self.in_float32).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with the tanh form of GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        xavier(self.fc1, self.fc2)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def xavier(*layers: nn.Linear) -> None:
    """Weights of a variance that keeps activations and gradients alike (Glorot and Bengio 2010), biases of zero."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)

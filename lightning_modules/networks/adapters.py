"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through peft: added, merged, and written apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_modules.networks.loading import CheckpointError

# Flow-GRPO's targets for SD3: all projections of the joint attention.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass
class Lora:
    """W + (alpha / rank) B A of each target, A Gaussian and B zero at first.

    Attributes:
        rank: rows of A.
        alpha: what the product is scaled by, over the rank.
        targets: names, or ends of names, of linear layers.
    """

    rank: int = 32
    alpha: int = 64
    targets: list[str] = field(default_factory=lambda: [f"attn.{name}" for name in ATTENTION])

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise CheckpointError(f"a LoRA needs a rank of at least 1, an alpha above 0 and targets; got {self}")


def add_lora(transformer: Any, settings: Lora, seed: int) -> None:
    """Freezes a transformer and adds trainable adapters, drawn from the seed alone."""
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        init_lora_weights="gaussian",
        target_modules=settings.targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            raise CheckpointError(f"no layer of this transformer is named {settings.targets}: {error}") from error


def has_adapters(module: nn.Module) -> bool:
    """Whether adapters were added."""
    return any(isinstance(layer, LoraLayer) for layer in module.modules())


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights as if they had been trained themselves, under the names of a module without adapters."""
    layers: dict[str, Any] = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    state = {}
    for name, tensor in module.state_dict().items():
        if name.rpartition(".lora_")[0] not in layers:
            state[name.replace(".base_layer.", ".")] = tensor
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            state[f"{name}.weight"] = state[f"{name}.weight"].float() + layer.get_delta_weight(adapter).float()
    return state


def as_base(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights of a module without adapters under the names of one that may have them, whose own adapters stay.

    Right after `add_lora` these add exactly nothing. What the module lacks keeps its name, and what the weights lack is
    absent, so that another architecture is found out.
    """
    plain = {name: name.replace(".base_layer.", ".") for name, _ in module.named_parameters()}
    found = {name: state[each] for name, each in plain.items() if each in state}
    adapters = {name: p.detach() for name, p in module.named_parameters() if "lora_" in name}
    return {name: w for name, w in state.items() if name not in plain.values()} | adapters | found


def adapter_state(module: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapters alone and their settings, as diffusers' `save_lora_weights` takes them."""
    return get_peft_model_state_dict(module), module.peft_config["default"].to_dict()

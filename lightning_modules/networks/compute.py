"""How a transformer computes: in which precision, what it keeps for the backward pass, and on how many devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_modules.networks.attention import KontextAttnProcessor
from lightning_modules.networks.conditioner import SelfAttention
from lightning_modules.networks.loading import CheckpointError

Precision = Literal["float32", "bfloat16"]
aten = torch.ops.aten
# What recompute "cheap" keeps: matrix products and attention, which are nearly all of the arithmetic.
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass
class Compute:
    """Precision and memory of a run.

    Attributes:
        weights: of the transformer while it computes. "bfloat16" keeps float32 masters in the optimiser (with FSDP2 in
            the shards), and needs no autocast: leave trainer.precision at 32-true. "float32" may be used with
            bf16-mixed.
        frozen: of the frozen text encoders. The autoencoder is always float32.
        recompute: activations computed again in the backward pass: of all blocks (true), of the first n, or "cheap",
            all but the results of matrix products and attention.
        float8: linear layers of the blocks in float8 (torchao; NVIDIA Ada, Hopper or later).
    """

    weights: Precision = "float32"
    frozen: Precision = "float32"
    recompute: bool | int | Literal["cheap"] = False
    float8: bool = False

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the transformer."""
        return torch.bfloat16 if self.weights == "bfloat16" else torch.float32

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of the text encoders."""
        return torch.bfloat16 if self.frozen == "bfloat16" else torch.float32


def cast_weights(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Makes the parameters of a precision; the constant positional table stays as exact as it is."""
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)


def own_precision(module: Any) -> torch.autocast:
    """Without autocast: within a training step and ahead of it, a frozen model gives the same bits."""
    return torch.autocast(module.device.type, enabled=False)


def attend_in_float32(network: nn.Module, device: torch.device) -> None:
    """On a CPU leaves attention out of lower precision, if there is any; to be called before blocks are compiled."""
    for part in network.modules() if device.type == "cpu" else ():
        if isinstance(part, Attention):
            part.set_processor(KontextAttnProcessor(in_float32=True))
        elif isinstance(part, SelfAttention):
            part.in_float32 = True


def recompute_blocks(transformer: Any, what: bool | int | Literal["cheap"]) -> None:
    """Makes blocks compute activations again in the backward pass; to be called before they are compiled."""
    blocks = transformer.transformer_blocks
    count = len(blocks) if what is True or what == "cheap" else int(what)
    if not 0 <= count <= len(blocks):
        raise CheckpointError(f"compute.recompute is {what}; this transformer has {len(blocks)} blocks")
    context: dict[str, Any] = {}
    if what == "cheap":
        context = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
        context["respect_saved_tensors_hooks"] = True
    for block in blocks[:count]:
        block.forward = recomputing(block.forward, context)


def recomputing(forward: Callable[..., Any], context: Mapping[str, Any]) -> Callable[..., Any]:
    """A block's forward pass that keeps its inputs alone.

    It is a function of this file's own, which dynamo traces and finds the checkpoint in: PyTorch's, called first, would
    leave the whole block uncompiled without a word.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        # Nothing in a block draws at random.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context, **kwargs)

    return run


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of recompute "cheap"."""
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def float8_blocks(transformer: Any) -> None:
    """Turns the blocks' linear layers into torchao's float8 layers, scaled by tensor; names of weights stay."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise CheckpointError("compute.float8 needs an NVIDIA GPU of compute capability 8.9 (Ada, Hopper) or higher")
    convert_float8(transformer.transformer_blocks)


def convert_float8(blocks: nn.Module, emulate: bool = False) -> None:
    """The conversion itself; `emulate` computes in higher precision on devices without float8."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise CheckpointError("compute.float8 needs torchao: pip install 'unipic-lightning[quant]'") from error
    convert_to_float8_training(
        blocks, config=Float8LinearConfig(emulate=emulate), module_filter_fn=lambda layer, _: fits_float8(layer)
    )


def fits_float8(layer: nn.Module) -> bool:
    """Whether both sides of a linear layer are multiples of 16, as the hardware's products need."""
    return isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0

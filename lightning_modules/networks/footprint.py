"""What networks need, without allocating them: parameters, bytes, and what a forward pass keeps.

Models are made on the meta device. What autograd keeps is counted by running a forward pass on fake tensors, which have
shapes and no data, so that every choice of precision, adapters and recomputation is counted as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.compute import Compute, cast_weights, recompute_blocks
from lightning_modules.networks.kontext_transformer import KontextTransformer


@dataclass(frozen=True)
class Geometry:
    """A sample: the target's and the references' latents (height, width), and the length of its text."""

    target: tuple[int, int]
    references: tuple[tuple[int, int], ...]
    text: int

    def tokens(self, patch: int) -> int:
        """Image tokens of all."""
        return sum(height * width for height, width in (self.target, *self.references)) // patch**2


@dataclass(frozen=True)
class Workload:
    """What a stage does with its transformer.

    Attributes:
        evaluations: forward passes that a sample costs in all; a backward pass counts two, of adapters one.
        backward: backward passes that a sample costs: of each, activations may have to be computed again.
        together: samples whose activations are kept at a time; None where it is the batch.
        copies: other weights of what is trained, held beside.
        samples: of an optimiser step on all devices; None where they are devices x batch x accumulation.
    """

    evaluations: float
    backward: float = 1.0
    together: int | None = None
    copies: int = 0
    samples: int | None = None


@dataclass(frozen=True)
class Part:
    """Weights that a device holds.

    Attributes:
        name: what they are.
        tensors: on the meta device; those that require gradients are trained.
        constant: no parameters, and in no checkpoint.
        exported: bytes of a number in the export; None writes them as they are.
    """

    name: str
    tensors: tuple[Tensor, ...]
    constant: bool = False
    exported: int | None = None

    @property
    def numbers(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """Those that the optimiser moves."""
        return tuple(tensor for tensor in self.tensors if tensor.requires_grad)


@dataclass(frozen=True)
class Load:
    """What the samples of a set cost.

    Attributes:
        batch: samples of a device's batch.
        together: samples whose activations are kept at a time.
        flops: model FLOPs of a sample.
        kept: bytes that autograd keeps of so many samples.
        again: FLOPs of a sample that are no model's: activations computed again, and what frozen networks read.
        streamed: bytes of weights and keys that writing token by token reads from memory, of a sample.
        beside: bytes of the loss's own, beside what is kept, of `together` samples.
        tokens: of a sample, where it is a text.
    """

    batch: int
    together: int
    flops: float
    kept: Callable[[int], float]
    again: float = 0.0
    streamed: float = 0.0
    beside: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Needs:
    """What a run of a stage holds and does, on the meta device.

    Attributes:
        parts: weights.
        loads: cost of each set's samples, by its name.
        copies: other weights of what is trained, held beside.
        samples: of an optimiser step on all devices; None where they are devices x batch x accumulation.
        blocks: that a sharded network is gathered by.
        other: bytes beside weights and activations, by what they are for.
        meanwhile: bytes that are held while nothing is trained, by what they are for.
        assumed: what was taken for granted.
        asked: names of parts that are loaded when something asks for them, once caches hold what they encode.
        multiple, limit: of pictures' sides, in pixels; None where any will do.
    """

    parts: tuple[Part, ...]
    loads: Mapping[str, Load]
    copies: int = 0
    samples: int | None = None
    blocks: int = 1
    other: Mapping[str, float] = field(default_factory=dict)
    meanwhile: Mapping[str, float] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    multiple: int | None = None
    limit: int | None = None


def recomputed_share(compute: Compute, layers: int) -> float:
    """The share of a forward pass that is computed again in a backward pass; next to nothing for "cheap"."""
    if compute.recompute == "cheap":
        return 0.0
    return 1.0 if compute.recompute is True else int(compute.recompute) / layers


def outline(config: Mapping[str, Any], compute: Compute, lora: Lora | None, train: bool = True) -> KontextTransformer:
    """The transformer as a run trains it, or holds it frozen, on the meta device."""
    with torch.device("meta"):
        transformer = KontextTransformer.from_config({**config, "_class_name": KontextTransformer.__name__})
        transformer.requires_grad_(train).train()
        if lora is not None:
            add_lora(transformer, lora, 0)
        cast_weights(transformer, compute.weights_dtype)
    recompute_blocks(transformer, compute.recompute)
    return transformer


def kept_bytes(network: nn.Module, inputs: Callable[[], dict[str, Any]], autocast: bool) -> int:
    """Bytes that autograd keeps between forward and backward pass, parameters excluded.

    Args:
        network: on the meta device; gives a tensor, or a tuple that begins with one.
        inputs: makes its arguments, which are fake ones here.
        autocast: whether it runs under autocast to bfloat16.
    """
    with FakeTensorMode():
        fakes, arguments = fake_weights(network), inputs()
        counter = SavedTensors(fakes.values())
        with counter.hooks(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            found = torch.func.functional_call(network, fakes, kwargs=arguments)
            (found[0] if isinstance(found, tuple) else found).float().square().mean()
    return counter.bytes


def counted_flops(network: nn.Module, inputs: Callable[[], dict[str, Any]]) -> float:
    """FLOPs of a forward pass, counted operation by operation, of a network as `kept_bytes` takes it."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(network, fake_weights(network), kwargs=inputs())
    return float(counter.get_total_flops())


def fake_weights(network: nn.Module) -> dict[str, Tensor]:
    """Fake tensors in place of a network's parameters and buffers, by their names."""
    fakes: dict[str, Tensor] = {}
    for name, p in network.named_parameters():
        fakes[name] = Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
    for name, b in network.named_buffers():
        fakes[name] = torch.empty(b.shape, dtype=b.dtype)
    return fakes


def image_inputs(config: Any, geometry: Geometry, count: int) -> dict[str, Any]:
    """Arguments of a transformer for `count` samples, in whatever mode this is called in."""
    latents = [torch.empty(count, config.in_channels, *size) for size in (geometry.target, *geometry.references)]
    text = torch.empty(count, geometry.text, config.joint_attention_dim)
    inputs: dict[str, Any] = {"hidden_states": latents[0], "encoder_hidden_states": text}
    inputs |= {"pooled_projections": torch.empty(count, config.pooled_projection_dim)}
    inputs |= {"timestep": torch.empty(count)}
    if len(latents) > 1:
        inputs["ref_hidden_states"] = [[latent[i] for latent in latents[1:]] for i in range(count)]
    return inputs


def saved_bytes(transformer: KontextTransformer, geometry: Geometry, count: int, autocast: bool) -> int:
    """`kept_bytes` of a transformer of `outline` alone."""

    def inputs() -> dict[str, Any]:
        return image_inputs(transformer.config, geometry, count) | {"return_dict": False}

    return kept_bytes(transformer, inputs, autocast)


class SavedTensors:
    """Counts the memory of tensors that autograd saves, each storage once, other than `known` tensors'."""

    def __init__(self, known: Any = ()) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._found: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its place

    def hooks(self) -> Any:
        """A context within which what is saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._found[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Of all that was saved."""
        return sum(storage.nbytes() for storage in self._found.values())

"""What a transformer needs, without allocating it: parameters, bytes, and what its forward pass keeps.

Models are made on the meta device. What autograd keeps is counted by running a forward pass on fake tensors, which have
shapes and no data, so that every choice of precision, adapters and recomputation is counted as it is.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.compute import Compute, cast_weights, recompute_blocks
from lightning_modules.networks.kontext_transformer import KontextTransformer
from lightning_modules.networks.loading import read_json, stored_files

# SD3.5-Medium's configs (arXiv 2403.03206 and the released checkpoint), for planning without the weights at hand.
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
SD35_FROZEN = {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840}
SD35_FROZEN |= {"text_encoder_3": 4_762_310_656}
SD35_CLIP_TOKENS, SD35_FACTOR = 77, 8


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


def recomputed_share(compute: Compute, layers: int) -> float:
    """The share of a forward pass that is computed again in a backward pass; next to nothing for "cheap"."""
    if compute.recompute == "cheap":
        return 0.0
    return 1.0 if compute.recompute is True else int(compute.recompute) / layers


def outline(config: dict[str, Any], compute: Compute, lora: Lora | None) -> KontextTransformer:
    """The transformer as a run trains it, on the meta device."""
    with torch.device("meta"):
        transformer = KontextTransformer.from_config({**config, "_class_name": KontextTransformer.__name__})
        transformer.requires_grad_(True).train()
        if lora is not None:
            add_lora(transformer, lora, 0)
        cast_weights(transformer, compute.weights_dtype)
    recompute_blocks(transformer, compute.recompute)
    return transformer


def trained(module: nn.Module) -> int:
    """Number of parameters that the optimiser moves."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def saved_bytes(transformer: KontextTransformer, geometry: Geometry, count: int, autocast: bool) -> int:
    """Bytes that autograd keeps between forward and backward pass of `count` samples, parameters excluded.

    Args:
        transformer: of `outline`.
        geometry: of each sample.
        count: samples of the batch.
        autocast: whether it runs under autocast to bfloat16.
    """
    config, mode = transformer.config, FakeTensorMode()
    with mode:
        fakes: dict[str, Tensor] = {}
        for name, p in transformer.named_parameters():
            fakes[name] = Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, b in transformer.named_buffers():
            fakes[name] = torch.empty(b.shape, dtype=b.dtype)
        latents = [torch.empty(count, config.in_channels, *size) for size in (geometry.target, *geometry.references)]
        text = torch.empty(count, geometry.text, config.joint_attention_dim)
        inputs: dict[str, Any] = {"hidden_states": latents[0], "encoder_hidden_states": text}
        inputs |= {"pooled_projections": torch.empty(count, config.pooled_projection_dim)}
        inputs |= {"timestep": torch.empty(count)}
        if len(latents) > 1:
            inputs["ref_hidden_states"] = [[latent[i] for latent in latents[1:]] for i in range(count)]
        counter = SavedTensors(fakes.values())
        with counter.hooks(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            velocity = torch.func.functional_call(transformer, fakes, kwargs=inputs).sample
            velocity.float().square().mean()
    return counter.bytes


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

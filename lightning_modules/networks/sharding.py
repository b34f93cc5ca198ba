"""A transformer sharded over devices (FSDP2), each of which reads only its own part of the checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_modules.networks.compute import Compute
from lightning_modules.networks.kontext_transformer import KontextTransformer
from lightning_modules.networks.loading import read_json, stored_files

POSITIONS = "pos_embed.pos_embed"


def load_sharded(folder: Path, mesh: DeviceMesh, compute: Compute, device: torch.device) -> KontextTransformer:
    """The transformer of `folder`/transformer in float32 shards; it computes in `compute.weights`."""
    part = folder / "transformer"
    KontextTransformer.check(part)
    config = {**read_json(part / "config.json"), "_class_name": KontextTransformer.__name__}
    with torch.device("meta"):
        transformer = KontextTransformer.from_config(config)
    shard(transformer, mesh, compute)
    positions = plain_positions(config)
    transformer.to_empty(device=device)
    read_shards(part, transformer, {POSITIONS: positions})
    return transformer


def shard(transformer: Any, mesh: DeviceMesh, compute: Compute) -> None:
    """Each block is gathered when it computes, and the rest with the whole; gradients are averaged in float32."""
    low = compute.weights_dtype if compute.weights != "float32" else None
    # The timestep must stay float32: the transformer casts its other inputs itself.
    root = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32))
    # By default the root's own weights stay gathered after a forward pass, and other ones that are put in would wait.
    fully_shard(transformer, mesh=mesh, mp_policy=root, reshard_after_forward=True)


def plain_positions(config: Mapping[str, Any]) -> Tensor:
    """The constant positional table, which the meta device does not compute."""
    few = {**config, "num_layers": 1, "dual_attention_layers": []}
    return KontextTransformer.from_config(few).pos_embed.pos_embed


@torch.no_grad()
def read_shards(part: Path, transformer: Any, constants: Mapping[str, Tensor] | None = None) -> int:
    """Copies this rank's rows of every weight from the safetensors files; returns the bytes that were read."""
    where = {name: file for file in stored_files(part) for name in file.names}
    read = 0
    for name, tensor in transformer.state_dict().items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name in (constants or {}):
            local.copy_(constants[name])  # type: ignore[index]
            continue
        with safe_open(where[name].path, framework="pt") as file:
            stored = file.get_slice(name)
            if isinstance(tensor, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    tensor.shape, tensor.device_mesh, tensor.placements
                )
                if 0 in shape:
                    continue  # more devices than rows
                found = stored[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            else:
                found = stored[:]
        read += found.nbytes
        local.copy_(found)
    return read


def full_state(transformer: Any, keep: bool) -> dict[str, Tensor]:
    """All weights whole, on the CPU; every rank must ask, and those with `keep` false get nothing."""
    state = {}
    for name, tensor in transformer.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = whole.cpu()
    return state

"""Compiles micro blocks that recompute nothing, all and what is cheap, and prints what became of each, as JSON.

In a process of its own: type checks, which tests put around functions, are not compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from parallel import EagerCalls
from torch._dynamo.utils import counters

from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.compute import recompute_blocks


def gradients(transformer: KontextTransformer) -> torch.Tensor:
    """All of them, of one batch of edits."""
    generator, config = torch.Generator().manual_seed(0), transformer.config
    latents, references = torch.randn(2, 2, config.in_channels, 8, 8, generator=generator)
    transformer.zero_grad()
    transformer(
        hidden_states=latents,
        ref_hidden_states=references,
        encoder_hidden_states=torch.randn(2, 5, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
        timestep=torch.tensor([3.0, 700.0]),
    ).sample.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


def main(folder: Path) -> None:
    """Four blocks of two kinds: the last one has no output of text."""
    config, found = {**KontextTransformer.load_config(folder / "transformer"), "num_layers": 4}, {}
    for what in (False, True, "cheap"):
        torch.manual_seed(0)
        transformer = KontextTransformer.from_config(config).train()
        wanted = gradients(transformer)
        recompute_blocks(transformer, what)
        for block in transformer.transformer_blocks:
            block.compile(backend="aot_eager")
        with EagerCalls() as eager:
            error = float((gradients(transformer) - wanted).norm() / wanted.norm())
        found[str(what)] = {"eager": eager.count, "graphs": counters["stats"]["unique_graphs"], "error": error}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

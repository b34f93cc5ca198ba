"""python tests/benchmarks/connector_mfu.py: is stage 1 of Metaquery as busy as full training? Fails below a bar.

The same batches through the same model, once with queries and connector trained before a frozen transformer and once
with the transformer trained too, in turn; of each the model FLOPs a second, by hand. What the frozen language model
read is remembered in both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from data_pipeline.batches import ImageBatch
from lightning_modules import pocket, pocket_vlm
from lightning_modules.connector import Connector, ConnectorModule

BAR = 0.9
ROUNDS, WARM = 12, 3


def data(count: int = 32) -> ImageBatch:
    pictures = torch.rand(2, count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageBatch(
        tasks=["edit"] * count,
        keys=[f"k{i}" for i in range(count)],
        sample_ids=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=[f"make the circle {i}" for i in range(count)],
        target=pictures[0],
        references=pictures[1][:, None],
    )


def main() -> int:
    root = Path(tempfile.mkdtemp())
    recipe = pocket.Recipe(vae_steps=0, layers=6, heads=6, head_dim=64, patch_size=4)
    folder = pocket.checkpoint_folder("pocket", root, recipe)
    vlm = pocket_vlm.vlm_folder("pocket", root, pocket_vlm.VlmRecipe(steps=0, questions=500, width=192))
    sizes = Connector(num_queries=64, width=384, inner=1024, layers=4, heads=6)
    modules = {
        name: ConnectorModule(str(folder), str(vlm), connector=sizes, train=train)
        for name, train in (("stage 1", ["connector"]), ("full training", ["connector", "transformer"]))
    }
    rates: dict[str, list[float]] = {name: [] for name in modules}
    for module in modules.values():
        module.configure_model()
        batch = module.latent_encoder().encode_batch(data())
    for number in range(ROUNDS):
        for name, module in modules.items():
            started = time.perf_counter()
            module.flow_matching_loss(batch).backward()
            seconds = time.perf_counter() - started
            module.zero_grad()
            if number >= WARM:
                rates[name].append(module.training_flops(batch) / seconds)
    found = {name: median(values) for name, values in rates.items()}
    ratio = found["stage 1"] / found["full training"]
    for name, rate in found.items():
        print(f"{name}: {rate / 1e9:.1f} GFLOP/s")
    print(f"stage 1 is {ratio:.2f} of full training; the bar is {BAR}")
    return int(ratio < BAR)


if __name__ == "__main__":
    sys.exit(main())

"""The pocket edit step on the CPU: compiled blocks of bfloat16 weights against eager float32 ones.

    python tests/benchmarks/compiled_bf16.py [--batch 32] [--rounds 8] [--steps 20]

A step is loss, backward pass, clipping and optimiser, on latents and texts at hand; variants take turns, so that what
else the machine does falls on all of them alike. Fails where the compiled bfloat16 step is not 1.3 times as fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from data_pipeline.batches import ImageBatch
from lightning_modules.cli import quiet
from lightning_modules.kontext import KontextModule
from lightning_modules.networks.compute import Compute, attend_in_float32
from lightning_modules.schedule import AdamW

BAR = 1.3
VARIANTS = {  # weights, and whether blocks are compiled
    "eager float32": ("float32", False),
    "compiled float32": ("float32", True),
    "eager bfloat16": ("bfloat16", False),
    "compiled bfloat16": ("bfloat16", True),
}


def edits(module: KontextModule, count: int) -> ImageBatch:
    """Edits of 64 x 64 pixels, as moments."""
    generator = torch.Generator().manual_seed(0)
    batch = ImageBatch(
        tasks=["edit"] * count,
        keys=[f"k{i}" for i in range(count)],
        sample_ids=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=["make the circle red"] * count,
        target=torch.rand(count, 3, 64, 64, generator=generator) * 2 - 1,
        references=torch.rand(count, 1, 3, 64, 64, generator=generator) * 2 - 1,
    )
    return module.latent_encoder().encode_batch(batch)


class Step:
    """A module, its optimiser and its batch."""

    def __init__(self, weights: str, compiled: bool, count: int) -> None:
        compute = Compute(weights=weights)  # type: ignore[arg-type]
        self.module = KontextModule(
            "pocket", 1000, optimizer=AdamW(), max_sequence_length=9, compute=compute, compile=compiled
        )
        self.module.configure_model()
        if weights == "bfloat16":
            attend_in_float32(self.module.transformer, torch.device("cpu"))
        self.module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.batch = edits(self.module, count)

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        loss = self.module.training_step(self.batch, 0)
        self.module.on_before_backward(loss)
        loss.backward()
        self.module.configure_gradient_clipping(self.optimizer, 1.0)
        self.optimizer.step()
        return loss.item()


def main() -> int:
    """Prints milliseconds a step and the ratio to eager float32; the exit status is 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    quiet()
    steps = {name: Step(*settings, arguments.batch) for name, settings in VARIANTS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            rounds[name].append((time.perf_counter() - start) / arguments.steps)
    base = statistics.median(rounds["eager float32"])
    print(f"batch {arguments.batch}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, seconds in rounds.items():
        middle = statistics.median(seconds)
        print(f"{name:20}{1000 * middle:9.2f} ms a step   {base / middle:.2f} x")
    ratio = base / statistics.median(rounds["compiled bfloat16"])
    print(f"compiled bfloat16 against eager float32: {ratio:.2f} (bar {BAR})")
    return int(ratio < BAR)


if __name__ == "__main__":
    sys.exit(main())

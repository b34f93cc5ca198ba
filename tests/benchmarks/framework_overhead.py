"""Step time of `fit` against a bare PyTorch loop on the same module and batches, in one process, in turns.

python tests/benchmarks/framework_overhead.py [--steps 60] [--rounds 5]

Bare: the module's own loss, backward, clipping, AdamW and schedule. Fit: the Trainer with the callbacks of
configs/edit.yaml that work at every step. Both take the same batches of that config's kind, encoded as a cache gives
them and ready in memory. Prints the ratio of medians; exits with 1 above 1.05.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

import callbacks
from data_pipeline.batches import ImageBatch
from data_pipeline.datamodule import SceneShards, ShardDataModule
from lightning_modules.cli import quiet
from lightning_modules.kontext import KontextModule

BAR = 1.05


class Repeated(torch.utils.data.Dataset):
    """The same few batches again and again."""

    def __init__(self, batches: list[ImageBatch], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> ImageBatch:
        return self.batches[i % len(self.batches)]


class Clock(L.Callback):
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def gaps(times: list[float], skip: int = 5) -> list[float]:
    return [b - a for a, b in zip(times[skip:], times[skip + 1 :], strict=False)]


def module(steps: int) -> KontextModule:
    made = KontextModule("pocket", steps=steps, compile=True)
    made.prepare_data()
    made.configure_model()
    return made


def bare(made: KontextModule, batches: list[ImageBatch], steps: int) -> list[float]:
    settings = made.configure_optimizers()
    optimizer, schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    parameters = [p for _, p in made.trainable_parameters()]
    times = []
    made.log = lambda *_, **__: None  # type: ignore[method-assign]
    for i in range(steps):
        loss = made.training_step(batches[i % len(batches)], i)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter())
    return gaps(times)


def fit(made: KontextModule, batches: list[ImageBatch], steps: int) -> list[float]:
    clock = Clock()
    own = [callbacks.EMA(0.998), callbacks.NonFiniteGuard(), callbacks.Throughput(), callbacks.RandomState()]
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        callbacks=[*own, callbacks.Progress(), clock],
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Repeated(batches, steps), batch_size=None)
    trainer.fit(made, loader)
    return gaps(clock.times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as root:
        scenes = SceneShards(count_text_image=64, count_edit=64, root=str(Path(root)))
        data = ShardDataModule(scenes=scenes, steps=4)
        data.prepare_data()
        data.setup("fit")
        batches = list(data.train_dataloader())
    models = {"bare": module(1000), "fit": module(1000)}
    batches = [models["bare"].latent_encoder().encode_batch(batch) for batch in batches]
    loops = {"bare": bare, "fit": fit}
    for name in loops:  # compile, and fill the prompt cache
        loops[name](models[name], batches, 8)
    times: dict[str, list[float]] = {name: [] for name in loops}
    ratios = []
    for _ in range(arguments.rounds):
        medians = {}
        for name, loop in loops.items():
            found = loop(models[name], batches, arguments.steps)
            medians[name] = statistics.median(found)
            times[name] += found
        ratios.append(medians["fit"] / medians["bare"])
    for name, found in times.items():
        print(f"{name:5} median step {1000 * statistics.median(found):.1f} ms over {len(found)} steps")
    print(f"fit / bare by round: {', '.join(f'{r:.3f}' for r in ratios)}; median {statistics.median(ratios):.3f}")
    return 0 if statistics.median(ratios) <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())

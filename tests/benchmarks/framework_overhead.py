"""Step time of `fit` against a bare PyTorch loop on the same module and batches, in one process, step by step in turns.

python tests/benchmarks/framework_overhead.py [--steps 300]

Bare: the module's own loss, backward, clipping, AdamW and schedule. Fit: the Trainer with the callbacks of
configs/edit.yaml that work at every step. Both take that config's model, precision and batches of its kind and size,
encoded as a cache gives them and ready in memory. After each step of fit comes a bare one on the same batch, so that a
machine whose speed changes slows both. Prints the median ratio of such pairs; exits with 1 above 1.05.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
import yaml
from torch.utils.data import DataLoader

import callbacks
from data_pipeline.batches import ImageBatch
from data_pipeline.datamodule import SceneShards, ShardDataModule
from lightning_modules.cli import quiet
from lightning_modules.kontext import KontextModule
from lightning_modules.networks.compute import attend_in_float32

BAR = 1.05
CONFIG = Path(__file__).parents[2] / "configs" / "edit.yaml"


class Repeated(torch.utils.data.Dataset):
    """The same few batches again and again."""

    def __init__(self, batches: list[ImageBatch], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> ImageBatch:
        return self.batches[i % len(self.batches)]


class Turns(L.Callback):
    """Times each step of fit, from the end of this callback to its next call, and a bare one that it runs after it."""

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare = bare
        self.times: dict[str, list[float]] = {"fit": [], "bare": []}

    def on_train_start(self, *_: object) -> None:
        self.resumed = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        ended = time.perf_counter()
        next(self.bare)
        self.times["fit"].append(ended - self.resumed)
        self.times["bare"].append(time.perf_counter() - ended)
        self.resumed = time.perf_counter()


def module(steps: int, text: int) -> KontextModule:
    made = KontextModule("pocket", steps=steps, compile=True, max_sequence_length=text)
    made.prepare_data()
    made.configure_model()
    return made


def bare(made: KontextModule, batches: list[ImageBatch], steps: int, precision: str) -> Iterator[None]:
    """A step at each call of next."""
    mixed = precision == "bf16-mixed"
    attend_in_float32(made.transformer, made.device)
    settings = made.configure_optimizers()
    optimizer, schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    parameters = [p for _, p in made.trainable_parameters()]
    made.log = lambda *_, **__: None  # type: ignore[method-assign]
    for i in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
            loss = made.training_step(batches[i % len(batches)], i)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield


def in_turns(
    batches: list[ImageBatch], steps: int, models: tuple[KontextModule, KontextModule], precision: str
) -> Turns:
    """Trains the first with fit and the second bare."""
    turns = Turns(bare(models[1], batches, steps, precision))
    own = [callbacks.EMA(0.998), callbacks.NonFiniteGuard(), callbacks.Throughput(), callbacks.RandomState()]
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        callbacks=[*own, callbacks.Progress(), turns],
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(models[0], DataLoader(Repeated(batches, steps), batch_size=None))
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    quiet()
    config = yaml.safe_load(CONFIG.read_text())
    with tempfile.TemporaryDirectory() as root:
        scenes = SceneShards(count_text_image=256, count_edit=256, root=str(Path(root)))
        data = ShardDataModule(scenes=scenes, steps=4, batch_size=config["data"]["init_args"]["batch_size"])
        data.prepare_data()
        data.setup("fit")
        batches = list(data.train_dataloader())
    text = config["model"]["init_args"]["max_sequence_length"]
    models = module(1000, text), module(1000, text)
    batches = [models[0].latent_encoder().encode_batch(batch) for batch in batches]
    precision = config["trainer"]["precision"]
    in_turns(batches, 8, models, precision)  # compiles, and fills the prompt caches
    times = in_turns(batches, arguments.steps, models, precision).times
    for name, found in times.items():
        print(f"{name:5} median step {1000 * statistics.median(found):.1f} ms over {len(found)} steps")
    ratios = [fit / own for fit, own in zip(times["fit"], times["bare"], strict=True)][5:]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"fit / bare: median {middle:.3f}, half of all pairs from {low:.3f} to {high:.3f}")
    return 0 if middle <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())

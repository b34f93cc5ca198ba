"""Pictures a second of whole reinforcement iterations (sampling, rewards, update): ours against the published preset.

python tests/benchmarks/rl_cost.py [--pretrained runs/pdtr_base/latest/export] [--rounds 3]

Both configs start from the same model and take turns in one process, four updates of ours, with a batch that the anchor
holds it on among them, for one of the preset, which has more pictures. An evaluation is one picture's forward pass; a
backward pass counts 2, with adapters 1. Exits with 1 where ours costs more than 22 evaluations a sampled picture, the
preset's recipe is not one of 74, or ours is not twice as fast.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import lightning as L
import torch._dynamo

from data_pipeline.datamodule import ShardDataModule
from lightning_modules.cli import CLI, quiet
from lightning_modules.reinforce import ReinforceModule

ROOT = Path(__file__).parents[2]
COST, PRESET_COST, SPEEDUP = 22.0, 74, 2.0
ARMS = {"ours": ("configs/pdtr_edit.yaml", 4), "preset": ("configs/pdtr_paper.yaml", 1)}  # config, updates a round


class Clock(L.Callback):
    """Seconds from the first batch to the end of the last."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if not hasattr(self, "started"):
            self.started = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started


@dataclass
class Arm:
    """A config's module and data, and how long it takes them."""

    module: ReinforceModule
    data: ShardDataModule
    updates: int

    def run(self, updates: int) -> tuple[float, int, int, int]:
        """Seconds, pictures sampled, pictures learned from and evaluations of so many updates."""
        module, clock = self.module, Clock()
        before = module.pictures, module.trained, module.evaluations
        trainer = L.Trainer(
            max_steps=updates, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[clock],
            default_root_dir=tempfile.gettempdir(),
        )  # fmt: skip
        trainer.fit(module, datamodule=self.data)
        now = module.pictures, module.trained, module.evaluations
        pictures, trained, evaluations = (b - a for a, b in zip(before, now, strict=True))
        return clock.seconds, pictures, trained, evaluations

    def warm_up(self) -> None:
        """Compiles for the shapes of its micro-batches, on as little as has them; an anchor is of a whole batch's."""
        module, data = self.module, self.data
        if module.regularisation.anchor:
            self.run(self.updates)
            return
        kept = module.sampling, module.arithmetic, data.batch_size
        data.batch_size = kept[0].micro_groups
        module.sampling = replace(kept[0], groups=kept[0].micro_groups)
        module.arithmetic = replace(kept[1], sampling=module.sampling)
        self.run(1)
        module.sampling, module.arithmetic, data.batch_size = kept


def arm(config: str, updates: int, pretrained: str, root: Path) -> Arm:
    """A config as it is, on a few scenes."""
    overrides = {
        "model.init_args.pretrained": pretrained,
        "data.init_args.scenes.count_text_image": 1024,
        "data.init_args.scenes.count_edit": 1024,
        "data.init_args.scenes.root": root / "scenes",
        "data.init_args.cache.folder": root / "latents",
        "data.init_args.index_root": root / "index",
        "trainer.accelerator": "cpu",
        "trainer.callbacks": "null",
    }
    argv = ["--config", str(ROOT / config), *(f"--{name}={value}" for name, value in overrides.items())]
    subclasses = {"subclass_mode_model": True, "subclass_mode_data": True}
    classes = L.LightningModule, L.LightningDataModule
    made = CLI(*classes, **subclasses, run=False, save_config_callback=None, args=argv)
    return Arm(made.model, made.datamodule, updates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="runs/pdtr_base/latest/export")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not Path(arguments.pretrained).is_dir():
        parser.error(f"there is no model at {arguments.pretrained}; make one: fit -c configs/pdtr_base.yaml")
    quiet()
    with tempfile.TemporaryDirectory() as root:
        arms = {name: arm(*each, arguments.pretrained, Path(root)) for name, each in ARMS.items()}
        for each in arms.values():
            each.warm_up()
        runs = [{name: each.run(each.updates) for name, each in arms.items()} for _ in range(arguments.rounds)]
    costs, speeds = {}, {}
    for name, each in arms.items():
        seconds, pictures, trained, evaluations = (sum(column) for column in zip(*(r[name] for r in runs), strict=True))
        costs[name], speeds[name] = evaluations / pictures, [r[name][1] / r[name][0] for r in runs]
        recipe, update = each.module.arithmetic, seconds / arguments.rounds / each.updates
        print(
            f"{name:6} {pictures / seconds:6.1f} pictures/s, {update:5.1f} s an update; {costs[name]:.1f} evaluations "
            f"a sampled picture, {evaluations / trained:.1f} a picture learned from ({trained / pictures:.0%} are; "
            f"{recipe.to_sample + recipe.to_train} each if all were)"
        )
    ratios = [ours / preset for ours, preset in zip(*speeds.values(), strict=True)]
    print(f"ours / preset by round: {', '.join(f'{r:.2f}' for r in ratios)}; median {median(ratios):.2f}")
    recipe = arms["preset"].module.arithmetic
    good = costs["ours"] <= COST and recipe.to_sample + recipe.to_train == PRESET_COST and median(ratios) >= SPEEDUP
    return 0 if good else 1


if __name__ == "__main__":
    torch._dynamo.config.recompile_limit = 64  # two models share the code of their blocks
    sys.exit(main())

"""An untrained micro checkpoint folder in the full layout, micro shards and a micro run: what the tests run on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data_pipeline.recipe import Recipe as DataRecipe
from data_pipeline.sources import Scenes
from lightning_modules import pocket
from lightning_modules.rewards.protocol import Request

RECIPE = pocket.Recipe(
    vae_channels=(8, 8, 8),
    latent_channels=2,
    vae_steps=0,
    clip_width=8,
    clip_tokens=6,
    t5_tokens=14,
    text_width=16,
    layers=2,
    heads=2,
    head_dim=8,
    patch_size=4,
    sample_size=16,
    max_positions=8,
)


@functools.cache
def built() -> Path:
    """One folder for the whole test session."""
    return pocket.checkpoint_folder("pocket", Path(tempfile.mkdtemp(prefix="micro-")), RECIPE)


def micro_folder(path: Path) -> Path:
    """A micro checkpoint folder of the test's own at `path`."""
    shutil.copytree(built(), path)
    return path


def micro_shards(path: Path, text_image: int = 48, edit: int = 48, level: int = 1) -> Path:
    """Shards of scenes at `path`."""
    DataRecipe(Scenes(level, text_image, edit, 0), records_per_shard=40).build(path)
    return path


def micro_config(folder: Path, **changes: object) -> Path:
    """configs/edit.yaml shrunk to a micro folder, micro shards and a dozen steps, at `folder`/configs/micro.yaml."""
    config = yaml.safe_load((Path(__file__).parents[1] / "configs" / "edit.yaml").read_text())
    config["model"]["init_args"] |= {"pretrained": str(micro_folder(folder / "pretrained")), "compile": False}
    config["model"]["init_args"]["max_sequence_length"] = 8
    data = config["data"]["init_args"]
    data |= {"scenes": None, "shards": [str(micro_shards(folder / "shards"))], "batch_size": 2, "val_batches": 2}
    data |= {"cache": None, "size_multiple": 16}
    config["trainer"] |= {
        "max_steps": 12,
        "precision": "32-true",
        "val_check_interval": 6,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    for entry in config["trainer"]["callbacks"]:
        if "every_n_steps" in entry.get("init_args", {}):
            entry["init_args"]["every_n_steps"] = 3
        if entry["class_path"] == "callbacks.SampleGrid":
            entry["init_args"] |= {"num_samples": 1, "num_inference_steps": 1}
    config["trainer"]["callbacks"].append(
        {"class_path": "micro.Ledger", "init_args": {"file": str(folder / "ledger.jsonl")}}
    )
    config["benchmark"] |= {"count": 2, "num_inference_steps": 1, "guidance_scales": [2.0]}
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = config
        for name in path:
            place = place[name]
        place[last] = value
    target = folder / "configs" / "micro.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(config))
    return target


class Brightness:
    """A reward that any policy can raise: the mean of all pixels."""

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        return pictures.flatten(1).mean(dim=1).tolist()


class Ledger(Callback):
    """Writes each step's samples, loss and a hash of all weights to a file; kills its own process where told to.

    Args:
        file: JSON lines.
        kill_at: optimiser step after which, before its checkpoint, SIGKILL ends the process.
    """

    def __init__(self, file: str, kill_at: int | None = None) -> None:
        self.file, self.kill_at = file, kill_at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        digest = hashlib.sha256()
        for p in pl_module.parameters():
            digest.update(p.detach().numpy().tobytes())
        row = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "ids": batch.sample_ids.tolist(),
            "loss": outputs["loss"].item().hex() if outputs else None,
            "weights": digest.hexdigest(),
        }
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

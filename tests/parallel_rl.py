"""Reinforcement on several processes, whole and stopped while rollouts wait for an update; `parallel.py` runs it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chains
import lightning as L
import rl
import torch
from micro import Brightness, built

from callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.weighted import Weighted
from lightning_modules.rollouts.chain_algorithms import TokenGRPO
from lightning_modules.rollouts.sample_buffer import SampleBuffer
from lightning_modules.rollouts.settings import Regularisation

BATCHES, UPDATES = 8, 3
STOPPED = {"pictures": 7, "answers": 5}  # batches, of which the last waits for another


def pictures() -> tuple[L.LightningModule, list[Any]]:
    """Two batches an update and rank, all different; captions hold the policy on pictures of each rank's own."""
    rank = int(os.environ["RANK"])
    settings = {"sampling": replace(rl.SAMPLING, groups=8), "regularisation": Regularisation(anchor=1.0, old_rate=0.5)}
    module = rl.made(str(built()), **settings)
    module.rewards = {"bright": Weighted(Brightness(), tasks=["edit"])}
    tasks = ["text_to_image" if i in (0, 4) else "edit" for i in range(BATCHES)]
    return module, [rl.prompts(2 * i + rank, task, 2) for i, task in enumerate(tasks)]


class Uneven:
    """A reward by place, whatever an answer says, so that nothing hangs on chance.

    On the second rank all answers to every other question are worth alike.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
        return [
            0.0 if self.rank and "how many? 1" in request.prompt else float(i) for i, request in enumerate(requests)
        ]


def answers() -> tuple[L.LightningModule, list[Any]]:
    """Answers of which a buffer keeps some; groups that teach nothing are left out, so that ranks differ."""
    rank = int(os.environ["RANK"])
    sampling = replace(chains.SAMPLING, groups=8)
    settings = {"sampling": sampling, "buffer": SampleBuffer(share=0.25), "algorithm": TokenGRPO(kl=0.1)}
    module = chains.grpo(Uneven(rank), **settings)
    return module, [chains.asked(2 * i + rank) for i in range(2 * BATCHES)]


def trained(module: L.LightningModule, batches: Sequence[Any], folder: Path, callbacks: list[L.Callback]) -> None:
    """Trains on all ranks; without a callback that saves, from where another run saved."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings = {"strategy": "ddp" if world > 1 else "auto", "devices": world, "plugins": [AtomicCheckpointIO()]}
    rl.trained(module, batches, UPDATES, folder, callbacks, None if callbacks else folder / "stopped.ckpt", **settings)


class SaveWeights(L.Callback):
    """What each rank has learned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"shared-{trainer.world_size}-{trainer.global_rank}.pt")


def shared(output: Path) -> None:
    """Four groups an update: in two micro-batches of one rank, or in one of each of two."""
    rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    settings = Regularisation(old_rate=0.5, velocity_kl=0.1)
    module = rl.made(str(built()), regularisation=settings)
    whole = [rl.prompts(i) for i in range(UPDATES)]
    mine = [each.rows(rank * len(each) // world, (rank + 1) * len(each) // world) for each in whole]
    trained(module, mine, output, [SaveWeights(output)])


def state(module: L.LightningModule) -> dict[str, Any]:
    """What two runs have alike if they are one: a hash of all that is trained, and this rank's counts."""
    digest = hashlib.sha256()
    for p in module.parameters():
        digest.update(p.detach().numpy().tobytes())
    names = ("evaluations", "pictures", "trained", "asked", "updates", "idle")
    return {"weights": digest.hexdigest()} | {name: getattr(module, name, None) for name in names}


def stopped(output: Path, name: str) -> dict[str, Any]:
    """The state of a whole run, of one that went on where it was stopped, and what each rank had waiting there."""
    made = {"pictures": pictures, "answers": answers}[name]
    folder = output / name
    module, batches = made()
    trained(module, batches, folder, [rl.SaveAfter(STOPPED[name], folder / "stopped.ckpt")])
    again, _ = made()
    trained(again, batches[STOPPED[name] :], folder, [])
    saved = torch.load(folder / "stopped.ckpt", weights_only=True)["reinforce" if name == "pictures" else "grpo"]
    held = [{what: len(each.get(what) or ()) for what in ("waiting", "buffer", "anchor")} for each in saved["devices"]]
    keys = [str(each["waiting"])[:2000] for each in saved["devices"]]
    return {"whole": state(module), "resumed": state(again), "held": held, "alike": keys[0] == keys[1]}


def reinforced(output: Path, name: str) -> None:
    """Reinforces what is named on this rank, and writes what it gave."""
    if name == "shared":
        shared(output)
    else:
        (output / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(stopped(output, name)))

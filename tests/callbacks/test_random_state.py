import random
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from toy import ToyLoader, ToyModule, toy_trainer

from callbacks import Checkpoint, RandomState
from callbacks.random_state import read_state, write_state

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]


def test_reading_and_writing_are_inverse() -> None:
    np.random.randn(), random.gauss(0, 1)  # leave half a pair of Gaussians cached
    state = read_state(CPU)
    expected = draws()
    draws()
    write_state(state, CPU)
    assert draws() == expected


class Disturb(Callback):
    """Draws while the run is set up, as building loaders does."""

    def on_fit_start(self, trainer, pl_module) -> None:
        draws()


def test_restored_at_train_start_and_not_before(tmp_path: Path) -> None:
    toy_trainer(tmp_path, [RandomState(), Checkpoint(2)], max_steps=2).fit(ToyModule(dropout=0.5), ToyLoader())
    path = tmp_path / "version_0/checkpoints/step_00000002.ckpt"
    expected = draws()
    seen: list[list[float]] = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen.append(draws())

    callbacks = [Disturb(), RandomState(), Look(), Checkpoint(2)]
    toy_trainer(tmp_path, callbacks, max_steps=3).fit(ToyModule(dropout=0.5), ToyLoader(), ckpt_path=path)
    assert seen == [expected]


def test_a_fresh_run_keeps_its_own_state(tmp_path: Path) -> None:
    random.seed(5)
    expected = random.Random(5).random()
    toy_trainer(tmp_path, [RandomState()], max_steps=1).fit(ToyModule(), ToyLoader())
    assert random.random() == expected

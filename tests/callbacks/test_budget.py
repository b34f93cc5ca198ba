"""A run ends by what it has computed, also when it is resumed after it was spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import ToyLoader, ToyModule, toy_trainer

from callbacks import Budget, Checkpoint
from callbacks.checkpoint import checkpoints, step_of
from data_pipeline.errors import InputError


class Counting(ToyModule):
    """Spends 12 evaluations a batch, and remembers them."""

    evaluations = 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 3 * len(batch)
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["evaluations"] = self.evaluations

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.evaluations = checkpoint["evaluations"]


@pytest.mark.parametrize(("budget", "batches"), [(1, 1), (12, 1), (13, 2), (36, 3)])
def test_training_ends_with_the_batch_that_spends_it(tmp_path: Path, budget: int, batches: int) -> None:
    module = Counting()
    trainer = toy_trainer(tmp_path, [Budget(budget), Checkpoint(100)], max_steps=50)
    trainer.fit(module, ToyLoader())
    assert module.evaluations == 12 * batches and trainer.global_step == batches
    assert [step_of(p) for p in checkpoints(tmp_path / "version_0/checkpoints")] == [batches]


def test_a_spent_run_that_is_resumed_trains_no_further(tmp_path: Path) -> None:
    toy_trainer(tmp_path, [Budget(24), Checkpoint(100)], max_steps=50).fit(Counting(), ToyLoader())
    module, saved = Counting(), tmp_path / "version_0/checkpoints/step_00000002.ckpt"
    trainer = toy_trainer(tmp_path, [Budget(24), Checkpoint(100)], max_steps=50)
    trainer.fit(module, ToyLoader(), ckpt_path=saved)
    assert module.losses == [] and module.evaluations == 24 and trainer.global_step == 2


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_evaluations=0"):
        Budget(0)
    with pytest.raises(InputError, match="ToyModule does not"):
        toy_trainer(tmp_path, [Budget(5)]).fit(ToyModule(), ToyLoader())

"""What a probe of success does to a run: it ends it, or holds its policy tighter, and goes on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from micro import built
from rl import made, prompts, trained
from toy import ToyModule, toy_trainer

from callbacks import Probe, probe
from data_pipeline.errors import InputError
from lightning_modules.evaluation.scenes import SceneBenchmark
from lightning_modules.rollouts.settings import Regularisation

BENCHMARK = SceneBenchmark(1, 2, 1, [1.0])


@pytest.fixture
def successes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the probes of a run find, one after the other."""
    found: list[float] = []
    monkeypatch.setattr(probe, "evaluate", lambda *_: {"t2i_success": found.pop(0), "edit_success": 0.5})
    return found


def run(folder: Path, steps: int = 6, **settings: Any) -> tuple[Any, Probe]:
    """Reinforcement of editing with a probe after each two updates."""
    callback = Probe(BENCHMARK, 2, **settings)
    module = made(str(built()), regularisation=Regularisation(velocity_kl=0.1, old_rate=0.5))
    trained(module, [prompts(i) for i in range(steps)], steps, folder, callbacks=[callback])
    return module, callback


def test_a_task_that_falls_too_low_ends_the_run(successes: list[float], tmp_path: Path) -> None:
    successes += [0.9, 0.85, 0.7, 0.9]
    module, _ = run(tmp_path, stop_below={"t2i_success": 0.8})
    assert module.trainer.global_step == 4


def test_a_goal_that_is_reached_ends_the_run(successes: list[float], tmp_path: Path) -> None:
    successes += [0.1, 0.6, 0.7]
    module, _ = run(tmp_path, stop_above={"t2i_success": 0.6, "edit_success": 0.5})
    assert module.trainer.global_step == 2


def test_a_task_that_falls_too_low_is_held_tighter(successes: list[float], tmp_path: Path) -> None:
    successes += [0.9, 0.7, 0.7, 0.9]
    module, _ = run(tmp_path, tighten_below={"t2i_success": 0.8}, tighten_by=3.0)
    assert module.regularisation.velocity_kl == pytest.approx(0.9) and module.trainer.global_step == 6
    saved: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(saved)
    again = made(str(built()), regularisation=Regularisation(velocity_kl=0.1, old_rate=0.5))
    again.configure_model()
    saved["state_dict"] = {name: p for name, p in again.trainable_parameters()}
    again.on_load_checkpoint(saved)
    assert again.regularisation == module.regularisation


def test_a_probe_is_not_repeated_after_a_stop() -> None:
    first, second = Probe(BENCHMARK), Probe(BENCHMARK)
    first._step = 4
    second.load_state_dict(first.state_dict())
    assert second._step == 4


def test_what_cannot_be_is_named(successes: list[float], tmp_path: Path) -> None:
    successes += [0.9] * 4
    with pytest.raises(InputError, match="there is no metric nonsense"):
        run(tmp_path, stop_below={"nonsense": 0.5})
    with pytest.raises(InputError, match="nothing to hold tighter"):
        Regularisation().tightened(2.0)
    with pytest.raises(InputError, match="held to no reference"):
        toy_trainer(tmp_path, callbacks=[Probe(BENCHMARK, tighten_below={"t2i_success": 0.5})]).fit(ToyModule())
    for wrong in ({"every_n_steps": 0}, {"tighten_by": 1.0}):
        with pytest.raises(InputError, match="expected at least 1, and above 1"):
            Probe(BENCHMARK, **wrong)

from pathlib import Path

import pytest
import torch
from toy import ToyLoader, ToyModule, fingerprint, toy_trainer

from callbacks import EMA, Checkpoint, RandomState, Throughput
from callbacks.checkpoint import checkpoints, step_of
from data_pipeline.errors import InputError

FOLDER = Path("version_0/checkpoints")


def fit(folder: Path, max_steps: int, every: int = 2, ckpt: Path | None = None, **options) -> ToyModule:
    module = ToyModule(dropout=0.5)
    callbacks = [EMA(0.9), RandomState(), Throughput(), Checkpoint(every, keep=2)]
    toy_trainer(folder, callbacks, max_steps, **options).fit(module, ToyLoader(10), ckpt_path=ckpt)
    return module


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder / FOLDER)]


def test_newest_k_and_the_last_step_are_kept(tmp_path: Path) -> None:
    module = fit(tmp_path, max_steps=7)
    assert steps(tmp_path) == [6, 7]
    saved = torch.load(tmp_path / FOLDER / "step_00000007.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert torch.equal(saved["state_dict"]["layer.weight"], module.history[-1])  # after the optimizer step


def test_resuming_in_place_goes_on_pruning_and_removes_orphans(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=4)
    (tmp_path / FOLDER / "step_00000001.ckpt").write_bytes(b"left by a run killed between saving and pruning")
    fit(tmp_path, max_steps=6, ckpt=tmp_path / FOLDER / "step_00000004.ckpt")
    assert steps(tmp_path) == [4, 6]


# 3 is mid-epoch, 10 the end of an epoch of 10 batches, 13 mid-way in the second.
@pytest.mark.parametrize("stop", [3, 10, 13])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path: Path, stop: int) -> None:
    torch.manual_seed(1)
    whole = fit(tmp_path / "whole", max_steps=16)
    torch.manual_seed(1)
    first = fit(tmp_path / "part", max_steps=stop)
    torch.manual_seed(2)
    second = fit(tmp_path / "part", max_steps=16, ckpt=tmp_path / f"part/{FOLDER}/step_{stop:08d}.ckpt")
    assert first.losses + second.losses == whole.losses
    assert fingerprint(second.state_dict()) == fingerprint(whole.state_dict())


def test_accumulation_is_saved_only_between_steps_also_right_after_resuming(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = fit(tmp_path / "whole", max_steps=4, accumulate_grad_batches=2)
    torch.manual_seed(1)
    fit(tmp_path / "part", max_steps=2, accumulate_grad_batches=2)
    path = tmp_path / "part" / FOLDER / "step_00000002.ckpt"
    before = path.read_bytes()
    second = fit(tmp_path / "part", max_steps=4, accumulate_grad_batches=2, ckpt=path)
    assert path.read_bytes() == before
    assert fingerprint(second.state_dict()) == fingerprint(whole.state_dict())


def test_a_finished_run_resumes_to_nothing_left_to_do(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=4)
    module = fit(tmp_path, max_steps=4, ckpt=tmp_path / FOLDER / "step_00000004.ckpt")
    assert module.losses == []
    assert steps(tmp_path) == [2, 4]


def test_arguments_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="every_n_steps=0"):
        Checkpoint(every_n_steps=0)

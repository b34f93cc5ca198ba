"""Recorded rollouts: learning from them is what learning live was, and what is missing or does not fit is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro import Brightness, built
from rl import SAMPLING, made, prompts, trained
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.weighted import Weighted
from lightning_modules.rollouts.algorithms import AWM, GRPO, Window
from lightning_modules.rollouts.recording import Recording, files
from lightning_modules.rollouts.settings import Regularisation

WINDOW = Window(2, (0, 3))
REGULARISATION = Regularisation(velocity_kl=0.1, old_rate=0.5, supervised=0.1, anchor=0.5)


class Picky(Brightness):
    """Tells the pictures of all batches but the second apart."""

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        found = super().score(pictures, requests)
        return [None if r.prompt == "make it 9" else s for s, r in zip(found, requests, strict=True)]


class Unasked:
    """A reward that no one may ask."""

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        raise InputError("a replayed run asked for a reward")


def batches() -> list[ImageBatch]:
    """Two of an edit for each update, among them one that teaches nothing; captions hold the policy."""
    edits = [prompts(i, count=2) for i in range(8)]
    edits[1] = replace(edits[1], prompts=["make it 9"] * 2)
    return [prompts(20, "text_to_image", 2), *edits]


def run(folder: Path, recording: Recording, steps: int = 3, **changes: object) -> ReinforceModule:
    """A run of a few updates; a recorded one samples, another replays."""
    settings = {"algorithm": GRPO(window=WINDOW), "regularisation": REGULARISATION} | changes
    module = made(str(built()), recording=recording, **settings)
    reward = Unasked() if recording.replay_from else Picky()
    module.rewards = {"bright": Weighted(reward, tasks=["edit"])}
    trained(module, batches(), steps, folder)
    return module


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReinforceModule]:
    """The folder of a run's rollouts, and its module."""
    folder = tmp_path_factory.mktemp("live")
    return folder / "rollouts", run(folder, Recording(save_to=str(folder / "rollouts")))


def test_updates_from_replayed_rollouts_are_the_live_ones(live: tuple[Path, ReinforceModule], tmp_path: Path) -> None:
    folder, module = live
    names = [path.name for path in files(folder)]
    assert names[:2] == [
        f"batch_{i:06d}-update_000000-rank_000-part_{p}_of_{p}.safetensors" for i, p in ((0, 1), (1, 0))
    ]
    assert len(names) == 7 and names[-1].startswith("batch_000006-update_000002")
    again = run(tmp_path, Recording(replay_from=str(folder)))
    for name, weights in module.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name]), name
    for name, copy in module.snapshots.copies["old"].items():
        assert torch.equal(copy, again.snapshots.copies["old"][name]), name
    assert again.trained == module.trained > 0 and again.pictures == 0


def test_rollouts_of_several_updates_are_joined_only_where_their_windows_are_alike(
    live: tuple[Path, ReinforceModule],
) -> None:
    folder, module = live
    read = Recording(replay_from=str(folder)).read
    module.waiting = [rollout for batch in range(7) for rollout in read(batch, 0)]
    windows = {key: each.trajectory.window for each in module.waiting for key in each.keys}
    assert len(set(windows.values())) == 2
    packed = module.packed()
    module.waiting = []
    assert packed and all(windows[key] == each.trajectory.window for each in packed for key in each.keys)


def test_a_forward_process_learns_from_any_rollouts(live: tuple[Path, ReinforceModule], tmp_path: Path) -> None:
    module = run(tmp_path, Recording(replay_from=str(live[0])), algorithm=AWM(points_per_picture=1))
    assert module.trained > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sampling": replace(SAMPLING, group_size=4)}, "a group size of 3, and this run 4"),
        ({"sampling": replace(SAMPLING, num_inference_steps=5)}, "steps 4, and this run 5"),
        ({"sampling": replace(SAMPLING, guidance_scale=2.0)}, "guidance False, and this run True"),
        ({"algorithm": GRPO(window=Window(1, (0, 3)))}, "stochastic steps 2, and this run 1"),
        ({"algorithm": GRPO(window=WINDOW, noise=0.5)}, r"the sampler CPS\(noise=0.8.*CPS\(noise=0.5"),
        ({"algorithm": GRPO(window=Window(2, (2, 4)))}, "lets it lie within 2 to 4"),
        ({"steps": 9}, "exhausted after 7 batches of rank 0"),
    ],
)
def test_rollouts_that_do_not_fit_are_named(
    changes: dict, match: str, live: tuple[Path, ReinforceModule], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=match):
        run(tmp_path, Recording(replay_from=str(live[0])), **changes)


def test_the_task_and_the_rewards_of_a_rollout_are_those_of_the_run(live: tuple[Path, ReinforceModule]) -> None:
    folder, module = live
    read = Recording(replay_from=str(folder)).replay
    with pytest.raises(InputError, match="the task edit, and this run text_to_image"):
        read(0, 0, "text_to_image", module.sampling, module.algorithm, {"bright": 1.0})
    with pytest.raises(InputError, match="the rewards bright, and this run gives a weight to dark"):
        read(0, 0, "edit", module.sampling, module.algorithm, {"dark": 1.0})


def test_files_that_are_missing_are_named(live: tuple[Path, ReinforceModule], tmp_path: Path) -> None:
    for path in files(live[0]):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    recording = Recording(replay_from=str(tmp_path))
    files(tmp_path)[3].unlink()
    with pytest.raises(InputError, match="lacks files of batch 3 of rank 0, and has batch_000004"):
        recording.read(3, 0)
    files(tmp_path)[0].write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"part_1_of_1.* cannot be read"):
        recording.read(0, 0)
    with pytest.raises(InputError, match="holds no rollouts of 2 devices, but those of 1 devices"):
        recording.check(0, 0, 2)
    with pytest.raises(InputError, match="no rollouts of 1 devices, but none"):
        Recording(replay_from=str(tmp_path / "nowhere")).check(0, 0, 1)


def test_ranks_do_not_overwrite_each_other_and_runs_do_not_mix(
    live: tuple[Path, ReinforceModule], tmp_path: Path
) -> None:
    rollouts = Recording(replay_from=str(live[0])).read(0, 0)
    recording = Recording(save_to=str(tmp_path))
    for rank in (0, 1):
        recording.write(rollouts * (rank + 1), 0, 0, rank)
    recording.write(rollouts, 0, 0, 1)  # again, as after a stop: another number of parts
    wanted = [f"batch_000000-update_000000-rank_00{rank}-part_1_of_1.safetensors" for rank in (0, 1)]
    assert [path.name for path in files(tmp_path)] == wanted
    with pytest.raises(InputError, match="1 files of rollouts already"):
        recording.check(0, 1, 2)
    recording.check(1, 1, 2)  # a run that goes on
    with pytest.raises(InputError, match="set save_to or replay_from alone"):
        Recording("a", "b")

"""Judged rollouts on disk, so that collecting and learning can be debugged apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.errors import InputError
from lightning_modules.rollouts.algorithms import Algorithm, RatioBased
from lightning_modules.rollouts.records import Rollout
from lightning_modules.rollouts.settings import Sampling

NAME = re.compile(r"batch_(\d+)-update_(\d+)-rank_(\d+)-part_(\d+)_of_(\d+)\.safetensors")


@dataclass
class Recording:
    """What a run samples, kept in files or taken from them.

    A batch's rollouts of one device are files named batch_<n>-update_<n>-rank_<n>-part_<n>_of_<n>.safetensors; a batch
    that taught nothing is one empty file, part 0 of 0.

    Attributes:
        save_to: folder that each batch's judged rollouts are written to.
        replay_from: such a folder; a run learns from it, batch after batch, and neither samples nor asks a reward. On
            the data, seed and weights of the run that saved it takes the same updates, bit for bit.
    """

    save_to: str | None = None
    replay_from: str | None = None

    def __post_init__(self) -> None:
        if self.save_to is not None and self.replay_from is not None:
            raise InputError("recording: a run that replays samples nothing to save; set save_to or replay_from alone")

    def check(self, batch: int, rank: int, devices: int) -> None:
        """InputError where the folder to save to has another run's files, or the one to replay from not each device's.

        Args:
            batch: batches that the run has sampled; above 0 where it goes on.
            rank: of the device.
            devices: of the run.
        """
        earlier = files(self.save_to) if self.save_to is not None and not batch else []
        if earlier := [path for path in earlier if fields_of(path)["rank"] == rank]:
            raise InputError(
                f"recording.save_to: {self.save_to} holds {len(earlier)} files of rollouts already, such as "
                f"{earlier[0].name}; name an empty folder"
            )
        if self.replay_from is None:
            return
        ranks = sorted({fields_of(path)["rank"] for path in files(self.replay_from)})
        if ranks != list(range(devices)):
            saved = f"those of {len(ranks)} devices" if ranks else "none"
            raise InputError(
                f"recording.replay_from: {self.replay_from} holds no rollouts of {devices} devices, but {saved}; name "
                "the folder that a run of as many devices saved to"
            )

    def write(self, rollouts: Sequence[Rollout], batch: int, update: int, rank: int) -> None:
        """Saves a batch's rollouts, in place of those of a run that was stopped behind its last checkpoint."""
        assert self.save_to is not None
        folder = Path(self.save_to)
        folder.mkdir(parents=True, exist_ok=True)
        for path in of_batch(folder, batch, rank):
            path.unlink()
        stem, count = f"batch_{batch:06d}-update_{update:06d}-rank_{rank:03d}", len(rollouts)
        if not count:
            save_file({}, folder / f"{stem}-part_0_of_0.safetensors")
        for part, rollout in enumerate(rollouts, 1):
            unfinished = folder / f".{stem}-part_{part}"
            rollout.save(unfinished)
            unfinished.replace(folder / f"{stem}-part_{part}_of_{count}.safetensors")

    def read(self, batch: int, rank: int) -> list[Rollout]:
        """What a run saved of a batch; InputError where that is not all there."""
        folder = Path(self.replay_from or "")
        found = of_batch(folder, batch, rank)
        parts = [path for path in found if fields_of(path)["part"]]
        if found and len(parts) == fields_of(found[0])["count"]:
            return [loaded(path) for path in parts]
        later = [path for path in files(folder) if fields_of(path)["rank"] == rank and fields_of(path)["batch"] > batch]
        if found or later:
            raise InputError(
                f"recording.replay_from: {folder} lacks files of batch {batch} of rank {rank}, and has "
                f"{', '.join(path.name for path in (found or later)[:3])}; save the rollouts again"
            )
        raise InputError(
            f"recording.replay_from: {folder} is exhausted after {batch} batches of rank {rank}; lower "
            "trainer.max_steps, or save more of them"
        )

    def replay(
        self,
        batch: int,
        rank: int,
        task: str,
        sampling: Sampling,
        algorithm: Algorithm,
        weights: Mapping[str, float],
    ) -> list[Rollout]:
        """A batch's rollouts, each found to be what this run could have sampled.

        Args:
            batch: number of the batch.
            rank: of the device.
            task: of the batch.
            sampling, algorithm: as the run has them.
            weights: of its rewards.
        """
        found = self.read(batch, rank)
        for rollout in found:
            for what, got, wanted in differences(rollout, task, sampling, algorithm, weights)[:1]:
                raise InputError(
                    f"recording.replay_from: a rollout of batch {batch} of rank {rank} has {what} {got}, and this run "
                    f"{wanted}; replay it with the data, sampling, rewards and algorithm that saved it"
                )
        return found


def loaded(path: Path) -> Rollout:
    """What is in a file; InputError where it is damaged."""
    try:
        return Rollout.load(path)
    except SafetensorError as error:
        raise InputError(f"recording.replay_from: {path} cannot be read ({error}); save the rollouts again") from error


def differences(
    rollout: Rollout, task: str, sampling: Sampling, algorithm: Algorithm, weights: Mapping[str, float]
) -> list[tuple[str, object, object]]:
    """What a rollout has otherwise than a run: what it is, what the rollout has, and what the run has."""
    pairs: list[tuple[str, object, object]] = [
        ("the task", rollout.task, task),
        ("a group size of", rollout.group_size, sampling.group_size),
        ("steps", len(rollout.trajectory.sigmas) - 1, sampling.num_inference_steps),
        ("guidance", rollout.negative is not None, sampling.guidance_scale != 1),
    ]
    if isinstance(algorithm, RatioBased):
        start, end = rollout.trajectory.window
        first, last = algorithm.window.within
        pairs += [
            ("the sampler", rollout.sampler or "none, but the ODE", str(algorithm.stochastic())),
            ("stochastic steps", end - start, algorithm.window.size),
        ]
        if start < first or end > last:
            pairs.append(("a window at", (start, end), f"lets it lie within {first} to {last}"))
    if unknown := sorted(name for name in rollout.rewards if not weights.get(name)):
        pairs.append(("the rewards", ", ".join(unknown), f"gives a weight to {', '.join(weights)}"))
    return [pair for pair in pairs if pair[1] != pair[2]]


def files(folder: str | Path) -> list[Path]:
    """The files of rollouts in a folder, batch after batch."""
    return sorted(path for path in Path(folder).glob("batch_*.safetensors") if NAME.fullmatch(path.name))


def of_batch(folder: Path, batch: int, rank: int) -> list[Path]:
    """Those of one batch of a device, part after part."""
    found = folder.glob(f"batch_{batch:06d}-update_*-rank_{rank:03d}-part_*_of_*.safetensors")
    return sorted(found, key=lambda path: fields_of(path)["part"])


def fields_of(path: Path) -> dict[str, int]:
    """The numbers in a file's name.

    >>> fields_of(Path("batch_000017-update_000003-rank_001-part_2_of_4.safetensors"))
    {'batch': 17, 'update': 3, 'rank': 1, 'part': 2, 'count': 4}
    """
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return dict(zip(("batch", "update", "rank", "part", "count"), map(int, match.groups()), strict=True))

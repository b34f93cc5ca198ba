"""Planned batches to tensor batches, from shards or from the latent cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from data_pipeline.batches import ImageBatch, collate_references
from data_pipeline.cache import LatentCache
from data_pipeline.errors import InputError
from data_pipeline.index import IndexedRecord, read_member, read_prompt
from data_pipeline.plan import Bucket, Plan, PlannedBatch
from data_pipeline.transforms import decode, fit_size, to_tensor

TASKS = {"text_image": "text_to_image", "edit": "edit"}  # the task that trains on a kind of record


def reference_names(record: IndexedRecord) -> list[str]:
    """Names of a record's references, in order."""
    return [f"source{i}" for i in range(sum(name.startswith("source") for name in record.members))]


def bucket_of(record: IndexedRecord, image_size: int, multiple: int) -> Bucket:
    """Sizes of the target and of each reference; one reference takes the target's size, as released."""

    def size(name: str) -> tuple[int, int]:
        member = record.members[name]
        return fit_size(member.height, member.width, image_size, multiple)

    target = size("target" if record.kind == "edit" else "image")
    names = reference_names(record)
    return (target, target) if len(names) == 1 else (target, *(size(name) for name in names))


def group(
    records: Sequence[IndexedRecord], positions: Sequence[int], image_size: int, multiple: int
) -> dict[tuple[str, Bucket], list[int]]:
    """Positions in the index by (task, bucket)."""
    sets: dict[tuple[str, Bucket], list[int]] = {}
    for i in positions:
        record = records[i]
        sets.setdefault((TASKS[record.kind], bucket_of(record, image_size, multiple)), []).append(i)
    return sets


def common_bucket(sets: dict[tuple[str, Bucket], list[int]], task: str) -> Bucket | None:
    """The bucket that most samples of a task are in."""
    sizes = Counter({bucket: len(found) for (t, bucket), found in sets.items() if t == task})
    return sizes.most_common(1)[0][0] if sizes else None


class PlannedDataset(Dataset[ImageBatch]):
    """Maps a PlannedBatch to an ImageBatch."""

    def __init__(self, records: Sequence[IndexedRecord], cache: LatentCache | None = None) -> None:
        self.records, self.cache = records, cache

    def __getitem__(self, planned: PlannedBatch) -> ImageBatch:  # type: ignore[override]
        records = [self.records[i] for i in planned.indices]
        target_size, *sizes = planned.bucket
        target = "target" if planned.task == "edit" else "image"
        references = [
            [self.image(record, name, size) for name, size in zip(reference_names(record), sizes, strict=True)]
            for record in records
        ]
        return ImageBatch(
            task=planned.task,
            keys=[record.key for record in records],
            sample_ids=torch.tensor([record.sample_id for record in records]),
            epochs=torch.tensor(planned.epochs),
            prompts=[read_prompt(record) for record in records],
            target=torch.stack([self.image(record, target, target_size) for record in records]),
            references=collate_references(references),
            encoded=self.cache is not None,
        )

    def image(self, record: IndexedRecord, name: str, size: tuple[int, int]) -> torch.Tensor:
        """Pixels (3, H, W) in [-1, 1], or cached moments (2C, h, w)."""
        if self.cache is not None:
            return self.cache.moments(record.members[name].sha256, size)
        return load_pixels(record, name, size)


def load_pixels(record: IndexedRecord, name: str, size: tuple[int, int]) -> torch.Tensor:
    """A member decoded and resized, (3, H, W) in [-1, 1]."""
    try:
        return to_tensor(decode(read_member(record, name)), size)
    except InputError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise InputError(
            f"{record.shard}: {name} of record {record.key} does not decode ({error}); it did if the shard was built "
            f"here, so the file was damaged since: build it again; of tars by others, lint names all that do not"
        ) from error


class PlanSampler(Sampler[PlannedBatch]):
    """The plan from the batch that training has come to; its length is that of the whole run."""

    def __init__(self, plan: Plan, length: int, consumed: Any) -> None:
        self.plan, self.length, self.consumed = plan, length, consumed

    def __iter__(self) -> Iterator[PlannedBatch]:
        start = self.consumed()
        batches = self.plan.batches(start)
        for _ in range(start, self.length):
            yield next(batches)

    def __len__(self) -> int:
        return self.length

"""Planned batches to tensor batches, from shards or from the cache of moments."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data_pipeline.batches import ImageBatch, collate_references
from data_pipeline.cache import FeatureStore
from data_pipeline.counters import generator
from data_pipeline.errors import InputError
from data_pipeline.index import TEXT_FIELDS, IndexedRecord, read_text, view_member
from data_pipeline.plan import PHASE_EPOCHS, Bucket, Draw, PlannedBatch
from data_pipeline.read_ahead import LocalCopies, fetched
from data_pipeline.serving import ServingIndex
from data_pipeline.transforms import REVISION, Size, decode, to_tensor

Verify = Literal["first_epoch", "always", "never"]
AHEAD = 3  # batches that a thread has ready or in the making
# Words that a mirrored picture makes wrong, and those they are part of: "top-left", "leftmost", but not "bright".
SIDES = re.compile(r"(?<![^\W\d_])(?:top|bottom|upper|lower)?(?:left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew each epoch, alike for target and references.

    Attributes:
        flip: probability of mirroring a sample left to right; one whose text speaks of left or right never is.
        seed: of the draws.
    """

    flip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise InputError(f"augmentation: flip is a probability from 0 to 1, got {self.flip}")

    def mirrored(self, draw: Draw, record: IndexedRecord, prompt: str) -> bool:
        """Whether this sample is mirrored in this epoch."""
        if not self.flip or SIDES.search(prompt):
            return False
        source = generator(self.seed, "flip", draw.epoch, record.sample_id)
        return bool(torch.rand((), generator=source) < self.flip)


def sized(record: IndexedRecord, bucket: Bucket) -> list[tuple[str, Size]]:
    """Names of a record's pictures, the target, if any, and its references in order, and the sizes of training."""
    targets = [name for name in ("image", "target") if name in record.members]
    names = [*targets, *(f"source{i}" for i in range(len(bucket) - 1))]
    return list(zip(names, bucket[1 - len(targets) :], strict=True))


def content_name(record: IndexedRecord, name: str, size: Size, mirrored: bool) -> str:
    """What a cache knows a picture by: its bytes and what was done to them before it was encoded."""
    done = f"{size[0]}x{size[1]} revision {REVISION}{' mirrored' if mirrored else ''}"
    return f"{record.members[name].sha256} {done}"


def wanted_features(
    records: Iterable[tuple[Bucket, IndexedRecord]], flips: bool
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names of the records' pictures in a cache, mirrored ones too where `flips`, and what loads each."""
    for bucket, record in records:
        for mirrored in (False, True) if flips else (False,):
            for name, size in sized(record, bucket):
                yield content_name(record, name, size, mirrored), partial(load_pixels, record, name, size, mirrored)


class PlannedDataset(Dataset[ImageBatch]):
    """Maps a PlannedBatch to an ImageBatch: moments where the store has those of the whole batch, else pixels.

    Args:
        indexes: where records lie, for each phase of the plan.
        part: "train" or "val".
        store: moments by content and transform.
        augmentation: what is drawn anew each epoch.
        verify: when the hash of what is read is compared with the index.
        require: whether the store must have all.
        copies: where ranges of remote shards are kept.
        pixels: whether references come as pixels too where they come as moments.
    """

    def __init__(
        self,
        indexes: Sequence[ServingIndex],
        part: str,
        store: FeatureStore | None = None,
        augmentation: Augmentation = Augmentation(),
        verify: Verify = "first_epoch",
        require: bool = False,
        copies: LocalCopies | None = None,
        pixels: bool = False,
    ) -> None:
        self.indexes, self.part, self.store = indexes, part, store
        self.augmentation, self.verify, self.require = augmentation, verify, require
        self.copies, self.pixels = copies, pixels

    def __getitem__(self, planned: PlannedBatch) -> ImageBatch:  # type: ignore[override]
        index, draws = self.indexes[planned.phase], planned.draws
        records = [index.record(self.part, draw.stream, draw.index) for draw in draws]
        records = fetched(records, TEXT_FIELDS if self.store is not None else None, self.copies)
        checked = [self.checks(draw) for draw in draws]
        texts = [read_text(record, check) for record, check in zip(records, checked, strict=True)]
        prompts = [prompt for prompt, _ in texts]
        mirrored = [self.augmentation.mirrored(*sample) for sample in zip(draws, records, prompts, strict=True)]
        buckets = [draw.stream[1] for draw in draws]
        contents = [
            [content_name(record, *each, mirror) for each in sized(record, bucket)]
            for record, bucket, mirror in zip(records, buckets, mirrored, strict=True)
        ]
        pictures = self.stored(contents)
        encoded = pictures is not None
        if pictures is None:
            records = fetched(records, None, self.copies)
            pictures = [
                [load_pixels(record, *each, mirror, check) for each in sized(record, bucket)]
                for record, bucket, mirror, check in zip(records, buckets, mirrored, checked, strict=True)
            ]
        if records[0].kind == "prompt":  # a batch has prompts alone, or none
            target = torch.empty(len(records), 0, *planned.shape)
        else:
            target = torch.stack([row.pop(0) for row in pictures])
        read: list[list[Tensor]] = []
        if self.pixels and encoded:
            whole = fetched(records, None, self.copies)
            read = [self.sources(*sample) for sample in zip(whole, buckets, mirrored, checked, strict=True)]
        return ImageBatch(
            tasks=[index.tasks[draw.stream[0]] for draw in draws],
            keys=[record.key for record in records],
            sample_ids=torch.tensor([record.sample_id for record in records]),
            epochs=torch.tensor([draw.epoch for draw in draws]),
            prompts=prompts,
            target=target,
            references=collate_references(pictures),
            encoded=encoded,
            contents=contents,
            phase=planned.phase,
            metadata=[metadata for _, metadata in texts],
            pictures=collate_references(read),
        )

    def sources(self, record: IndexedRecord, bucket: Bucket, mirrored: bool, verify: bool) -> list[Tensor]:
        """Pixels of a record's references."""
        wanted = [each for each in sized(record, bucket) if each[0] not in ("image", "target")]
        return [load_pixels(record, *each, mirrored, verify) for each in wanted]

    def stored(self, contents: Sequence[Sequence[str]]) -> list[list[Tensor]] | None:
        """The moments of a batch, fp32, where the store has all of them."""
        if self.store is None:
            return None
        found: list[list[Tensor]] = [[] for _ in contents]
        for row, names in zip(found, contents, strict=True):
            for name in names:
                features = self.store.get(name)
                if features is not None:
                    row.append(features["moments"].float())
                elif self.require:
                    raise InputError(
                        f"the cache {self.store.folder} has no entry for {name}; fill it with python -m data_pipeline "
                        'cache, or set cache.fill to "ahead" or "lazy"'
                    )
                else:
                    return None
        return found

    def checks(self, draw: Draw) -> bool:
        """Whether what is read for a draw is compared with its hash."""
        return self.verify == "always" or (self.verify == "first_epoch" and draw.epoch % PHASE_EPOCHS == 0)


def load_pixels(record: IndexedRecord, name: str, size: Size, mirrored: bool = False, verify: bool = False) -> Tensor:
    """A member decoded and resized, (3, H, W) in [-1, 1]."""
    data = view_member(record, name, verify)
    try:
        pixels = to_tensor(decode(data, size), size)
    except InputError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise InputError(
            f"{record.shard}: {name} of record {record.key} does not decode ({error}); it did if the shard was built "
            f"here, so the file was damaged since: build it again; of tars by others, lint names all that do not"
        ) from error
    return pixels.flip(-1) if mirrored else pixels


class ThreadedLoader:
    """The batches of a sampler, each made by a thread while those before it are trained on."""

    def __init__(self, dataset: PlannedDataset, sampler: PlanSampler) -> None:
        self.dataset, self.sampler = dataset, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[ImageBatch]:
        # Simple queues, as taking what is there never gives the interpreter lock to the thread that makes the next.
        ready: SimpleQueue[ImageBatch | BaseException | None] = SimpleQueue()
        wanted: SimpleQueue[None] = SimpleQueue()
        stopped = threading.Event()
        thread = threading.Thread(target=self._produce, args=(ready, wanted, stopped), daemon=True)
        thread.start()
        for _ in range(AHEAD):
            wanted.put(None)
        try:
            while (item := ready.get()) is not None:
                wanted.put(None)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            wanted.put(None)
            thread.join()

    def _produce(
        self,
        ready: SimpleQueue[ImageBatch | BaseException | None],
        wanted: SimpleQueue[None],
        stopped: threading.Event,
    ) -> None:
        if hasattr(os, "SCHED_BATCH"):  # being woken, it then takes no processor from the thread that trains
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        try:
            for planned in self.sampler:
                wanted.get()
                if stopped.is_set():
                    return
                batch = self.dataset[planned]
                ready.put(batch.pin_memory() if torch.cuda.is_available() else batch)
            ready.put(None)
        except BaseException as error:
            ready.put(error)


class TimedLoader:
    """A loader that notes how long it let training wait.

    Attributes:
        waited: seconds, in all.
    """

    def __init__(self, loader: ThreadedLoader | DataLoader[Any]) -> None:
        self.loader, self.waited = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[ImageBatch]:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch


class PlanSampler(DistributedSampler[PlannedBatch]):
    """What `batches` gives from where training stands; `length` is that of the whole run.

    The plan has divided the samples between the ranks; were this no DistributedSampler, a Trainer would do it again.
    """

    def __init__(self, batches: Callable[[], Iterator[PlannedBatch]], length: Callable[[], int]) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self.batches()

    def __len__(self) -> int:
        return self.length()


def single_thread(worker: int) -> None:
    """Decoding processes take one thread each, and leave the others to training."""
    torch.set_num_threads(1)

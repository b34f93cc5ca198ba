"""Shards to a Trainer: the only file here that knows Lightning."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from torch.utils.data import DataLoader

from data_pipeline import scenes
from data_pipeline.batches import ImageBatch
from data_pipeline.cache import Item, LatentCache, build_cache
from data_pipeline.dataset import PlannedDataset, PlanSampler, common_bucket, group, load_pixels, read_prompt
from data_pipeline.errors import InputError
from data_pipeline.index import IndexedRecord, load_index
from data_pipeline.plan import Bucket, Plan, PlannedBatch
from data_pipeline.recipe import Recipe
from data_pipeline.sources import Scenes
from data_pipeline.transforms import check_size

logger = logging.getLogger(__name__)


@dataclass
class SceneShards:
    """Shards of scenes that `fit` builds itself where they are missing."""

    level: int = 1
    count_text_image: int = 8192
    count_edit: int = 16384
    seed: int = 0
    root: str = "data/scenes"

    def recipe(self) -> Recipe:
        """The recipe that builds them."""
        return Recipe(Scenes(self.level, self.count_text_image, self.count_edit, self.seed))

    def folder(self) -> Path:
        """Where they lie: a name for each recipe and each version of the code that draws scenes."""
        digest = hashlib.sha256(self.recipe().fingerprint.encode())
        for file in sorted(Path(scenes.__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return Path(self.root) / f"level{self.level}-{digest.hexdigest()[:12]}"


class ShardDataModule(L.LightningDataModule):
    """Serves text-to-image and edit batches from folders of shards.

    Args:
        shards: folders of shards; their records' kinds tell the tasks.
        scenes: scene shards to build where missing, and to train on.
        ratio: batches of each task in a cycle; a task without a record is an error. By default every task that the
            shards serve, in turn.
        batch_size: samples a batch and rank.
        image_size: pixels of the longer side.
        size_multiple: both sides are multiples of it: autoencoder factor x patch size, 32 as released.
        num_workers: processes that decode; 0 decodes in this one.
        seed: of the order.
        steps: batches of the whole run: optimiser steps x accumulation.
        val_fraction: share of records without a split of their own that is held out, chosen by their keys.
        val_batches: validation batches.
        cache: folder for autoencoder moments computed once before training; None encodes each batch as it comes.
    """

    def __init__(
        self,
        shards: list[str] | None = None,
        scenes: SceneShards | None = None,
        ratio: dict[str, int] | None = None,
        batch_size: int = 32,
        image_size: int = 64,
        size_multiple: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        steps: int = 1000,
        val_fraction: float = 0.02,
        val_batches: int = 8,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        check_size(image_size, size_multiple)
        if not shards and scenes is None:
            raise InputError("there is no data: set data.shards to folders of shards, or data.scenes")
        if batch_size < 1 or steps < 1:
            raise InputError(f"batch_size and steps must be at least 1, got {batch_size} and {steps}")
        self.shards, self.scenes, self.ratio = shards or [], scenes, ratio or {}
        self.batch_size, self.image_size, self.size_multiple = batch_size, image_size, size_multiple
        self.num_workers, self.seed, self.steps = num_workers, seed, steps
        self.val_fraction, self.val_batches, self.cache_root = val_fraction, val_batches, cache
        self.records: list[IndexedRecord] = []
        self._cache: LatentCache | None = None

    def prepare_data(self) -> None:
        """Builds missing scene shards and, where asked for, the latent cache (rank 0)."""
        if self.scenes is not None:
            folder = self.scenes.folder()
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.exists():
                    logger.info("building scene shards in %s", folder)
                    self.scenes.recipe().build(folder)
        if self.cache_root is not None:
            self._load_records()
            self._cache_folder()

    def setup(self, stage: str) -> None:
        """Reads the indexes, splits the records and sorts them into sets."""
        self._load_records()
        if self.cache_root is not None and stage == "fit":
            self._cache = LatentCache(self._cache_folder())

    def _load_records(self) -> None:
        if self.records:
            return
        folders = [Path(folder) for folder in self.shards]
        if self.scenes is not None:
            folders.append(self.scenes.folder())
        records = [record for folder in folders for record in load_index(folder)]
        train = [i for i, record in enumerate(records) if not self._held_out(record)]
        val = [i for i, record in enumerate(records) if self._held_out(record)]
        self.train_sets = group(records, train, self.image_size, self.size_multiple)
        self.val_sets = group(records, val or train, self.image_size, self.size_multiple)
        tasks = {task for task, _ in self.train_sets}
        self.ratio = self.ratio or dict.fromkeys(sorted(tasks), 1)
        missing = [task for task, n in self.ratio.items() if n > 0 and task not in tasks]
        if missing:
            raise InputError(
                f"data.ratio asks for {', '.join(missing)}, but the training records of {', '.join(map(str, folders))} "
                f"only serve {', '.join(sorted(tasks)) or 'nothing'}; add shards or set the ratio to 0"
            )
        self.records = records

    def _held_out(self, record: IndexedRecord) -> bool:
        if record.split:
            return record.split == "val"
        return record.sample_id % 10_000 < self.val_fraction * 10_000

    def _cache_folder(self) -> Path:
        """Builds the cache of all training pictures at their buckets' sizes, or finds it."""
        assert self.cache_root is not None and self.trainer is not None
        pictures: dict[Item, tuple[IndexedRecord, str]] = {}
        for (task, bucket), positions in self.train_sets.items():
            names = ["target" if task == "edit" else "image", *(f"source{i}" for i in range(len(bucket) - 1))]
            for i in positions:
                record = self.records[i]
                for name, size in zip(names, bucket, strict=True):
                    pictures.setdefault((record.members[name].sha256, size), (record, name))
        encoder = self.trainer.lightning_module.latent_encoder()  # type: ignore[operator]
        return build_cache(Path(self.cache_root), encoder, pictures, load_pixels)

    def plan(self) -> Plan:
        """The order of this rank's training batches."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Plan(self.train_sets, self.ratio, self.batch_size, self.seed, rank, world)

    def consumed(self) -> int:
        """Batches trained on so far, not those prefetched: what a checkpoint of this moment has seen."""
        if self.trainer is None:
            return 0
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The plan from where training stands, so that resuming needs no loader state and allows any worker count."""
        sampler = PlanSampler(self.plan(), self.steps, self.consumed)
        return self._loader(PlannedDataset(self.records, self._cache), sampler, self.num_workers)

    def _loader(self, dataset: PlannedDataset, sampler: Any, workers: int) -> DataLoader[ImageBatch]:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            worker_init_fn=single_thread if workers else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else every pass would draw from the global one
        )

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        """Fixed batches of held-out records, tasks in turn."""
        tasks = {task: n for task, n in self.ratio.items() if any(t == task for t, _ in self.val_sets)}
        batches = Plan(self.val_sets, tasks, self.batch_size, self.seed).batches()
        planned = [next(batches) for _ in range(self.val_batches)]
        return self._loader(PlannedDataset(self.records), planned, 0)

    def prompts(self) -> Iterator[str]:
        """The texts that will be trained on, in stored order."""
        for (task, _), positions in self.train_sets.items():
            if self.ratio.get(task, 0) > 0:
                yield from (read_prompt(self.records[i]) for i in positions)

    def first_batches(self) -> Iterator[ImageBatch]:
        """The first training batch of each task."""
        waiting = {task for task, n in self.ratio.items() if n > 0}
        for planned in self.plan().batches():
            if planned.task in waiting:
                waiting.remove(planned.task)
                yield PlannedDataset(self.records, self._cache)[planned]
            if not waiting:
                return

    def sample_batches(self, num_samples: int) -> list[ImageBatch]:
        """For each task the same few held-out records of its commonest bucket, as pixels."""
        batches = []
        for task in sorted(task for task, n in self.ratio.items() if n > 0):
            bucket: Bucket | None = common_bucket(self.val_sets, task)
            if bucket is not None:
                indices = tuple(self.val_sets[task, bucket][:num_samples])
                batches.append(PlannedDataset(self.records)[PlannedBatch(task, bucket, indices, (0,) * len(indices))])
        return batches

    def fingerprint(self) -> str:
        """A hash of everything that decides the order of the samples."""
        order = f"{self.seed}/{sorted(self.ratio.items())}/{self.batch_size}/{self.image_size}/{self.size_multiple}"
        digest = hashlib.sha256(order.encode())
        for (task, bucket), positions in sorted(self.train_sets.items()):
            digest.update(f"{task}{bucket}{[self.records[i].sample_id for i in positions]}".encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position, as consumed batches, and a hash of the order it is a position in."""
        return {"consumed": self.consumed(), "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to resume in another order than the checkpoint's; the position itself comes from the global step."""
        self._load_records()
        if state["fingerprint"] != self.fingerprint():
            raise InputError(
                "the checkpoint was trained on other data, or in another order (shards, seed, ratio, batch_size or "
                "sizes differ); resume with the run's own config.yaml, or start a new run"
            )


def single_thread(worker: int) -> None:
    """Decoding processes take one thread each, and leave the others to training."""
    torch.set_num_threads(1)

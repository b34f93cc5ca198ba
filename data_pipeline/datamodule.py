"""Shards to a Trainer: the only file here that knows Lightning."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from filelock import FileLock
from torch.utils.data import DataLoader

from data_pipeline import options, scenes, serving
from data_pipeline.batches import ImageBatch
from data_pipeline.cache import FeatureStore, check_filled, fill
from data_pipeline.dataset import (
    Augmentation,
    PlannedDataset,
    PlanSampler,
    ThreadedLoader,
    TimedLoader,
    Verify,
    single_thread,
    wanted_features,
)
from data_pipeline.errors import InputError
from data_pipeline.index import SCHEMA, IndexedRecord
from data_pipeline.plan import Bucket, Draw, Plan, PlannedBatch, Stream
from data_pipeline.read_ahead import LocalCopies, prompts
from data_pipeline.recipe import Recipe
from data_pipeline.regroup import Rule
from data_pipeline.serving import ServingIndex
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
    tasks: dict[str, float] | None = None  # share of each GenEval task among the captions
    name: str = ""  # of the set; "" sorts them into the usual ones
    root: str = "data/scenes"

    def recipe(self) -> Recipe:
        """The recipe that builds them."""
        return Recipe(Scenes(self.level, self.count_text_image, self.count_edit, self.seed, self.tasks))

    def folder(self) -> Path:
        """Where they lie."""
        return scene_folder(Path(self.root), f"level{self.level}", self.recipe())

    def build(self) -> None:
        """Builds them where they are missing."""
        build_missing(self.folder(), self.recipe())


def scene_folder(root: Path, prefix: str, recipe: Recipe) -> Path:
    """A name for each recipe, each version of the code that draws scenes, and of an index."""
    digest = hashlib.sha256(f"{recipe.fingerprint}{SCHEMA}".encode())
    for file in sorted(Path(scenes.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return root / f"{prefix}-{digest.hexdigest()[:12]}"


def build_missing(folder: Path, recipe: Recipe) -> None:
    """Builds shards where they are missing, one process for all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            logger.info("building scene shards in %s", folder)
            recipe.build(folder)


@dataclass
class Cache:
    """Where autoencoder moments are kept, and when they are made.

    Attributes:
        folder: of the stores, one an encoder.
        fill: "ahead": all before training; "lazy": each when it is first trained on; "never": all must be there.
    """

    folder: str
    fill: Literal["ahead", "lazy", "never"] = "ahead"


class ShardDataModule(L.LightningDataModule):
    """Serves text-to-image and edit batches from folders of shards.

    Args:
        shards: folders of shards, whose records fall into the sets "text_to_image", "edit", "multi_reference" and
            "multi_turn"; or folders by the names of sets of one's own.
        scenes: scene shards to build where missing, and to train on; one or several.
        ratio: batches of each set in a cycle. By default each set in turn.
        mixing: "alternate": a batch is of one set; "mixed": of all that have its target's shape, by ratio.
        batch_size: samples a batch and rank.
        batch_tokens: instead of `batch_size`, areas of size_multiple x size_multiple pixels, references included.
        image_size: pixels of the longer side; or by the optimiser step that a size begins at: {0: 256, 20000: 512}.
        size_multiple: both sides are multiples of it: autoencoder factor x patch size, 32 as released.
        upscale: enlarge pictures that are smaller than `image_size`; false keeps their own size, in its own bucket.
        num_workers: processes that decode; 0 decodes in a thread of this one.
        seed: of the order.
        steps: batches of the whole run: optimiser steps x accumulation.
        val_fraction: share of records without a split of their own that is held out, chosen by their ids.
        val_batches: validation batches.
        cache: autoencoder moments kept from epoch to epoch; None encodes each batch as it comes, to the same bits.
        augmentation: what is drawn anew each epoch.
        verify: when the hash of each file that is read is compared with the index.
        index_root: where indexes sorted for training are kept.
        remote_copies: where what was read of shards behind URLs is kept, and how much; None keeps nothing.
        prompt_records: serve prompts too, which have no target, as sets "prompt" and "edit_prompt": reinforcement
            samples from them.
        reference_pixels: serve references as pixels too where the cache has their moments: a vision-language model
            reads pixels.
    """

    def __init__(
        self,
        shards: list[str] | dict[str, list[str]] | None = None,
        scenes: SceneShards | list[SceneShards] | None = None,
        ratio: dict[str, float] | None = None,
        mixing: Literal["alternate", "mixed"] = "alternate",
        batch_size: int = 32,
        batch_tokens: int | None = None,
        image_size: int | dict[int, int] = 64,
        size_multiple: int = 32,
        upscale: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        steps: int = 1000,
        val_fraction: float = 0.02,
        val_batches: int = 8,
        cache: Cache | None = None,
        augmentation: Augmentation = Augmentation(),  # noqa: B008
        verify: Verify = "first_epoch",
        index_root: str = "data/index",
        remote_copies: LocalCopies | None = None,
        prompt_records: bool = False,
        reference_pixels: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = dict(sorted(image_size.items())) if isinstance(image_size, dict) else {0: image_size}
        for size in self.sizes.values():
            check_size(size, size_multiple)
        if 0 not in self.sizes:
            raise InputError(f"image_size begins at step {min(self.sizes, default=None)}; expected a size for step 0")
        if not shards and not scenes:
            raise InputError("there is no data: set data.shards to folders of shards, or data.scenes")
        options.check_least(1, batch_size=batch_size, batch_tokens=batch_tokens, steps=steps)
        options.check_least(0, num_workers=num_workers, val_batches=val_batches)
        options.check_held_out(val_fraction)
        options.check_ratio(ratio)
        if prompt_records and mixing == "mixed":
            raise InputError('data.mixing is "mixed", but prompts have no targets to be mixed with; use "alternate"')
        self.shards = shards if isinstance(shards, dict) else {"": shards or []}
        self.scenes = scenes if isinstance(scenes, list) else [scenes] if scenes else []
        self.ratio, self.mixing, self.upscale = ratio, mixing, upscale
        self.batch_size, self.batch_tokens, self.size_multiple = batch_size, batch_tokens, size_multiple
        self.num_workers, self.seed, self.steps, self.verify = num_workers, seed, steps, verify
        self.val_fraction, self.val_batches, self.cache = val_fraction, val_batches, cache
        self.augmentation, self.index_root = augmentation, Path(index_root)
        self.remote_copies, self.prompt_records, self.reference_pixels = remote_copies, prompt_records, reference_pixels
        self.indexes: list[ServingIndex] = []
        self.consumed: list[Plan] = []
        self._store: FeatureStore | None = None
        self._writer: FeatureStore | None = None

    def prepare_data(self) -> None:
        """Builds what is missing: scene shards, the sorted indexes and, where asked for, the cache (rank 0)."""
        for shards in self.scenes:
            shards.build()
        self._load()
        if self.cache is not None and self.cache.fill != "lazy":
            self._fill(FeatureStore.of(self.cache.folder, self._encoder()), self.cache.fill == "ahead")

    def _fill(self, store: FeatureStore, encode: bool) -> None:
        """Encodes what the cache lacks, on the device that trains, or refuses it."""
        flips = self.augmentation.flip > 0
        wanted = wanted_features((found for index in self.indexes for found in self._records(index)), flips)
        if not encode:
            return check_filled(store, (name for name, _ in wanted))
        encoder = self._encoder()
        assert self.trainer is not None
        encoder.to(self.trainer.strategy.root_device)
        total = sum(i.pictures("train", self._trained(i.streams["train"])) for i in self.indexes) * (1 + flips)
        if count := fill(store, encoder, wanted, total):
            logger.info("encoded %d pictures, once, for the cache in %s", count, store.folder)
        encoder.to("cpu")

    def setup(self, stage: str) -> None:
        """Reads the indexes and sorts out what can be trained on."""
        self._load()
        if self.cache is not None and stage == "fit":
            self._store = FeatureStore.of(self.cache.folder, self._encoder())

    def teardown(self, stage: str) -> None:
        """Writes what a lazy cache has not written yet."""
        if self._writer is not None:
            self._writer.commit()

    def _load(self) -> None:
        if self.indexes:
            return
        folders = {name: list(many) for name, many in self.shards.items()}
        for shards in self.scenes:
            folders.setdefault(shards.name, []).append(str(shards.folder()))
        options.check_once(folders)
        for size in self.sizes.values():
            rule = Rule(size, self.size_multiple, self.val_fraction, self.upscale, self.prompt_records)
            self.indexes.append(ServingIndex(serving.build(self.index_root, folders, rule)))
        streams = self.indexes[0].streams["train"]
        if not streams:
            raise InputError(
                f"no record of {', '.join(f for many in folders.values() for f in many)} can be trained on here; "
                f"expected records of text-image pairs or edits{options.selected(folders)}; prompts are for "
                "reinforcement, with data.prompt_records"
            )
        sets = sorted({name for name, _ in streams})
        self.ratio = self.ratio or dict.fromkeys(sets, 1)
        options.tell_of_ratio(self.ratio, sets)
        self.consumed = self.plans()
        for line in sorted({line for plan in self.consumed for line in plan.small()}):
            logger.warning(line)

    def _encoder(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module.latent_encoder()  # type: ignore[operator]

    def _records(self, index: ServingIndex) -> Iterator[tuple[Bucket, IndexedRecord]]:
        """All training records of sets that are trained on, in stored order."""
        return index.records("train", self._trained(index.streams["train"]))

    def samples(self, bucket: Bucket) -> int:
        """Samples of a bucket in a rank's batch."""
        if self.batch_tokens is None:
            return self.batch_size
        return max(1, self.batch_tokens * self.size_multiple**2 // sum(height * width for height, width in bucket))

    def plans(self) -> list[Plan]:
        """The order of this rank's training batches from the beginning, one for each resolution."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        assert self.ratio is not None
        mixed = self.mixing == "mixed"
        return [
            Plan(index.streams["train"], self.ratio, self.samples, self.seed, rank, world, mixed, phase)
            for phase, index in enumerate(self.indexes)
        ]

    def _phase(self, step: int) -> int:
        """Number of the resolution that is trained on at an optimiser step."""
        return sum(start <= step for start in self.sizes) - 1

    def _planned(self) -> Iterator[PlannedBatch]:
        """Batches from where training stands to the end of the run."""
        plans, step, each = self.plans(), 0, 1
        for plan, consumed in zip(plans, self.consumed, strict=True):
            plan.load_state_dict(consumed.state_dict())
        if self.trainer is not None:
            step, each = self.trainer.global_step, self.trainer.accumulate_grad_batches
        for number in range(self.steps - step * each):
            yield next(plans[self._phase(step + number // each)])

    def _length(self) -> int:
        """Batches of the whole run as Lightning counts them: those behind, and those to come."""
        if self.trainer is None:
            return self.steps
        behind = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return behind + self.steps - self.trainer.global_step * self.trainer.accumulate_grad_batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes that a batch is about to be trained on: what a checkpoint holds is never what was only prefetched."""
        if self.trainer is not None and self.trainer.training and isinstance(batch, ImageBatch):
            self.consumed[batch.phase].advance()
        return batch

    def train_dataloader(self) -> TimedLoader:
        """The plan from where training stands, so that resuming needs no loader state and allows any worker count."""
        require = self.cache is not None and self.cache.fill == "never"
        if self.cache is not None and self.cache.fill == "lazy":
            self._writer = self._encoder().store = FeatureStore.of(self.cache.folder, self._encoder())
        dataset = PlannedDataset(
            self.indexes, "train", self._store, self.augmentation, self.verify, require, **self._served()
        )
        sampler = PlanSampler(self._planned, self._length)
        workers = self.num_workers
        return TimedLoader(self._loader(dataset, sampler, workers) if workers else ThreadedLoader(dataset, sampler))

    def _served(self) -> dict[str, Any]:
        """What all datasets of this module are made with."""
        return {"copies": self.remote_copies, "pixels": self.reference_pixels}

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

    def _held_out(self) -> tuple[ServingIndex, str]:
        """The last resolution's index, and the part to validate on: the training records where none is held out."""
        index = self.indexes[-1]
        return index, "val" if self._trained(index.streams["val"]) else "train"

    def _trained(self, streams: Mapping[Stream, int]) -> list[str]:
        """The sets of these streams that are trained on."""
        return sorted({name for name, _ in streams if (self.ratio or {}).get(name, 0) > 0})

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        """Fixed batches of held-out records, sets in turn."""
        index, part = self._held_out()
        streams = index.streams[part]
        ratio = {name: (self.ratio or {})[name] for name in self._trained(streams)}
        plan = Plan(streams, ratio, self.samples, self.seed)
        planned = [next(plan) for _ in range(self.val_batches)]
        dataset = PlannedDataset([index], part, self._store, **self._served())
        return self._loader(dataset, PlanSampler(partial(iter, planned), planned.__len__), 0)

    def prompts(self) -> Iterator[str]:
        """The texts that will be trained on, in stored order."""
        return prompts((record for _, record in self._records(self.indexes[0])), self.remote_copies)

    def first_batches(self) -> Iterator[ImageBatch]:
        """The first training batch of each set."""
        waiting = set(self._trained(self.indexes[0].streams["train"]))
        dataset = PlannedDataset(self.indexes, "train", self._store, self.augmentation, **self._served())
        plan = self.plans()[0]
        while waiting:
            planned = next(plan)
            names = {draw.stream[0] for draw in planned.draws} & waiting
            if names:
                waiting -= names
                yield dataset[planned]

    def sample_batches(self, num_samples: int) -> list[ImageBatch]:
        """For each set the same few held-out records of its commonest bucket, as pixels."""
        index, part = self._held_out()
        batches = []
        for name in self._trained(index.streams[part]):
            counts = {stream: count for stream, count in index.streams[part].items() if stream[0] == name}
            stream = max(counts, key=counts.__getitem__)
            draws = tuple(Draw(stream, i, 0) for i in range(min(num_samples, counts[stream])))
            batches.append(PlannedDataset([index], part, copies=self.remote_copies)[PlannedBatch(draws)])
        return batches

    def content(self) -> str:
        """A hash of which samples are in which streams: what a position is a position in."""
        return hashlib.sha256(repr([index.content for index in self.indexes]).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """How many samples of each stream were trained on, and a hash of the streams; equal on all ranks."""
        return {"content": self.content(), "plans": [plan.state_dict() for plan in self.consumed]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint stood: other ranks, workers, batch sizes and ratios may, other samples may not."""
        self._load()
        if state["content"] != self.content():
            raise InputError(
                "the checkpoint was trained on other samples, or on other sizes of them (shards, selection, "
                "image_size, size_multiple, val_fraction or the names of sets differ); resume with the run's own "
                "config.yaml, or start a new run"
            )
        for plan, saved in zip(self.consumed, state["plans"], strict=True):
            plan.load_state_dict(saved)

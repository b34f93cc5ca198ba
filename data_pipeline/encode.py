"""Fills a cache ahead of training: autoencoder moments of all pictures, and features of all texts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline import options, serving
from data_pipeline.cache import Encoder, FeatureStore, fill
from data_pipeline.dataset import wanted_features
from data_pipeline.errors import InputError
from data_pipeline.index import IndexedRecord
from data_pipeline.plan import Bucket
from data_pipeline.read_ahead import prompts
from data_pipeline.regroup import Rule
from data_pipeline.serving import ServingIndex
from data_pipeline.transforms import check_size


@dataclass
class Encoding:
    """What to encode, and by what.

    Attributes:
        shards: folders of shards.
        output: folder of the cache: `data.cache.folder` and `model.text_cache` of a run.
        pretrained: checkpoint folder of the encoders.
        latents, texts: class paths with `from_pretrained(folder)`, and `precision` beside for texts; "" leaves
            out pictures or texts.
        image_size, size_multiple, upscale: as the run has them.
        mirrored: encode pictures mirrored too, for runs with `augmentation.flip`.
        index_root: as the run has it.
        text_precision: float32 or bfloat16, as the run has its frozen encoders.
        device: what encodes; "auto" is a GPU where there is one.
    """

    shards: Sequence[str]
    output: Path
    pretrained: str
    latents: str
    texts: str
    image_size: int
    size_multiple: int
    mirrored: bool
    index_root: Path
    device: str = "auto"
    text_precision: str = "float32"
    upscale: bool = True

    def run(self) -> str:
        """Encodes what is not there yet, and says how much that was."""
        check_size(self.image_size, self.size_multiple)
        options.check_once({"": self.shards})
        if not (self.latents or self.texts):
            raise InputError('--latents and --texts are both ""; give one of them, or nothing would be encoded')
        if not Path(self.pretrained).is_dir():
            raise InputError(f"--pretrained {self.pretrained} is no folder; give the checkpoint folder of the encoders")
        rule = Rule(self.image_size, self.size_multiple, upscale=self.upscale)
        index = ServingIndex(serving.build(self.index_root, {"": self.shards}, rule))
        pictures = sum(index.pictures(part) for part in index.streams) * (1 + self.mirrored)
        count = sum(sum(streams.values()) for streams in index.streams.values())
        wanted: dict[str, tuple[int, Callable[[], Iterator[tuple[str, Callable[[], Any]]]]]] = {
            self.latents: (pictures, lambda: wanted_features(records(index), self.mirrored)),
            self.texts: (count, lambda: ((text, partial(str, text)) for text in texts(index))),
        }
        device = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(self.device, self.device)
        lines = []
        for path, (total, items) in wanted.items():
            if path:
                settings = {"precision": self.text_precision} if path == self.texts else {}
                encoder = named(path, self.pretrained, **settings)
                store = FeatureStore.of(self.output, encoder)
                encoder.to(device)
                new = fill(store, encoder, items(), total)
                lines.append(f"{path} on {device}: {new:,} new entries in {store.folder}")
        return "\n".join(lines)


def records(index: ServingIndex) -> Iterator[tuple[Bucket, IndexedRecord]]:
    """All records, held-out ones too, with their buckets."""
    return (found for part in index.streams for found in index.records(part))


def texts(index: ServingIndex) -> Iterator[str]:
    """All texts."""
    return prompts(record for _, record in records(index))


def named(path: str, pretrained: str, **settings: str) -> Encoder:
    """An encoder by its class path, from a checkpoint folder."""
    module, _, name = path.rpartition(".")
    try:
        encoder: Encoder = getattr(importlib.import_module(module), name).from_pretrained(pretrained, **settings)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise InputError(
            f"cannot make an encoder of {path} and {pretrained} ({error}); expected the path of a class with "
            "from_pretrained, and a checkpoint folder"
        ) from error
    return encoder

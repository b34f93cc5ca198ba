"""How well text and pictures agree in a joint embedding, and how pleasing a picture is: columns for thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data_pipeline.records import Record
from data_pipeline.steps.columns import column
from data_pipeline.steps.pixels import pixels
from data_pipeline.steps.quality import change_mask, same_size

CAPTIONS = ("source_caption", "target_caption")  # metadata of edits, as UltraEdit and InstructPix2Pix have them


class Embedder(Protocol):
    """A joint embedding of pictures and texts, such as CLIP. `fingerprint` names the weights."""

    fingerprint: str

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 each to unit vectors (N, D), float32."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to unit vectors (N, D), float32."""


@dataclass
class Similarity:
    """Cosines of one embedding; null where a record lacks what is compared.

    Columns, of which `name` is the first part: `clip_text` (a picture and its caption; of an edit the target and
    metadata's target_caption), `clip_image` (an edit's first source and its target), `clip_direction` (the step between
    pictures and the step between captions: Gal et al. 2021, arXiv 2108.00946, equation 2). Thresholds depend on the
    embedding: 0.2, 0.7 and 0.2 are InstructPix2Pix's for CLIP ViT-L/14.
    """

    embedder: Embedder
    batch_size: int = 32
    name: str = "clip"

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        names = (f"{self.name}_{what}" for what in ("text", "image", "direction"))
        return [column(name, pa.float32(), "similarity", self.embedder.fingerprint) for name in names]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A value for every column."""
        pictures = Lookup(self.embedder.images, [i for r in records for i in compared(r).values()], pixels)
        texts = Lookup(self.embedder.texts, [text for r in records for text in captions(r).values()])
        return [self._score(record, pictures, texts) for record in records]

    def _score(self, record: Record, pictures: Lookup, texts: Lookup) -> Mapping[str, Any]:
        image = {name: pictures[picture] for name, picture in compared(record).items()}
        text = {name: texts[words] for name, words in captions(record).items()}
        found: dict[str, float | None] = {"text": None, "image": None, "direction": None}
        if image.keys() >= {"target"} and "target" in text:
            found["text"] = float(image["target"] @ text["target"])
        if image.keys() >= {"source", "target"}:
            found["image"] = float(image["source"] @ image["target"])
            if text.keys() >= {"source", "target"}:
                found["direction"] = cosine(image["target"] - image["source"], text["target"] - text["source"])
        return {f"{self.name}_{what}": value for what, value in found.items()}


class Lookup:
    """Vectors of distinct items, computed in one batch."""

    def __init__(self, embed: Any, items: Sequence[Any], prepare: Any = lambda item: item) -> None:
        self.rows = {item: row for row, item in enumerate(dict.fromkeys(items))}
        self.vectors = embed([prepare(item) for item in self.rows]) if self.rows else np.zeros((0, 1), np.float32)

    def __getitem__(self, item: Any) -> np.ndarray:
        return self.vectors[self.rows[item]]


def compared(record: Record) -> dict[str, Any]:
    """The pictures that are compared, as "source" and "target"."""
    names = {"source": "source0", "target": "target" if record.kind == "edit" else "image"}
    if record.kind not in ("edit", "text_image"):
        return {}
    return {role: record.images[name] for role, name in names.items() if name in record.images}


def captions(record: Record) -> dict[str, str]:
    """The texts that say what a picture shows, by its role; an instruction does not."""
    if record.kind == "text_image":
        return {"target": record.prompt}
    found = {role: record.metadata.get(name) for role, name in zip(("source", "target"), CAPTIONS, strict=True)}
    return {role: text for role, text in found.items() if isinstance(text, str)}


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """The cosine of two vectors (D,); None where one is zero."""
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 else None


class Judge(Protocol):
    """A number for a picture, such as an aesthetic score. `fingerprint` names the weights."""

    fingerprint: str

    def rate(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 each to scores (N,), float32."""


@dataclass
class Aesthetic:
    """Column `aesthetic`, or what `name` says: the rating of the picture to learn; null where a record has none.

    LAION's predictor rates from 1 to 10; ImgEdit keeps above 4.75.
    """

    rater: Judge
    batch_size: int = 32
    name: str = "aesthetic"

    def columns(self) -> list[pa.Field]:
        """Name and type."""
        return [column(self.name, pa.float32(), "aesthetic", self.rater.fingerprint)]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A rating for each record."""
        ratings = Lookup(self.rater.rate, [r["target"] for r in map(compared, records) if "target" in r], pixels)
        found = [compared(record).get("target") for record in records]
        return [{self.name: None if image is None else float(ratings[image])} for image in found]


class Distance(Protocol):
    """How different two pictures look, such as LPIPS. `fingerprint` names the weights."""

    fingerprint: str

    def maps(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pairs of equal size (H, W, 3) uint8 to maps of local distance (H, W), float32, 0 where they look alike."""


@dataclass
class Consistency:
    """Whether an edit leaves alone what it does not change; null for other records.

    Columns, of which `name` is the first part: `distance` (mean perceptual distance of source and target) and
    `distance_outside` (the same over the pixels that the change mask of `data_pipeline.steps.quality` leaves out: drift
    where nothing should move).
    """

    perceptual: Distance
    threshold: int = 16
    batch_size: int = 16
    name: str = "distance"

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        revision = f"{self.perceptual.fingerprint}, threshold {self.threshold}"
        return [column(name, pa.float32(), "consistency", revision) for name in self._names()]

    def _names(self) -> tuple[str, str]:
        return self.name, f"{self.name}_outside"

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A value for every column."""
        edits = {
            i: same_size(*(pixels(r.images[n]) for n in ("source0", "target")))
            for i, r in enumerate(records)
            if r.kind == "edit"
        }
        sources, targets = [pair[0] for pair in edits.values()], [pair[1] for pair in edits.values()]
        maps = dict(zip(edits, self.perceptual.maps(sources, targets) if edits else [], strict=True))
        found: dict[int, tuple[float, float | None]] = {}
        for i, local in maps.items():
            outside = ~change_mask(*edits[i], self.threshold)
            found[i] = float(local.mean()), float(local[outside].mean()) if outside.any() else None
        return [dict(zip(self._names(), found.get(i, (None, None)), strict=True)) for i in range(len(records))]

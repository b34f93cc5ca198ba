"""Rewards that a model gives, which is injected: embeddings, ratings, a vision-language judge."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.records import EditRecord, EncodedImage, TextImageRecord
from data_pipeline.steps.judge import VlmJudge
from data_pipeline.steps.similarity import Embedder, Judge
from lightning_modules.rewards.protocol import Request


def as_arrays(pictures: Tensor | Sequence[Tensor]) -> list[np.ndarray]:
    """(3, H, W) each in [0, 1] to (H, W, 3) uint8."""
    return [(p.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy() for p in pictures]


@dataclass
class Similarity:
    """(1 + cosine) / 2 of joint embeddings: of picture and prompt, or of picture and first source.

    Flow-GRPO's edit demo takes the latter as what is preserved (its `image_similarity`).
    """

    embedder: Embedder
    to: Literal["prompt", "source"] = "prompt"

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        found = self.embedder.images(as_arrays(pictures))
        if self.to == "prompt":
            wanted = self.embedder.texts([request.prompt for request in requests])
        else:
            if not all(request.sources for request in requests):
                raise InputError("Similarity to the source got a prompt without one; keep it to the task edit")
            wanted = self.embedder.images(as_arrays([request.sources[0] for request in requests]))
        return [float(value) for value in (1 + (found * wanted).sum(1)) / 2]


@dataclass
class Aesthetic:
    """A rater's number over `highest` (LAION's aesthetic predictor rates from 0 to 10)."""

    rater: Judge
    highest: float = 10.0

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        return [float(value) / self.highest for value in self.rater.rate(as_arrays(pictures))]


@dataclass
class Judged:
    """A vision-language model behind an OpenAI-compatible endpoint: the geometric mean of what it rates, in [0, 1].

    So VIEScore (Ku et al. 2024, arXiv 2312.14867) joins semantics and quality: one bad dimension cannot be bought back.
    An answer that cannot be used is None.
    """

    judge: VlmJudge

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        records = [self.record(*pair) for pair in zip(as_arrays(pictures), requests, strict=True)]
        return [self.joined(found) for found in self.judge.score(records)]

    def record(self, picture: np.ndarray, request: Request) -> EditRecord | TextImageRecord:
        """What is shown to the judge."""
        if request.sources:
            sources = tuple(encoded(source) for source in as_arrays(request.sources))
            return EditRecord("picture", sources, encoded(picture), request.prompt)
        return TextImageRecord("picture", encoded(picture), request.prompt)

    def joined(self, found: Mapping[str, object]) -> float | None:
        """One number of all dimensions that were asked for; None where there is no answer."""
        note = f"{self.judge.name}_note"
        values = [v for name, v in found.items() if name != note and isinstance(v, float)]
        if found[note] is not None or not values:
            return None
        return float(np.prod([v / self.judge.highest for v in values]) ** (1 / len(values)))


def encoded(picture: np.ndarray) -> EncodedImage:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue(), "png")

"""Remembered text embeddings: the same bits, once."""

from __future__ import annotations

import pytest
import torch
from micro import built

from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.prompts import CHUNK, PromptCache


@pytest.fixture(scope="module")
def pipeline() -> KontextPipeline:
    return KontextPipeline.from_pretrained(built())


def counting(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the encoders are given from now on."""
    sizes: list[int] = []
    encode = cache.pipeline.encode_unique
    monkeypatch.setattr(cache.pipeline, "encode_unique", lambda prompts: sizes.append(len(prompts)) or encode(prompts))
    return sizes


def test_prompts_embedded_ahead_are_looked_up_with_the_same_bits(pipeline, monkeypatch) -> None:
    prompts = [f"a red circle {i % 40}" for i in range(100)]
    ahead, later = PromptCache(pipeline), PromptCache(pipeline)
    ahead.fill(iter(prompts))
    sizes = counting(ahead, monkeypatch)
    sequence, pooled = ahead(prompts[:7])
    assert sizes == []
    expected = later(prompts[:7])
    assert torch.equal(sequence, expected[0]) and torch.equal(pooled, expected[1])


def test_filling_stops_when_memory_is_full(pipeline, monkeypatch) -> None:
    one = sum(part.nbytes for part in PromptCache(pipeline)(["x"]))
    cache = PromptCache(pipeline, max_bytes=CHUNK * 2 * one)
    sizes = counting(cache, monkeypatch)
    cache.fill(f"prompt {i}" for i in range(100 * CHUNK))
    assert sizes == [CHUNK, CHUNK]

"""Remembered text embeddings: the same bits, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from micro import built

from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.encoders import TEXTS, TextEncoder
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
    assert sum(sizes) == 2 * CHUNK and set(sizes) == {TEXTS}


def test_a_folder_keeps_embeddings_from_run_to_run(pipeline, monkeypatch, tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(5)]
    first = PromptCache(pipeline, root=str(tmp_path))
    first.fill(iter(prompts))
    again, expected = PromptCache(pipeline, root=str(tmp_path)), PromptCache(pipeline)(prompts)
    sizes = counting(again, monkeypatch)
    found = again(prompts)
    assert sizes == [] and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again(["a new one"])
    assert sizes == [TEXTS]


def test_other_lengths_and_other_weights_never_share_an_entry(tmp_path: Path) -> None:
    pipeline = KontextPipeline.from_pretrained(built())
    before = TextEncoder(pipeline).fingerprint
    pipeline.limit_t5(pipeline.t5_tokens - 1)
    shorter = TextEncoder(pipeline).fingerprint
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).view(-1)[0] += 1e-3
    assert len({before, shorter, TextEncoder(pipeline).fingerprint}) == 3

"""Byte-level tokenizers: nothing is unknown, phrases are tokens, folders keep both."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from lightning_modules.networks.tokenizers import clip_tokenizer, phrase_tokenizer

CORPUS = [f"a {c} {s} at the {p}" for c in ("red", "blue") for s in ("circle", "square") for p in ("top", "left")] * 20
TEXTS = ["a red circle at the top", "give it medium-dark skin", "Été 日本 🍣\u200d\n\t!", "", "ÿ\x00ÿ"]


@pytest.fixture(scope="module")
def phrases() -> PreTrainedTokenizerFast:
    return phrase_tokenizer(CORPUS, 300, 40, 64)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(text: str, phrases: PreTrainedTokenizerFast) -> None:
    ids = phrases(text).input_ids
    assert ids[-1] == phrases.eos_token_id
    assert phrases.decode(ids[:-1]).strip() == text.strip()


@pytest.mark.parametrize("text", TEXTS)
def test_clip_knows_every_byte(text: str) -> None:
    tokenizer = clip_tokenizer(CORPUS, 600, 64)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    assert tokenizer.eos_token_id not in ids[1:-1]  # its unknown token


def test_frequent_phrases_are_one_token(phrases: PreTrainedTokenizerFast) -> None:
    assert len(phrases("a red circle at the top").input_ids) <= 4
    assert len(phrases("circle red").input_ids) >= 3


def test_folders_keep_them(phrases: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    clip = clip_tokenizer(CORPUS, 600, 7)
    clip.save_pretrained(tmp_path / "clip")
    phrases.save_pretrained(tmp_path / "phrases")
    for saved, loaded in (
        (clip, CLIPTokenizer.from_pretrained(tmp_path / "clip")),
        (phrases, PreTrainedTokenizerFast.from_pretrained(tmp_path / "phrases")),
    ):
        assert saved.model_max_length == loaded.model_max_length
        assert [saved(t).input_ids for t in TEXTS] == [loaded(t).input_ids for t in TEXTS]


def test_a_phrase_is_the_same_token_before_and_after_a_separator() -> None:
    pairs = [f"{first}, {second} and {first}" for first in CORPUS[:8] for second in CORPUS[:8]] * 10
    tokenizer = phrase_tokenizer(pairs, 300, 60, 64, max_words=6)
    texts = ["a red circle at the top", "a blue square at the left", "a red circle at the top"]
    tokens = tokenizer.tokenize(f"{texts[0]}, {texts[1]} and {texts[2]}")
    first, second = tokens.index(","), tokens.index("Ġand")
    assert tokens[:first] == tokens[second + 1 :] == tokenizer.tokenize(texts[0])
    assert tokens[first + 1 : second] == tokenizer.tokenize(texts[1])

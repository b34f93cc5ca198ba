"""Byte-level tokenizers trained on a corpus, in the library's own classes: no text is ever unknown to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SEPARATORS = {",", "Ġand"}  # phrases of their own: what stands on either side can be anything
OPENERS = {"Ġin", "Ġat", "Ġon", "Ġto"}  # a phrase may begin with them and goes on no further back


def clip_tokenizer(corpus: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges inside words.

    Args:
        corpus: texts to learn merges from.
        vocab_size: tokens in all, of which 514 are bytes (alone and at a word's end) and specials.
        max_length: tokens of a padded text, start and end included.
    """
    backend = CLIPTokenizer().backend_tokenizer  # for the class's own normaliser and pre-tokeniser
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 258, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    merges = merges_of(learner)
    tokens = [*alphabet, *(character + WORD_END for character in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def phrase_tokenizer(
    corpus: Sequence[str], words: int, phrases: int, max_length: int, max_words: int = 6
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in two stages, within words and then across them, so that a frequent phrase becomes one token.

    For a short context this matters more than the purity of words (SuperBPE, Liu et al. 2025, arXiv 2503.13423).
    Ends a text with </s> and pads with <pad>, as T5's tokenizer does.

    Args:
        corpus: texts to learn merges from.
        words: vocabulary after the first stage, 258 bytes and specials included.
        phrases: merges of the second stage.
        max_length: tokens of a padded text, the end included.
        max_words: words in the longest phrase.
    """
    first = bpe(corpus, words, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True))
    pieces = [segment for text in corpus for segment in segments(first.encode(text).tokens)]
    # The second stage learns from texts whose characters stand for the first stage's tokens.
    symbols = {token: chr(0xE000 + i) for i, token in enumerate(sorted({token for text in pieces for token in text}))}
    tokens = {symbol: token for token, symbol in symbols.items()}
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + phrases, max_token_length=max_words, show_progress=False, min_frequency=8
    )
    learner.train_from_iterator(("".join(symbols[token] for token in text) for text in pieces), trainer)
    merges = merges_of(first) + [
        ("".join(tokens[s] for s in left), "".join(tokens[s] for s in right)) for left, right in merges_of(learner)
    ]
    vocab = dict(first.get_vocab())
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = first.normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=max_length
    )


def chat_tokenizer(corpus: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE within words that keeps every space, with Qwen2.5-VL's special tokens; pads with id 0.

    Args:
        corpus: texts to learn merges from.
        vocab_size: tokens in all, of which 263 are bytes and specials.
        max_length: tokens of the longest text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(CHAT_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    pad, *others = CHAT_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=CHAT_TOKENS[2],
        additional_special_tokens=others,
        model_max_length=max_length,
    )


def segments(tokens: Sequence[str]) -> list[list[str]]:
    """Runs of tokens within which phrases are learned, so that equal phrases are equal tokens wherever they stand."""
    runs: list[list[str]] = []
    for token in tokens:
        if not runs or token in SEPARATORS | OPENERS or runs[-1][-1] in SEPARATORS:
            runs.append([])
        runs[-1].append(token)
    return runs


def bpe(corpus: Sequence[str], vocab_size: int, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level BPE with <pad> 0 and </s> 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The learned merges, most frequent first."""
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]

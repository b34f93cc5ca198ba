"""Whether the text that a prompt quotes can be read in the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.text import edit_distance
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_modules.networks.loading import load_text_encoder as load_model
from lightning_modules.rewards.models import as_arrays
from lightning_modules.rewards.protocol import Request

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
TURN_END = "<|im_end|>"  # what models of the Qwen family, such as GOT-OCR2, end an answer with


@runtime_checkable
class Reader(Protocol):
    """Reads text."""

    def read(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """All text of each picture, (H, W, 3) uint8."""


@dataclass
class TextRendering:
    """1 - edit distance / length of the text in the prompt's first pair of double quotes, as Flow-GRPO's OCR reward
    (arXiv 2505.05470): letters' case and spaces do not count, and a text that contains the wanted one is worth 1.

    A prompt that quotes nothing has no score.
    """

    reader: Reader

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        found = self.reader.read(as_arrays(pictures))
        return [agreement(request.prompt, text) for request, text in zip(requests, found, strict=True)]


def agreement(prompt: str, read: str) -> float | None:
    """How nearly a text was read, in [0, 1].

    >>> agreement('a sign that says "Open Late"', "0PEN late!")
    0.75
    """
    quoted = QUOTED.search(prompt)
    wanted = plain(quoted[1] or quoted[2]) if quoted else ""
    if not wanted:
        return None
    if wanted in plain(read):
        return 1.0
    distance = int(edit_distance([plain(read)], [wanted], reduction="sum"))
    return 1 - min(distance, len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """Without white space, in small letters."""
    return "".join(text.split()).lower()


@dataclass
class TransformersReader:
    """A reading model of transformers that needs no question: TrOCR (one line of text), GOT-OCR2 (a whole picture).

    Args:
        folder: model and processor, safetensors only.
        device: where it runs.
        max_new_tokens: the longest text.
        batch_size: pictures at a time.
    """

    folder: str
    device: str = "cpu"
    max_new_tokens: int = 128
    batch_size: int = 8

    @cached_property
    def _parts(self) -> tuple[Any, Any, list[int]]:
        model = load_model(AutoModelForImageTextToText, Path(self.folder), None).eval().to(self.device)
        processor = AutoProcessor.from_pretrained(self.folder, local_files_only=True)
        stated, words = model.generation_config.eos_token_id, processor.tokenizer.get_vocab()
        ends = np.ravel(processor.tokenizer.eos_token_id if stated is None else stated).tolist()
        return model, processor, [*ends, *(words[word] for word in (TURN_END,) if word in words)]

    @torch.no_grad()
    def read(self, pictures: Sequence[np.ndarray]) -> list[str]:
        model, processor, ends = self._parts
        texts: list[str] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = list(pictures[start : start + self.batch_size])
            inputs = processor(images=batch, return_tensors="pt").to(self.device)
            tokens = model.generate(
                **inputs, do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0]
            )
            asked = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts += processor.batch_decode(tokens[:, asked:], skip_special_tokens=True)
        return texts

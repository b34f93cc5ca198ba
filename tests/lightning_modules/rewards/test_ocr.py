"""Text in a picture against the text that a prompt quotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    TrOCRConfig,
    TrOCRForCausalLM,
    TrOCRProcessor,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.tokenizers import phrase_tokenizer
from lightning_modules.rewards.ocr import Reader, TextRendering, TransformersReader, agreement
from lightning_modules.rewards.protocol import Request, Reward


@pytest.mark.parametrize(
    ("prompt", "read", "score"),
    [
        ('a sign "Open"', "open", 1),
        ('a sign "OPEN LATE"', "we are o p e n late", 1),  # what contains it
        ('a sign "Open"', "oben", 3 / 4),
        ('a sign "Open"', "opn", 3 / 4),
        ('a sign "Open"', "oopenn"[1:4] + "x", 3 / 4),
        ('a sign "Open"', "", 0),
        ('a sign "Open"', "a very long other text", 0),  # never below
        ("a sign “Open” here", "open", 1),
        ('"first" and "second"', "first", 1),
        ("a sign", "open", None),
        ('a sign ""', "open", None),
        ('a sign " "', "open", None),
        ('a sign "Open', "open", None),
    ],
)
def test_agreement_by_hand(prompt: str, read: str, score: float | None) -> None:
    assert agreement(prompt, read) == (score if score is None else pytest.approx(score))


@dataclass
class Says:
    """Reads the red of the first pixel as a number."""

    def read(self, pictures: Sequence[np.ndarray]) -> list[str]:
        return [str(picture[0, 0, 0]) for picture in pictures]


def test_each_picture_is_compared_with_its_own_prompt() -> None:
    reward = TextRendering(Says())
    assert isinstance(reward, Reward) and isinstance(reward.reader, Reader)
    pictures = torch.zeros(3, 3, 4, 4)
    pictures[1] = 1
    requests = [Request('the number "0"'), Request('the number "254"'), Request("a number")]
    assert reward.score(pictures, requests) == [1, pytest.approx(2 / 3), None]


def test_a_folder_of_transformers_reads_what_the_library_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = phrase_tokenizer(["open late", "closed today"] * 10, 300, 10, 32)
    encoder = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    decoder = TrOCRConfig(
        vocab_size=len(tokenizer), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16
    )
    decoder.is_decoder = decoder.add_cross_attention = True
    model = VisionEncoderDecoderModel(encoder=ViTModel(encoder), decoder=TrOCRForCausalLM(decoder)).eval()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 1
    model.save_pretrained(tmp_path / "model")
    processor = TrOCRProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(tmp_path / "model")
    pictures = [np.random.default_rng(i).integers(0, 255, (20, 60, 3), dtype=np.uint8) for i in range(3)]
    found = TransformersReader(str(tmp_path / "model"), max_new_tokens=6, batch_size=2).read(pictures)
    with torch.no_grad():
        tokens = model.generate(**processor(images=pictures, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert found == tokenizer.batch_decode(tokens, skip_special_tokens=True) and any(found)
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        (tmp_path / "empty").mkdir()
        TransformersReader(str(tmp_path / "empty")).read(pictures)

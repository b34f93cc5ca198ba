"""What reads an edit: instruction, pictures to edit and edited picture to one vector. A vision-language model of
transformers, or a vision tower of timm beside a text encoder, small enough to be trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import timm
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, AutoTokenizer, T5EncoderModel

from lightning_modules.networks.adapters import has_adapters, merged_state
from lightning_modules.networks.loading import CheckpointError, compare_shapes, load_text_encoder, read_json

TOWER, WEIGHTS = "tower.json", "tower.safetensors"
Pictures = Sequence[Sequence[Tensor]]  # of each sample those to edit and then the edited one, (3, h, w) in [0, 1]


@runtime_checkable
class Reader(Protocol):
    """A module that reads edits."""

    width: int

    def prepare(self, instructions: Sequence[str], pictures: Pictures) -> dict[str, Tensor]:
        """Inputs of a batch, on the CPU."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, width)."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes a folder that `from_pretrained` reads."""


class VlmReader(nn.Module):
    """The hidden state of a vision-language model's last token, as in Skywork-VL Reward (arXiv 2505.07263).

    Args:
        model: any such model of transformers, without its language-modelling head.
        processor: its processor, whose chat template places texts and pictures.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.width = model.config.get_text_config().hidden_size

    def prepare(self, instructions: Sequence[str], pictures: Pictures) -> dict[str, Tensor]:
        """The processor's inputs."""
        texts = [self.conversation(*each) for each in zip(instructions, map(len, pictures), strict=True)]
        levels = [[(p.clamp(0, 1) * 255).round().byte().cpu() for p in own] for own in pictures]
        return dict(self.processor(text=texts, images=levels, padding=True, return_tensors="pt"))

    def conversation(self, instruction: str, pictures: int) -> str:
        """What the model reads. The text comes first, so that a causal model sees the pictures in its light."""
        content = [{"type": "text", "text": instruction}, *[{"type": "image"}] * pictures]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b d"]:
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        last = (torch.arange(hidden.shape[1], device=hidden.device) * inputs["attention_mask"]).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]  # wherever the tokenizer pads

    @classmethod
    def from_pretrained(cls, folder: Path) -> VlmReader:
        """A folder of transformers, safetensors only."""
        model = load_text_encoder(AutoModel, folder, None)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if not getattr(processor, "chat_template", None):
            raise CheckpointError(f"{folder} has no chat template; expected a vision-language model tuned to chat")
        return cls(model, processor)

    def save_pretrained(self, folder: Path) -> None:
        """Adapters are merged into the weights that are written."""
        model = self.model
        if has_adapters(model):
            model = type(self.model)(self.model.config)
            model.load_state_dict(merged_state(self.model))
            model.to(self.model.dtype)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


@dataclass
class Tower:
    """A small reader: a vision tower of timm, and a transformer over its places and the text's tokens.

    Attributes:
        name: timm's name of an architecture.
        arguments: of that architecture, in place of its own.
        image_size: side of a picture in pixels; others are resized.
        width: of the transformer.
        layers: its blocks.
        heads: of its attention.
    """

    name: str = "convnext_atto"
    arguments: dict[str, Any] = field(default_factory=lambda: {"depths": [1, 1, 1, 1], "dims": [32, 64, 128, 128]})
    image_size: int = 64
    width: int = 128
    layers: int = 3
    heads: int = 4


class TowerReader(nn.Module):
    """Both pictures stacked on channels, so that each place sees what changed there; the text as a frozen encoder of a
    checkpoint folder has it.

    Args:
        settings: of the tower.
        tokenizer, encoder: of the text, T5's.
    """

    def __init__(self, settings: Tower, tokenizer: Any, encoder: Any) -> None:
        super().__init__()
        self.settings, self.tokenizer, self.encoder = settings, tokenizer, encoder.requires_grad_(False).eval()
        self.width = settings.width
        vision: Any = timm.create_model(
            settings.name, in_chans=6, features_only=True, out_indices=(-1,), **settings.arguments
        )
        self.vision = vision
        (reduction,), (channels,) = vision.feature_info.reduction(), vision.feature_info.channels()
        places = (settings.image_size // reduction) ** 2
        self.places = nn.Parameter(0.5 * torch.randn(1 + places, settings.width))  # the first is of no place
        self.seen, self.text = (nn.Linear(n, settings.width) for n in (channels, encoder.config.d_model))
        block = nn.TransformerEncoderLayer(
            settings.width, settings.heads, 4 * settings.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.joint = nn.TransformerEncoder(block, settings.layers, nn.LayerNorm(settings.width), False)

    def prepare(self, instructions: Sequence[str], pictures: Pictures) -> dict[str, Tensor]:
        """Pictures (B, 6, S, S) in [-1, 1], and tokens."""
        if any(len(own) != 2 for own in pictures):
            raise CheckpointError("a tower reads one picture to edit and the edited one; take a vision-language model")
        side = (self.settings.image_size,) * 2
        stacked = torch.stack([torch.cat([fitted(picture, side) for picture in own]) for own in pictures])
        tokens = self.tokenizer(list(instructions), padding=True, truncation=True, return_tensors="pt")
        return {"pictures": 2 * stacked - 1, **{name: tokens[name] for name in ("input_ids", "attention_mask")}}

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b d"]:
        with torch.no_grad():
            words = self.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        seen = self.seen(self.vision(inputs["pictures"])[0].flatten(2).mT)
        seen = nn.functional.pad(seen, (0, 0, 1, 0)) + self.places
        padded = torch.cat([seen.new_zeros(seen.shape[:2], dtype=torch.bool), inputs["attention_mask"] == 0], dim=1)
        return self.joint(torch.cat([seen, self.text(words)], dim=1), src_key_padding_mask=padded)[:, 0]

    @classmethod
    def drawn(cls, folder: Path, settings: Tower, seed: int) -> TowerReader:
        """Untrained, for the text encoder of a checkpoint folder in the diffusers layout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(settings, *text_parts(folder / "tokenizer_3", folder / "text_encoder_3"))

    @classmethod
    def from_pretrained(cls, folder: Path) -> TowerReader:
        """What `save_pretrained` wrote."""
        settings = Tower(**read_json(folder / TOWER))
        found = cls(settings, *text_parts(folder / "tokenizer", folder / "text_encoder"))
        stored = load_file(folder / WEIGHTS)
        compare_shapes(folder, *({n: tuple(t.shape) for n, t in each.items()} for each in (found.own_state(), stored)))
        found.load_state_dict(stored, strict=False)
        return found

    def own_state(self) -> dict[str, Tensor]:
        """All but the text encoder."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("encoder.")}

    def save_pretrained(self, folder: Path) -> None:
        """Text parts in folders of their own, all else in one file."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.encoder.save_pretrained(folder / "text_encoder")
        (folder / TOWER).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")
        save_file({name: t.detach().cpu().contiguous() for name, t in self.own_state().items()}, folder / WEIGHTS)


def text_parts(tokenizer: Path, encoder: Path) -> tuple[Any, Any]:
    """T5's tokenizer and encoder."""
    return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), load_text_encoder(
        T5EncoderModel, encoder, None
    )


def fitted(picture: Float[Tensor, "3 _ _"], side: tuple[int, int]) -> Float[Tensor, "3 _ _"]:
    """A picture at a size."""
    picture = picture.float()
    if picture.shape[1:] == side:
        return picture
    return nn.functional.interpolate(picture[None], side, mode="bilinear", antialias=True)[0]

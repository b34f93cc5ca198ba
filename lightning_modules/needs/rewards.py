"""Stages that train a reader of edits: a vision-language model with adapters, or a small tower."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from lightning_modules.folders import planned_checkpoint, planned_vlm
from lightning_modules.needs.images import references_of
from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.edit_readers import Tower, TowerReader
from lightning_modules.networks.flops import (
    language_attention_flops,
    language_flops,
    qwen_vision_flops,
)
from lightning_modules.networks.footprint import Load, Needs, Part, counted_flops, kept_bytes
from lightning_modules.networks.loading import read_json
from lightning_modules.networks.outlines import RatedStep, vlm_outline
from lightning_modules.networks.published import QWEN25_VL_7B, config_in, dtype_of
from lightning_modules.networks.vlm import Reading
from lightning_modules.planning import NotCounted, Run

TEXT = 128  # tokens of an instruction in its conversation, assumed
PICTURES = 2  # before the edit and after it


class RewardStage(Protocol):
    """Settings of lightning_modules.edit_reward.EditRewardModule."""

    pretrained: str
    tower: Tower | None
    dimensions: dict[str, str]
    frozen: list[str]
    lora: Lora | None
    gradient_checkpointing: bool


def reward_needs(run: Run, stage: RewardStage) -> Needs:
    """Of a stage."""
    return vlm_needs(run, stage) if stage.tower is None else tower_needs(run, stage, stage.tower)


def edits(run: Run) -> list[str]:
    """The sets that are trained on: those of edits."""
    return [name for name in run.ratio if references_of(name)] or list(run.ratio)


def vlm_needs(run: Run, stage: RewardStage) -> Needs:
    """Of a Qwen2.5-VL whose vision tower is frozen."""
    if stage.lora is None and not {"visual", "visual."} & set(stage.frozen):
        raise NotCounted(
            "plan counts a Qwen2.5-VL whose vision tower is frozen, as lora or visual in frozen leave it; this trains "
            "the tower too, which is possible, and of which what is kept depends on each picture's windows"
        )
    folder = planned_vlm(stage.pretrained)
    config, assumed = config_in(folder, QWEN25_VL_7B)
    reader = vlm_outline(config, Reading(), dtype_of(config), None).model.model
    if stage.lora is not None:
        with torch.device("meta"):
            add_lora(reader, stage.lora, 0)
    else:
        for name, parameter in reader.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(stage.frozen)))
    if stage.gradient_checkpointing:
        reader.activation_checkpointing_enable()
    text, vision = reader.config.get_text_config(), reader.config.vision_config
    patches = round(run.image_size / vision.patch_size / vision.spatial_merge_size) * vision.spatial_merge_size
    tokens = TEXT + PICTURES * patches**2 // vision.spatial_merge_size**2
    step = RatedStep(reader.language_model.train(stage.gradient_checkpointing))
    forward = language_flops(text, tokens)
    flops = forward * (3 if stage.lora is None else 2) + PICTURES * qwen_vision_flops(vision, patches, patches)
    flops += 0 if stage.lora is None else language_attention_flops(text, tokens) - first_flops(text, tokens)
    with torch.device("meta"):
        head = nn.Linear(text.hidden_size, len(stage.dimensions))

    def kept(count: int) -> float:
        return kept_bytes(step, lambda: {"count": count, "tokens": tokens}, run.autocast)

    again = forward if stage.gradient_checkpointing else 0.0
    load = Load(run.batch_size, run.batch_size, flops, kept, again, tokens=tokens)
    named = {"vision tower": reader.visual, "language model": reader.language_model, "head": head}
    parts = tuple(Part(name, tuple(part.parameters())) for name, part in named.items())
    said = [f"instructions of {TEXT} tokens and {PICTURES} pictures are assumed"]
    said += [f"{folder} is not here: Qwen2.5-VL-7B's sizes are assumed"] if assumed else []
    return Needs(parts, dict.fromkeys(edits(run), load), assumed=tuple(said))


def first_flops(config: Any, tokens: int) -> float:
    """FLOPs of one sequence through the first layer's queries, keys and values: no gradient is passed on to tokens."""
    heads = config.num_key_value_heads / config.num_attention_heads
    return 2.0 * tokens * config.hidden_size**2 * (1 + 2 * heads)


def tower_needs(run: Run, stage: RewardStage, tower: Tower) -> Needs:
    """Of a small tower beside a frozen T5."""
    folder = planned_checkpoint(stage.pretrained) / "text_encoder_3"
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_dict(read_json(folder / "config.json")))
        reader = TowerReader(tower, None, encoder)
        head = nn.Linear(reader.width, len(stage.dimensions))
    longest = int(read_json(folder.with_name("tokenizer_3") / "tokenizer_config.json")["model_max_length"])

    def inputs(count: int) -> dict[str, Any]:
        words = torch.zeros(count, longest, dtype=torch.long)
        pictures = torch.empty(count, 6, tower.image_size, tower.image_size)
        return {"inputs": {"pictures": pictures, "input_ids": words, "attention_mask": torch.ones_like(words)}}

    def kept(count: int) -> float:
        return kept_bytes(reader, partial(inputs, count), run.autocast)

    texts = counted_flops(encoder, lambda: {"input_ids": torch.zeros(1, longest, dtype=torch.long)})
    flops = 3 * (counted_flops(reader, partial(inputs, 1)) - texts) - stem_flops(reader)
    load = Load(run.batch_size, run.batch_size, flops, kept)
    frozen, every = set(encoder.parameters()), tuple(reader.parameters())
    parts = (
        Part("tower", tuple(p for p in every if p not in frozen)),
        Part("text encoder", tuple(encoder.parameters())),
        Part("head", tuple(head.parameters())),
    )
    return Needs(parts, dict.fromkeys(edits(run), load))


def stem_flops(reader: TowerReader) -> float:
    """FLOPs of the tower's first layer, which passes no gradient on to the pictures."""
    stem = next(layer for layer in reader.vision.modules() if isinstance(layer, nn.Conv2d))
    return 2.0 * stem.weight.numel() * (reader.settings.image_size // stem.stride[0]) ** 2

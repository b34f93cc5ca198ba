"""Stages that train parts of an R1V on conversations: supervised, and reinforced on answers of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from lightning_modules.folders import planned_r1v
from lightning_modules.networks.flops import language_attention_flops, language_flops, tower_flops
from lightning_modules.networks.footprint import Load, Needs, Part, kept_bytes
from lightning_modules.networks.outlines import TextStep, r1v_outline
from lightning_modules.networks.published import INTERNVIT_6B, QWEN25_32B, config_in, dtype_of
from lightning_modules.networks.r1v import TILING
from lightning_modules.planning import Run

TEXT = 1024  # tokens of a conversation's words, assumed
# Bytes that a logit takes beside what autograd keeps of it, at the widest: two gradients of the loss in float32; for
# the policy's loss three, and the precision of the weights twice.
SUPERVISED, REINFORCED = 8, 16


class ChatStage(Protocol):
    """Settings of lightning_modules.reasoning.R1VModule."""

    folders: tuple[str, str, str | None]
    train_parts: list[Any]
    context: int
    max_tiles: int
    gradient_checkpointing: bool


class AnswerStage(Protocol):
    """Settings of lightning_modules.reasoning_grpo.ReasoningGrpoModule."""

    pretrained: str
    sampling: Any
    algorithm: Any
    train_parts: list[Any]
    context: int
    gradient_checkpointing: bool


def chat_needs(run: Run, stage: ChatStage) -> Needs:
    """Of supervised training: rows as long as the context, a picture of all its tiles in each conversation."""
    vision, language, _ = stage.folders
    tower, missing = config_in(planned_r1v(vision), INTERNVIT_6B)
    words, absent = config_in(planned_r1v(language), QWEN25_32B)
    said = [f"{vision} is not here: InternViT-6B's sizes are assumed"] if missing else []
    said += [f"{language} is not here: Qwen2.5-32B's sizes are assumed"] if absent else []
    model = Outlined.of(tower, words, stage.max_tiles, run, stage.train_parts, stage.gradient_checkpointing)
    length = min(stage.context, model.seen + TEXT)
    each = stage.context // length  # conversations of a row
    said.append(f"conversations of {length} tokens are assumed, in memory rows as long as the context")
    rows = count = run.batch_size
    if run.batch_tokens is not None:
        rows, count = -(-run.batch_tokens // stage.context), max(1, run.batch_tokens // length)
    flops, again = model.trained_flops(stage.context, each)
    beside = float(SUPERVISED * rows * stage.context * model.words.vocab_size)
    kept = partial(model.kept, stage.context, each, stage.context - 1)
    load = Load(count, rows, flops / each, kept, again / each, beside=beside, tokens=length)
    return Needs(model.parts, {"conversations": load}, assumed=tuple(said))


def answer_needs(run: Run, stage: AnswerStage) -> Needs:
    """Of reinforcement: each question and its answers as long as they may be."""
    folder, sampling = planned_r1v(stage.pretrained), stage.sampling
    sampling.share(run.devices)  # a plan that cannot be carried out is none
    config, missing = config_in(folder, {"vision_config": INTERNVIT_6B, "llm_config": QWEN25_32B})
    tiles = int({**TILING, **config}["max_dynamic_patch"]) if not missing else 12
    tower, words = config["vision_config"], config["llm_config"]
    model = Outlined.of(tower, words, tiles, run, stage.train_parts, stage.gradient_checkpointing)
    said = [f"{folder} is not here: InternViT-6B's and Qwen2.5-32B's sizes are assumed"] if missing else []
    said.append(f"questions of {stage.context - sampling.max_new_tokens} tokens and the longest answers are assumed")
    flops, again = model.trained_flops(stage.context, 1)
    forward = model.forward(stage.context) + model.looks(1)
    once = 2 + bool(stage.algorithm.needs_reference)  # written; its log-probabilities, and those of a reference
    together = max(1, sampling.micro_answers // sampling.group_size) * sampling.group_size
    written = stage.context - sampling.max_new_tokens / 2  # tokens behind a new one, on average
    weights = sum(p.nbytes for p in model.step.language.parameters())
    streamed = sampling.max_new_tokens * (weights / together + written * model.token_bytes)
    kept = partial(model.kept, stage.context, 1, sampling.max_new_tokens)
    beside = float(REINFORCED * sampling.micro_answers * sampling.max_new_tokens * model.words.vocab_size)
    load = Load(
        run.batch_size, sampling.micro_answers, flops + once * forward, kept, again, streamed, beside, stage.context
    )
    caches = {f"keys and values of {together} answers": float(together * stage.context * model.token_bytes)}
    samples = sampling.groups * sampling.group_size // sampling.updates
    return Needs(model.parts, {"conversations": load}, samples=samples, meanwhile=caches, assumed=tuple(said))


@dataclass(frozen=True)
class Outlined:
    """An R1V on the meta device.

    Attributes:
        step: through it.
        tower, words: configs of the tower and of the language model.
        tiles: of a picture, its thumbnail included.
        train: the parts that are trained.
        recompute: whether the language model's activations are computed again.
        autocast: whether it trains under autocast.
    """

    step: TextStep
    tower: Any
    words: Any
    tiles: int
    train: list[str]
    recompute: bool
    autocast: bool

    @classmethod
    def of(cls, tower: Any, words: Any, tiles: int, run: Run, train: list[str], recompute: bool) -> Outlined:
        """From configs, which say the precision of frozen weights."""
        dtypes = dtype_of(tower), torch.float32, dtype_of(words)
        vision, projector, language = r1v_outline(tower, words, dtypes, train, recompute)
        step = TextStep(vision, projector, language, 2)
        several = tiles + (tiles > 1)
        own = {"num_hidden_layers": len_of(vision), "intermediate_size": inner_of(vision), "hidden_size": vision.width}
        sizes = {**own, **tower}
        return cls(step, SimpleNamespace(**sizes), language.config, several, train, recompute, run.autocast)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Tower, projector and language model."""
        step = self.step
        named = {"vision tower": step.vision, "projector": step.projector, "language model": step.language}
        return tuple(Part(name, tuple(part.parameters())) for name, part in named.items())

    @property
    def patches(self) -> int:
        """Of a tile."""
        return int(self.tower.image_size // self.tower.patch_size) ** 2

    @property
    def seen(self) -> int:
        """Tokens of a picture."""
        return self.tiles * self.patches // self.step.factor**2

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        words, weights = self.words, next(self.step.language.parameters())
        head = words.hidden_size // words.num_attention_heads
        return int(2 * words.num_hidden_layers * words.num_key_value_heads * head * weights.itemsize)

    def forward(self, length: int) -> float:
        """FLOPs of a row through the language model and its head."""
        return language_flops(self.words, length) + 2.0 * length * self.words.hidden_size * self.words.vocab_size

    def looks(self, pictures: int) -> float:
        """FLOPs of pictures through the tower and the projector."""
        tokens = pictures * self.seen
        projected = sum(2.0 * tokens * p.numel() for p in self.step.projector.parameters() if p.ndim == 2)
        return pictures * self.tower_flops + projected

    @property
    def tower_flops(self) -> float:
        """FLOPs of a picture through the tower."""
        beside = getattr(self.step.vision.model, "num_prefix_tokens", 1)  # InternViT has a class token
        return self.tiles * tower_flops(self.tower, self.patches, beside)

    def trained_flops(self, length: int, pictures: int) -> tuple[float, float]:
        """FLOPs of a row forward and backward, and those of them that are done twice."""
        tower = pictures * self.tower_flops
        behind = 3 if "projector" in self.train else 2 if "vision" in self.train else 1
        found = tower * (3 if "vision" in self.train else 1) + (self.looks(pictures) - tower) * behind
        found += self.forward(length) * (3 if "language" in self.train else 2)
        if "language" not in self.train:
            found += language_attention_flops(self.words, length)
        return found, language_flops(self.words, length) if self.recompute else 0.0

    def kept(self, length: int, pictures: int, learned: int, rows: int) -> float:
        """Bytes that autograd keeps of so many rows, the last `learned` tokens of which the loss is about."""
        tokens = self.patches // self.step.factor**2
        tiles = min(pictures * self.tiles, length // tokens) * rows
        arguments = {"rows": rows, "length": length, "tiles": tiles, "side": self.tower.image_size, "tokens": tokens}
        arguments["learned"] = learned
        return kept_bytes(self.step, lambda: arguments, self.autocast)


def len_of(vision: Any) -> int:
    """Blocks of a tower of timm, whose config does not say."""
    return len(vision.model.blocks) if hasattr(vision.model, "blocks") else 0


def inner_of(vision: Any) -> int:
    """Width of the feed-forward layers of a tower of timm."""
    return int(vision.model.blocks[0].mlp.fc1.out_features) if hasattr(vision.model, "blocks") else 0

"""Pocket parts of R1V: a tiny base language model of scenes in words, from it a substitute that answers briefly and a
reasoner that thinks first, and a substitute of other ancestry. The part that sees is in pocket_tower."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from callbacks.atomic import replace_file
from data_pipeline.scenes.questions import KINDS, Style, asked, checked, draw, in_words, random_question, written
from lightning_modules.losses.tokens import answer_nll, before_learned, token_weights
from lightning_modules.networks.layout import IGNORED, Layout, Sample, packed
from lightning_modules.networks.r1v import IMAGE, IMAGE_END, IMAGE_START, positions, visible
from lightning_modules.pocket_tower import TowerRecipe, build_tower

logger = logging.getLogger(__name__)

POCKET = "pocket/"
KEEP_EVERY = 250  # steps of training, from which an interrupted build goes on
# Where a thing is that is named by colour and shape, and which are of a kind, is learned last, so it is asked more.
PRACTISED = (*KINDS, "look", "look", "relate", "relate", "count", "compare")
END = {"chat": "<|im_end|>", "think": "<|end|>"}
SPECIALS = ["<|pad|>", "<|im_start|>", *END.values(), "<|User|>", "<|Assistant|>", "<think>", "</think>"]
# Qwen's and R1's manners: the second opens the thoughts itself and drops those of earlier turns.
TEMPLATES = {
    "chat": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "think": "{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>"
    "{{ m['content'].split('</think>')[-1] }}<|end|>{% else %}<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
}


@dataclass(frozen=True)
class LanguageRecipe:
    """All that decides the pocket's language models; `rows` of `context` tokens are a batch.

    `chats` is the share of the base's texts that are conversations, as Qwen2.5's own pretraining holds some: the tuned
    models then stay near the base, and near each other.
    """

    seed: int = 0
    level: int = 1
    vocab_size: int = 640
    width: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    context: int = 128
    rows: int = 24
    chats: float = 0.4
    base_steps: int = 4500
    tuned_steps: int = 300
    base_lr: float = 4e-3
    tuned_lr: float = 3e-4

    @property
    def name(self) -> str:
        """The folder's name: another one for other settings, other code that builds the parts and other texts."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        digest.update(Path(__file__).read_bytes())
        rng = random.Random(self.seed)
        for _ in range(50):
            texts = [documents(rng, self.level), *(conversation(rng, self.level, manner) for manner in END)]
            digest.update(repr(texts).encode())
        return f"r1v-language-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Recipe:
    """All that decides the pocket parts of R1V."""

    language: LanguageRecipe = LanguageRecipe()
    tower: TowerRecipe = TowerRecipe()

    def folder(self, part: str, root: Path) -> Path:
        """Where a part lies, beside those of its recipe."""
        return root / (self.tower.name if part == "tower" else self.language.name)


def resolve(path: str, root: Path = Path("pocket"), recipe: Recipe = Recipe()) -> Path:
    """The folder of a part: "pocket/reasoner" is built if it is missing, with what it needs; others are paths."""
    part = path.removeprefix(POCKET)
    if not path.startswith(POCKET) or part not in PARTS:
        return Path(path)
    folder = recipe.folder(part, root)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        build(folder, part, recipe)
    return folder / part


def build(folder: Path, part: str, recipe: Recipe) -> None:
    """Builds a part where it is missing, after those that it needs, in a folder that is renamed once it is whole."""
    if (folder / part).exists():
        return
    needs, make = PARTS[part]
    for needed in needs:
        build(folder, needed, recipe)
    started = time.perf_counter()
    temporary = Path(tempfile.mkdtemp(prefix=f".{part}.", dir=folder))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.language.seed + sorted(PARTS).index(part))
            make(temporary / part, folder, recipe)
        (temporary / part).rename(folder / part)
        kept_of(part, folder).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("pocket %s built in %.0f s", part, time.perf_counter() - started)


def kept_of(part: str, folder: Path) -> Path:
    """What an interrupted build of a part goes on from."""
    return folder / f".{part}.pt"


def documents(rng: random.Random, level: int, count: int = 3) -> list[tuple[str, bool]]:
    """A scene in words, then questions with answers, some of them step by step: (text, whether it is learned)."""
    scene, question = draw(rng, level, "train", PRACTISED)
    pieces = [(in_words(scene, rng) + "\n", False)]
    if rng.random() < 0.2:
        return [*pieces, (f"{asked(question, 'describe')}\n", False), (in_words(scene), True)]
    for number in range(count):
        question = question if number == 0 else random_question(rng, scene, PRACTISED)
        style: Style = rng.choice(("short", "steps"))
        pieces += [(f"{asked(question, style)}\n", False), (written(question, style, scene) + "\n", True)]
    return pieces


def conversation(rng: random.Random, level: int, manner: str) -> list[tuple[str, str]]:
    """A question about a scene in words, and what a model of a manner answers."""
    scene, question = draw(rng, level, "train", PRACTISED)
    if manner == "think":
        told = f"{in_words(scene, rng)}\n{question.text}"
        return [("user", told), ("assistant", written(checked(rng, question), "chain", scene))]
    style: Style = rng.choices(("short", "steps", "describe"), (6, 2, 2))[0]
    return [
        ("user", f"{in_words(scene, rng)}\n{asked(question, style)}"),
        ("assistant", written(question, style, scene)),
    ]


def chat_tokenizer(corpus: Sequence[str], vocab_size: int, manner: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE within words, with the tokens of both manners, so that all models share one vocabulary.

    Texts are cut into words as Qwen2 cuts them: transformers does so whenever it loads a tokenizer beside a Qwen2, and
    a model must be asked in the tokens that it learned from.
    """
    backend, qwen = Tokenizer(models.BPE()), Qwen2Tokenizer().backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    added = [*SPECIALS, IMAGE, IMAGE_START, IMAGE_END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, special_tokens=added, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIALS[0], eos_token=END[manner], clean_up_tokenization_spaces=False
    )
    # Thoughts are written by the model itself, so that their tokens may stand in a text.
    reserved = [t for t in added if t not in ("<think>", "</think>", SPECIALS[0], END[manner])]
    tokenizer.add_special_tokens({"additional_special_tokens": reserved})
    tokenizer.chat_template = TEMPLATES[manner]
    return tokenizer


def build_base(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """The common ancestor."""
    train_base(folder, parts, recipe, recipe.seed)


def build_other_base(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """A model of the same size and data from another random start."""
    train_base(folder, parts, recipe, recipe.seed + 1)


def train_base(folder: Path, parts: Path, recipe: LanguageRecipe, seed: int) -> None:
    """A Qwen2 of its own vocabulary, trained on documents and conversations."""
    rng = random.Random(seed)
    texts = ["".join(text for text, _ in documents(rng, level)) for level in (1, 2) for _ in range(1500)]
    texts += [text for _ in range(500) for _, text in conversation(rng, recipe.level, "think")]
    tokenizer = chat_tokenizer(texts, recipe.vocab_size, "chat")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.width,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    chats = {manner: Layout(in_manner(tokenizer, manner), 1, 1, context=recipe.context) for manner in END}

    def draw_one() -> Sample:
        if rng.random() < recipe.chats:
            manner = rng.choice(list(END))
            return chats[manner].sample(conversation(rng, recipe.level, manner))
        return document(tokenizer, [*documents(rng, recipe.level), (tokenizer.eos_token, True)])

    kept = kept_of(folder.name, parts)
    train_language(model, tokenizer, draw_one, rng, kept, recipe, recipe.base_steps, recipe.base_lr)
    save(folder, model, tokenizer)


def document(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> Sample:
    """Pieces of a text end to end, of which some are learned."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, labels = ids + own, labels + (own if learned else [IGNORED] * len(own))
    return Sample(ids, labels, torch.empty(0))


def in_manner(tokenizer: Any, manner: str) -> Any:
    """The tokenizer with the template and the end of a manner."""
    own = deepcopy(tokenizer)
    own.eos_token, own.chat_template = END[manner], TEMPLATES[manner]
    return own


def build_substitute(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """The base, tuned to answer briefly."""
    tune(folder, parts, "base", "chat", recipe)


def build_other(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """A substitute of other ancestry."""
    tune(folder, parts, "other_base", "chat", recipe)


def build_reasoner(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """The base, tuned to think before it answers."""
    tune(folder, parts, "base", "think", recipe)


def tune(folder: Path, parts: Path, base: str, manner: str, recipe: LanguageRecipe) -> None:
    """All weights of a base but its embeddings, on conversations of a manner."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(parts / base),
        in_manner(AutoTokenizer.from_pretrained(parts / base), manner),
    )
    model.get_input_embeddings().requires_grad_(False)  # what a projector speaks: one language for all who share a base
    model.config.eos_token_id = tokenizer.eos_token_id
    own = Layout(tokenizer, 1, 1, context=recipe.context)
    rng = random.Random(f"{recipe.seed}/{folder.name}")

    def draw_one() -> Sample:
        return own.sample(conversation(rng, recipe.level, manner))

    kept = kept_of(folder.name, parts)
    train_language(model, tokenizer, draw_one, rng, kept, recipe, recipe.tuned_steps, recipe.tuned_lr)
    save(folder, model, tokenizer)


def train_language(
    model: Any,
    tokenizer: Any,
    draw_one: Callable[[], Sample],
    rng: random.Random,
    kept: Path,
    recipe: LanguageRecipe,
    steps: int,
    lr: float,
) -> None:
    """Muon on the matrices inside, AdamW on embeddings and vectors; linear warm-up and decay.

    Samples are drawn with `rng`; every so often all that goes on from there is kept in a file.
    """
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in learned.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in learned.items() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    model.train()
    start = 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        rng.setstate(saved["random"])
    for step in range(start, steps):
        if step > start and step % KEEP_EVERY == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            saved = {"step": step, "model": model.state_dict(), "optimizers": states, "random": rng.getstate()}
            replace_file(kept, partial(torch.save, saved))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1.0, (step + 1) / 50, 1.02 - step / steps)
        batch, tokens = [], 0
        while tokens < recipe.rows * recipe.context:
            batch.append(draw_one())
            tokens += len(batch[-1])
        rows = packed(batch, recipe.context, tokenizer.pad_token_id)
        logits = model(
            input_ids=rows.input_ids,
            attention_mask=visible(rows.attention_mask),
            position_ids=positions(rows.attention_mask),
            use_cache=False,
            logits_to_keep=before_learned(rows.labels),
        ).logits
        weights, _ = token_weights(rows.labels, rows.attention_mask, "token")
        loss = (answer_nll(logits, rows.labels) * weights).sum()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0:
            logger.info("step %d of %d: loss %.3f", step, steps, loss.item())


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """A folder of transformers."""
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def of_language(make: Callable[[Path, Path, LanguageRecipe], None]) -> Callable[[Path, Path, Recipe], None]:
    """What makes a language model, given the recipe of all parts."""
    return lambda folder, parts, recipe: make(folder, parts, recipe.language)


# What each part needs, and what makes it in a folder, given that of the others.
PARTS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path, Recipe], None]]] = {
    "tower": ((), lambda folder, parts, recipe: build_tower(folder, recipe.tower)),
    "base": ((), of_language(build_base)),
    "substitute": (("base",), of_language(build_substitute)),
    "reasoner": (("base",), of_language(build_reasoner)),
    "other_base": ((), of_language(build_other_base)),
    "other": (("other_base",), of_language(build_other)),
}

"""Pocket parts of R1V: a tiny base language model of scenes in words, from it a substitute that answers briefly and a
reasoner that thinks first, a substitute of other ancestry, and a vision tower trained by classification."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data_pipeline import scenes
from data_pipeline.scenes import questions
from data_pipeline.scenes.questions import Style, asked, draw, in_words, random_question, written
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.world import COLOURS, LEVELS, SHAPES, Scene, random_scene
from lightning_modules.losses.tokens import answer_nll, token_weights
from lightning_modules.networks import layout
from lightning_modules.networks.layout import IGNORED, MEAN, STD, Sample, packed
from lightning_modules.networks.r1v import IMAGE, IMAGE_END, IMAGE_START, positions, visible
from lightning_modules.networks.vision import TIMM, make_tower

logger = logging.getLogger(__name__)

POCKET = "pocket/"
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
    """All that decides the pocket parts of R1V."""

    seed: int = 0
    level: int = 1
    vocab_size: int = 640
    width: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    context: int = 128
    rows: int = 24  # of a batch
    base_steps: int = 1500
    tuned_steps: int = 300
    base_lr: float = 4e-3
    tuned_lr: float = 1e-3
    tower_width: int = 64
    tower_depth: int = 2
    tower_steps: int = 1000
    tower_patch: int = 8

    @property
    def name(self) -> str:
        """The folder's name: another one for other settings, and for other code that builds its parts."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for file in (Path(__file__), Path(layout.__file__), Path(questions.__file__), Path(scenes.world.__file__)):
            digest.update(file.read_bytes())
        return f"r1v-{digest.hexdigest()[:12]}"


def resolve(path: str, root: Path = Path("pocket"), recipe: LanguageRecipe = LanguageRecipe()) -> Path:
    """The folder of a part: "pocket/reasoner" is built if it is missing, with what it needs; others are paths."""
    part = path.removeprefix(POCKET)
    if not path.startswith(POCKET) or part not in PARTS:
        return Path(path)
    folder = root / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{recipe.name}.lock"):
        build(folder, part, recipe)
    return folder / part


def build(folder: Path, part: str, recipe: LanguageRecipe) -> None:
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
            torch.manual_seed(recipe.seed + sorted(PARTS).index(part))
            make(temporary / part, folder, recipe)
        (temporary / part).rename(folder / part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("pocket %s built in %.0f s", part, time.perf_counter() - started)


def documents(rng: random.Random, level: int, count: int = 3) -> list[tuple[str, bool]]:
    """A scene in words, then questions with answers, some of them step by step: (text, whether it is learned)."""
    scene, question = draw(rng, level, "train")
    pieces = [(in_words(scene, rng) + "\n", False)]
    if rng.random() < 0.2:
        return [*pieces, (f"{asked(question, 'describe')}\n", False), (in_words(scene), True)]
    for number in range(count):
        question = question if number == 0 else random_question(rng, scene)
        style: Style = rng.choice(("short", "steps"))
        pieces += [(f"{asked(question, style)}\n", False), (written(question, style, scene) + "\n", True)]
    return pieces


def conversation(rng: random.Random, level: int, manner: str) -> list[tuple[str, str]]:
    """A question about a scene in words, and what a model of a manner answers."""
    scene, question = draw(rng, level, "train")
    if manner == "think":
        return [("user", f"{in_words(scene, rng)}\n{question.text}"), ("assistant", written(question, "chain", scene))]
    style: Style = rng.choices(("short", "steps", "describe"), (6, 2, 2))[0]
    return [
        ("user", f"{in_words(scene, rng)}\n{asked(question, style)}"),
        ("assistant", written(question, style, scene)),
    ]


def chat_tokenizer(corpus: Sequence[str], vocab_size: int, manner: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE within words, with the tokens of both manners, so that all models share one vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
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
    train_base(folder, recipe, recipe.seed)


def build_other_base(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """A model of the same size and data from another random start."""
    train_base(folder, recipe, recipe.seed + 1)


def train_base(folder: Path, recipe: LanguageRecipe, seed: int) -> None:
    """A Qwen2 of its own vocabulary, trained on documents."""
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

    def draw_one() -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in [*documents(rng, recipe.level), (tokenizer.eos_token, True)]:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, labels = ids + own, labels + (own if learned else [IGNORED] * len(own))
        return Sample(ids, labels, torch.empty(0))

    train_language(model, tokenizer, forever(draw_one), recipe, recipe.base_steps, recipe.base_lr)
    save(folder, model, tokenizer)


def build_substitute(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """The base, tuned to answer briefly."""
    tune(folder, parts / "base", "chat", recipe)


def build_other(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """A substitute of other ancestry."""
    tune(folder, parts / "other_base", "chat", recipe)


def build_reasoner(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """The base, tuned to think before it answers."""
    tune(folder, parts / "base", "think", recipe)


def tune(folder: Path, base: Path, manner: str, recipe: LanguageRecipe) -> None:
    """All weights of a base, on conversations of a manner."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token, tokenizer.chat_template = END[manner], TEMPLATES[manner]
    model.config.eos_token_id = tokenizer.eos_token_id
    own = layout.Layout(tokenizer, 1, 1, context=recipe.context)
    rng = random.Random(f"{recipe.seed}/{folder.name}")
    batches = forever(lambda: own.sample(conversation(rng, recipe.level, manner)))
    train_language(model, tokenizer, batches, recipe, recipe.tuned_steps, recipe.tuned_lr)
    save(folder, model, tokenizer)


def forever(make: Callable[[], Sample]) -> Iterator[Sample]:
    """What is made, again and again."""
    while True:
        yield make()


def train_language(
    model: Any, tokenizer: Any, samples: Iterator[Sample], recipe: LanguageRecipe, steps: int, lr: float
) -> None:
    """Muon on the matrices inside, AdamW on embeddings and vectors; linear warm-up and decay."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    model.train()
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1.0, (step + 1) / 50, 1.02 - step / steps)
        batch, tokens = [], 0
        while tokens < recipe.rows * recipe.context:
            batch.append(next(samples))
            tokens += len(batch[-1])
        rows = packed(batch, recipe.context, tokenizer.pad_token_id)
        logits = model(
            input_ids=rows.input_ids,
            attention_mask=visible(rows.attention_mask),
            position_ids=positions(rows.attention_mask),
            use_cache=False,
        ).logits
        weights = token_weights(rows.labels, rows.attention_mask, "token")
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


def build_tower(folder: Path, parts: Path, recipe: LanguageRecipe) -> None:
    """A ViT of timm each of whose patches learned what its cell of a scene holds, and its own place; the heads are
    dropped.

    A projector works on each token alone, and a frozen language model binds what it is told by words such as "top
    left": each feature must say both what and where.
    """
    resolution = LEVELS[recipe.level].resolution
    config = {
        "model_type": TIMM,
        "architecture": "vit_tiny_patch16_224",
        "image_size": resolution,
        "patch_size": recipe.tower_patch,
        "hidden_size": recipe.tower_width,
        "arguments": {
            "embed_dim": recipe.tower_width,
            "depth": recipe.tower_depth,
            "num_heads": 4,
            "class_token": False,
        },
    }
    tower = make_tower(config)
    patches = resolution // recipe.tower_patch
    cells, places = cells_of_patches(LEVELS[recipe.level].grid, patches), torch.arange(patches**2)
    what, where = (nn.Linear(recipe.tower_width, n) for n in (1 + len(COLOURS) * len(SHAPES), len(places)))
    learned = [p for part in (tower, what, where) for p in part.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.05)
    rng = random.Random(recipe.seed)
    for step in range(recipe.tower_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 1.02 - step / recipe.tower_steps)
        pictures, wanted = classified(rng, recipe.level, 32)
        seen = tower(pictures).flatten(0, 1)
        loss = nn.functional.cross_entropy(what(seen), wanted[:, cells].flatten())
        loss = loss + nn.functional.cross_entropy(where(seen), places.repeat(len(pictures)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            logger.info("tower step %d of %d: loss %.3f", step, recipe.tower_steps, loss.item())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({n: t.detach().contiguous() for n, t in tower.released_state().items()}, folder / "model.safetensors")


def cells_of_patches(grid: int, patches: int) -> Tensor:
    """The cell that each of patches x patches lies in, in reading order, where a picture has grid x grid cells.

    >>> cells_of_patches(2, 4).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    """
    row = torch.arange(patches) * grid // patches
    return (row[:, None] * grid + row).flatten()


def classified(rng: random.Random, level: int, count: int) -> tuple[Tensor, Tensor]:
    """Training scenes, normalised (N, 3, H, W), and the class of each cell (N, cells): 0 is empty."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng, level, rng.randint(1, LEVELS[level].max_objects))
        if scene.split == "train":
            found.append(scene)
    pixels = torch.stack([torch.from_numpy(render(scene)) for scene in found]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    wanted = torch.zeros(count, LEVELS[level].grid ** 2, dtype=torch.long)
    for number, scene in enumerate(found):
        for o in scene.objects:
            wanted[number, o.cell] = 1 + kinds.index((o.colour, o.shape))
    return (pixels - mean) / std, wanted


PARTS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path, LanguageRecipe], None]]] = {
    "tower": ((), build_tower),
    "base": ((), build_base),
    "substitute": (("base",), build_substitute),
    "reasoner": (("base",), build_reasoner),
    "other_base": ((), build_other_base),
    "other": (("other_base",), build_other),
}

"""The pocket vision-language model: a tiny Qwen2.5-VL that is taught to describe scenes and to answer questions."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from data_pipeline import scenes
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.visual_questions import KINDS, Question, random_question
from lightning_modules import pocket
from lightning_modules.networks import tokenizers
from lightning_modules.networks.tokenizers import CHAT_TOKENS, chat_tokenizer
from lightning_modules.networks.vlm import Vlm

logger = logging.getLogger(__name__)

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (  # Qwen2.5-VL's, without its system turn
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + PICTURE + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How often each kind is asked: those with long answers, and those that need two steps, are learned last.
WEIGHTS = {"describe": 3, "cell": 1, "count": 1, "presence": 1, "after": 4, "fix": 3, "plan": 6}


@dataclass(frozen=True)
class VlmRecipe:
    """All that decides the pocket VLM. Patches of 14, two by two a token, as Qwen's: a cell of a scene is one token."""

    seed: int = 0
    width: int = 96
    layers: int = 3
    heads: int = 3
    key_value_heads: int = 1
    inner: int = 256
    vision_width: int = 64
    vision_layers: int = 2
    vocabulary: int = 600
    context: int = 256
    questions: int = 45000
    level_2: float = 0.1  # share of questions about scenes of level 2
    steps: int = 3000
    batch: int = 64
    lr: float = 4e-3

    @property
    def name(self) -> str:
        """The folder's name: another one for other settings, and for other code that builds it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        code = (Path(__file__), Path(pocket.__file__), Path(tokenizers.__file__), Path(inspect.getfile(Vlm)))
        for file in (*code, *sorted(Path(scenes.__file__).parent.glob("*.py"))):
            digest.update(file.read_bytes())
        return f"vlm-{digest.hexdigest()[:12]}"


def vlm_folder(vlm: str, root: Path = Path("pocket"), recipe: VlmRecipe = VlmRecipe()) -> Path:
    """The folder of a VLM; for "pocket" it is built if it is missing, for anything else the path itself."""
    if vlm != "pocket":
        return Path(vlm)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{recipe.name}.lock"):
        if not (root / recipe.name).exists():
            started = time.perf_counter()
            pocket.publish(root, recipe.name, recipe.seed, partial(build_vlm, recipe=recipe))
            logger.info("pocket vlm built in %.0f s", time.perf_counter() - started)
    return root / recipe.name


def build_vlm(folder: Path, recipe: VlmRecipe) -> None:
    """A tokenizer, a processor and a model, taught on training scenes."""
    rng = random.Random(recipe.seed)
    weights = [WEIGHTS[kind] for kind in KINDS]
    kinds = rng.choices(KINDS, weights, k=recipe.questions)
    questions = [random_question(rng, 1 + (rng.random() < recipe.level_2), "train", kind) for kind in kinds]
    corpus = [f"user\nassistant\nGenerate an image: {q.text} {q.answer}" for q in questions[:4000]]
    tokenizer = chat_tokenizer(corpus + pocket.corpus(pocket.Recipe(), 500), recipe.vocabulary, recipe.context)
    vlm = untrained(tokenizer, recipe)
    if recipe.steps:
        teach(vlm, questions, recipe)
    vlm.save_pretrained(folder)


def untrained(tokenizer: PreTrainedTokenizerFast, recipe: VlmRecipe) -> Vlm:
    """The model at its random initialisation."""
    names = ("vision_start", "vision_end", "image", "video")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(t) for name, t in zip(names, CHAT_TOKENS[3:], strict=True)
    }
    head = recipe.width // recipe.heads
    rows = (head // 2 - head // 8) // 2  # of the pairs of a head, an eighth of it is time, and the rest row and column
    sections = [head // 2 - 2 * rows, rows, rows]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": recipe.width,
            "intermediate_size": recipe.inner,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.key_value_heads,
            "max_position_embeddings": recipe.context,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 0,
            "initializer_range": 0.5 / recipe.width**0.5,
        },
        vision_config={
            "depth": recipe.vision_layers,
            "hidden_size": recipe.vision_width,
            "intermediate_size": 2 * recipe.vision_width,
            "num_heads": 2,
            "out_hidden_size": recipe.width,
            "fullatt_block_indexes": [*range(recipe.vision_layers)],
        },
        tie_word_embeddings=True,
        **ids,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    return Vlm(model, Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE))


def teach(vlm: Vlm, questions: Sequence[Question], recipe: VlmRecipe) -> None:
    """Cross-entropy of the answers. Muon on the layers' matrices, AdamW on all else."""
    examples = [example(vlm, question) for question in questions]
    named = [(name, p) for name, p in vlm.model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    vlm.train()
    for step in range(recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * min(1.0, (step + 1) / 100, 1.02 - step / recipe.steps)
        chosen = torch.randint(len(examples), (recipe.batch,)).tolist()
        loss = answer_loss(vlm, [examples[i] for i in chosen])
        vlm.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 200 == 0:
            logger.info("pocket vlm: step %d of %d, loss %.3f", step, recipe.steps, loss.item())
    vlm.eval()


@dataclass(frozen=True)
class Example:
    """A conversation: ids, the length of what is asked, and the picture's patches with their grid."""

    ids: Tensor
    asked: int
    picture: tuple[Tensor, Tensor] | None


def example(vlm: Vlm, question: Question) -> Example:
    """A question as the model reads it, with its answer behind."""
    picture = None
    if question.scene is not None:
        picture = vlm.patches(torch.from_numpy(render(question.scene)).permute(2, 0, 1) / 127.5 - 1)
    grids = [] if picture is None else [picture[1]]
    asked = vlm.tokens(vlm.conversation(question.text, len(grids)), grids, 0)
    answer = vlm.processor.tokenizer(f"{question.answer}<|im_end|>", return_tensors="pt").input_ids[0]
    return Example(torch.cat([asked, answer]), len(asked), picture)


def answer_loss(vlm: Vlm, batch: Sequence[Example]) -> Tensor:
    """Cross-entropy of the answers' tokens. Padding behind a causal model's sequences changes nothing."""
    longest = max(len(each.ids) for each in batch)
    ids = torch.stack([F.pad(each.ids, (0, longest - len(each.ids))) for each in batch])
    pictures = [each.picture for each in batch if each.picture is not None]
    hidden = vlm.model.model(
        input_ids=ids,
        pixel_values=torch.cat([patches for patches, _ in pictures]) if pictures else None,
        image_grid_thw=torch.stack([grid for _, grid in pictures]) if pictures else None,
        mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(),
        use_cache=False,
    ).last_hidden_state
    at = torch.arange(longest)
    spans = torch.tensor([[each.asked, len(each.ids)] for each in batch])
    answers = (at >= spans[:, :1]) & (at < spans[:, 1:])
    logits = vlm.model.lm_head(hidden[:, :-1][answers[:, 1:]])
    return F.cross_entropy(logits, ids[:, 1:][answers[:, 1:]])

"""Micro parts of R1V: language models and a tower that are barely trained, and shards of questions."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from micro import session_folder

from data_pipeline.recipe import Recipe as DataRecipe
from data_pipeline.sources import SceneQuestions
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.pocket_llm import LanguageRecipe, Recipe, resolve
from lightning_modules.pocket_tower import TowerRecipe

RECIPE = Recipe(
    LanguageRecipe(
        vocab_size=384, width=32, layers=2, heads=2, intermediate=48, base_steps=1, tuned_steps=1, tuned_lr=1e-3, rows=1
    ),
    TowerRecipe(width=16, depth=1, steps=1, patch=16),
)


@functools.cache
def root() -> Path:
    """One folder of parts for the whole test session."""
    return session_folder()


def part(name: str) -> Path:
    """A part, "tower" or "reasoner" say."""
    return resolve(f"pocket/{name}", root(), RECIPE)


def micro_r1v(name: str = "reasoner", seed: int = 0, spread: float = 0.2) -> R1VModel:
    """A model whose matrices are drawn wide, so that its logits depend on all it reads."""
    model = R1VModel.from_parts(part("tower"), part(name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, spread, generator=generator)
    return model.eval()


def question_shards(path: Path, **settings: object) -> Path:
    """Shards of questions about scenes at `path`."""
    source = SceneQuestions(**{"counts": {"short": 24, "chain": 24}, **settings})
    DataRecipe(source, records_per_shard=20).build(path)
    return path

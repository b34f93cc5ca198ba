"""An untrained micro checkpoint folder in the full layout, and micro shards: what the tests run on."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from data_pipeline.recipe import Recipe as DataRecipe
from data_pipeline.sources import Scenes
from lightning_modules import pocket

RECIPE = pocket.Recipe(
    vae_channels=(8, 8, 8),
    latent_channels=2,
    vae_steps=0,
    clip_width=8,
    clip_tokens=6,
    t5_tokens=10,
    text_width=16,
    layers=2,
    heads=2,
    head_dim=8,
    max_positions=8,
)


@functools.cache
def built() -> Path:
    """One folder for the whole test session."""
    return pocket.checkpoint_folder("pocket", Path(tempfile.mkdtemp(prefix="micro-")), RECIPE)


def micro_folder(path: Path) -> Path:
    """A micro checkpoint folder of the test's own at `path`."""
    shutil.copytree(built(), path)
    return path


def micro_shards(path: Path, text_image: int = 48, edit: int = 48, level: int = 1) -> Path:
    """Shards of scenes at `path`."""
    DataRecipe(Scenes(level, text_image, edit, 0), records_per_shard=40).build(path)
    return path

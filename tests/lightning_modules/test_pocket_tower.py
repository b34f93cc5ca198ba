from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.scenes.world import LEVELS, Scene, random_scene
from lightning_modules.networks.r1v import read_tensors
from lightning_modules.networks.vision import make_tower, pixel_unshuffle
from lightning_modules.pocket_tower import TowerRecipe, build_tower, cells_of_patches, classified, training_scenes


def test_patches_lie_in_the_cells_of_their_pixels() -> None:
    cells = cells_of_patches(3, 12).view(12, 12)
    assert torch.equal(
        cells, torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    )
    pictures, wanted = classified(training_scenes(random.Random(0), 1, 4))
    grid, side = LEVELS[1].grid, LEVELS[1].resolution // 8
    plain = (
        pictures.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).std(-1).amax(1).flatten(1) < 1e-6
    )  # patches of one colour
    empty = wanted[:, cells_of_patches(grid, side)] == 0
    assert empty.any() and plain[empty].all() and not plain[~empty].all()


def test_no_scene_that_is_held_out_is_seen() -> None:
    scenes = training_scenes(random.Random(0), 1, 300)
    assert len(scenes) == 300 and {scene.split for scene in scenes} == {"train"}
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}


def held_out_scenes(count: int) -> list[Scene]:
    rng = random.Random(1)
    found = (random_scene(rng, 1, rng.randint(2, 3)) for _ in range(100 * count))
    return [scene for scene in found if scene.split == "val"][:count]


@pytest.mark.slow
def test_each_token_tells_a_linear_probe_what_it_shows_and_where(tmp_path: Path) -> None:
    """Tokens as a projector takes them, of 2 x 2 patches; a class for each cell, colour and shape; held-out scenes."""
    recipe = TowerRecipe()
    torch.manual_seed(0)
    build_tower(tmp_path / "tower", recipe)
    tower = make_tower(json.loads((tmp_path / "tower" / "config.json").read_text()))
    tower.load_released(read_tensors(tmp_path / "tower", ""))
    side = LEVELS[1].resolution // recipe.patch
    cells = cells_of_patches(LEVELS[1].grid, side // 2)

    def seen(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        pictures, wanted = classified(scenes)
        with torch.no_grad():
            tokens = pixel_unshuffle(tower(pictures), (side, side), 2)
        return tokens, 25 * cells + wanted[:, cells]

    learned, classes = seen(training_scenes(random.Random(0), 1, 1024))
    mean, spread = learned.mean((0, 1)), learned.std((0, 1)) + 1e-6
    probe = nn.Linear(learned.shape[2], 100)
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(300):
        rows = torch.randint(len(learned), (128,))
        loss = nn.functional.cross_entropy(
            probe((learned[rows] - mean) / spread).flatten(0, 1), classes[rows].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, wanted = seen(held_out_scenes(256))
    assert len(tokens) == 256
    right = probe((tokens - mean) / spread).argmax(-1) == wanted
    assert right.float().mean() > 0.99

from __future__ import annotations

import random

import torch

from data_pipeline.scenes.world import LEVELS
from lightning_modules.pocket_tower import cells_of_patches, classified, training_scenes


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

"""The pocket folder: whole parts only, its own random state, an autoencoder that keeps scenes exact."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from micro import RECIPE

from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.verifier import read
from data_pipeline.scenes.world import LEVELS, random_scene
from lightning_modules import pocket
from lightning_modules.pipelines import KontextPipeline


def test_a_path_is_left_alone_and_pocket_is_built_once(tmp_path: Path) -> None:
    assert pocket.checkpoint_folder("some/folder") == Path("some/folder")
    state = torch.get_rng_state()
    folder = pocket.checkpoint_folder("pocket", tmp_path, RECIPE)
    assert torch.equal(state, torch.get_rng_state())
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    assert pocket.checkpoint_folder("pocket", tmp_path, RECIPE) == folder
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_equal_recipes_give_equal_weights(tmp_path: Path) -> None:
    folders = [pocket.checkpoint_folder("pocket", tmp_path / name, RECIPE) for name in "ab"]
    for part in ("transformer", "text_encoder", "text_encoder_3", "vae"):
        files = [next((folder / part).glob("*.safetensors")).read_bytes() for folder in folders]
        assert files[0] == files[1], part


def test_a_part_that_failed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, recipe: pocket.Recipe) -> None:
        folder.mkdir()
        raise RuntimeError("power cut")

    monkeypatch.setitem(pocket.PARTS, "vae", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        pocket.checkpoint_folder("pocket", tmp_path, RECIPE)
    folder = tmp_path / RECIPE.name
    assert not (folder / "vae").exists() and not (folder / "model_index.json").exists()
    monkeypatch.undo()
    KontextPipeline.from_pretrained(pocket.checkpoint_folder("pocket", tmp_path, RECIPE))


def test_the_recipe_keeps_its_promises() -> None:
    recipe = pocket.Recipe()
    assert sum(p.numel() for p in pocket.small_vae(recipe).parameters()) <= 1_000_000
    assert recipe.clip_tokens + recipe.t5_tokens <= 40
    assert recipe.latent_channels * recipe.patch_size**2 < recipe.heads * recipe.head_dim  # a velocity fits a token


def held_out(level: int, count: int) -> list:
    rng, scenes = random.Random(9), []
    while len(scenes) < count:
        scene = random_scene(rng, level, rng.randint(2, LEVELS[level].max_objects))
        scenes += [scene] if scene.split == "val" else []
    return scenes


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_the_autoencoder_keeps_held_out_scenes_exact(level: int) -> None:
    folder = pocket.checkpoint_folder("pocket", Path(__file__).parents[2] / "pocket")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    scenes = held_out(level, 256)
    pixels = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        back = vae.decode(posterior.sample(torch.Generator().manual_seed(0))).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((back - pixels) / 2).square().mean((1, 2, 3)))
    pictures = ((back + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    correct = [read(picture, level).scene == scene for picture, scene in zip(pictures, scenes, strict=True)]
    print(f"level {level}: {psnr.mean():.1f} dB, {sum(correct)} of {len(correct)} read back")
    assert psnr.mean() >= 30
    assert all(correct)

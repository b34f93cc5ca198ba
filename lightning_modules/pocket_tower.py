"""The pocket part of R1V that sees: a vision tower trained by classification."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.world import COLOURS, LEVELS, SHAPES, Scene, random_scene
from lightning_modules.networks.layout import MEAN, STD
from lightning_modules.networks.vision import TIMM, make_tower

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerRecipe:
    """All that decides the tower. `patch` is in pixels, `rows` are pictures of a batch."""

    seed: int = 0
    level: int = 1
    patch: int = 8
    width: int = 64
    depth: int = 2
    steps: int = 1000
    rows: int = 32
    lr: float = 2e-3

    @property
    def name(self) -> str:
        """The folder's name: another one for other settings, other code that builds it and other pictures."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        digest.update(Path(__file__).read_bytes())
        for scene in training_scenes(random.Random(self.seed), self.level, 4):
            digest.update(scene.canonical.encode() + render(scene).tobytes())
        return f"r1v-tower-{digest.hexdigest()[:12]}"


def build_tower(folder: Path, recipe: TowerRecipe) -> None:
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
        "patch_size": recipe.patch,
        "hidden_size": recipe.width,
        "arguments": {"embed_dim": recipe.width, "depth": recipe.depth, "num_heads": 4, "class_token": False},
    }
    tower = make_tower(config)
    patches = resolution // recipe.patch
    cells, places = cells_of_patches(LEVELS[recipe.level].grid, patches), torch.arange(patches**2)
    what, where = (nn.Linear(recipe.width, n) for n in (1 + len(COLOURS) * len(SHAPES), len(places)))
    learned = [p for part in (tower, what, where) for p in part.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=0.05)
    rng = random.Random(recipe.seed)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / 50, 1.02 - step / recipe.steps)
        pictures, wanted = classified(training_scenes(rng, recipe.level, recipe.rows))
        seen = tower(pictures).flatten(0, 1)
        loss = nn.functional.cross_entropy(what(seen), wanted[:, cells].flatten())
        loss = loss + nn.functional.cross_entropy(where(seen), places.repeat(len(pictures)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            logger.info("tower step %d of %d: loss %.3f", step, recipe.steps, loss.item())
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


def training_scenes(rng: random.Random, level: int, count: int) -> list[Scene]:
    """Scenes of one object and more, none of them held out."""
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng, level, rng.randint(1, LEVELS[level].max_objects))
        if scene.split == "train":
            found.append(scene)
    return found


def classified(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Pictures of scenes, normalised (N, 3, H, W), and the class of each cell (N, cells): 0 is empty."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pixels = torch.stack([torch.from_numpy(render(scene)) for scene in scenes]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    wanted = torch.zeros(len(scenes), LEVELS[scenes[0].level].grid ** 2, dtype=torch.long)
    for number, scene in enumerate(scenes):
        for o in scene.objects:
            wanted[number, o.cell] = 1 + kinds.index((o.colour, o.shape))
    return (pixels - mean) / std, wanted

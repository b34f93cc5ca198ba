"""The pocket checkpoint folder: real library classes, tiny, built part by part on first use and shared by all runs."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from filelock import FileLock
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from data_pipeline import scenes
from data_pipeline.scenes import random_caption
from data_pipeline.scenes.edits import random_edit
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.world import LEVELS, random_scene
from data_pipeline.shards import atomic_write
from lightning_modules.networks import KontextTransformer, tokenizers
from lightning_modules.networks.tokenizers import clip_tokenizer, phrase_tokenizer

logger = logging.getLogger(__name__)

NEIGHBOURS = (-1, 1, -2, 2)  # the offset that each head of the text encoder attends to


@dataclass(frozen=True)
class Recipe:
    """All that decides the pocket folder."""

    seed: int = 0
    vae_channels: tuple[int, ...] = (16, 32, 32)  # a factor of 4
    latent_channels: int = 2
    vae_steps: int = 1400
    vae_batch: int = 8
    vae_lr: float = 3e-3
    clip_width: int = 32
    clip_tokens: int = 4
    t5_tokens: int = 28  # the longest instructions of level 3
    text_width: int = 128
    layers: int = 4
    heads: int = 4
    head_dim: int = 36
    patch_size: int = 8  # one token a cell of a scene: evidence in noise need not be gathered across tokens
    sample_size: int = 32
    max_positions: int = 4
    scheduler_shift: float = 3.0

    @property
    def name(self) -> str:
        """The folder's name: another one for other settings, and for other code that builds its parts."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for file in (Path(__file__), Path(tokenizers.__file__), *sorted(Path(scenes.__file__).parent.glob("*.py"))):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]


def checkpoint_folder(pretrained: str, root: Path = Path("pocket"), recipe: Recipe = Recipe()) -> Path:
    """The folder of a checkpoint; for "pocket" it is built if it is missing, for anything else the path itself."""
    if pretrained != "pocket":
        return Path(pretrained)
    folder = root / recipe.name
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{recipe.name}.lock"):
        for part, build in PARTS.items():
            if not (folder / part).exists():
                started = time.perf_counter()
                seed = recipe.seed + (part == "text_encoder_2")  # two alike would give each feature twice
                publish(folder, part, seed, partial(build, recipe=recipe))
                logger.info("pocket %s built in %.0f s", part, time.perf_counter() - started)
        index = folder / "model_index.json"
        if not index.exists():
            atomic_write(index, json.dumps(MODEL_INDEX, indent=2).encode())
    return folder


def publish(folder: Path, part: str, seed: int, build: Callable[[Path], None]) -> None:
    """Builds a part in a temporary folder and renames it, so that a part that is there is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{part}.", dir=folder))
    try:
        with torch.random.fork_rng(devices=[]):  # building must not move the run's own random state
            torch.manual_seed(seed)
            build(temporary / part)
        (temporary / part).rename(folder / part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_vae(folder: Path, recipe: Recipe) -> None:
    """An AutoencoderKL trained on scenes of all levels and textured pictures."""
    vae = small_vae(recipe)
    pictures = training_pictures(recipe)
    train_vae(vae, pictures, recipe)
    with torch.no_grad():
        posterior = vae.encode(pictures[:512]).latent_dist
        latents = posterior.mean
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder)


def small_vae(recipe: Recipe) -> AutoencoderKL:
    """The untrained autoencoder, initialised near an orthogonal linear map with little posterior noise."""
    depth = len(recipe.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=LEVELS[1].resolution,
        mid_block_add_attention=False,
    )
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.startswith("quant"):
            if name.endswith("conv2"):  # residual branches start at zero
                for parameter in module.parameters():
                    torch.nn.init.zeros_(parameter)
            else:
                torch.nn.init.orthogonal_(module.weight, 1.2)
    with torch.no_grad():
        vae.quant_conv.weight[recipe.latent_channels :] *= 0.1
        vae.quant_conv.bias[recipe.latent_channels :] = -6.0  # a standard deviation of 0.05
    return vae


def train_vae(vae: AutoencoderKL, pictures: Tensor, recipe: Recipe) -> None:
    """Squared error and a faint KL term; Muon on the kernels reaches in one minute what AdamW does in five."""
    kernels = [p for p in vae.parameters() if p.ndim > 1]
    matrices = [p.detach().view(len(p), -1).requires_grad_() for p in kernels]  # share the kernels' memory
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.vae_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in vae.parameters() if p.ndim == 1], lr=recipe.vae_lr, weight_decay=0.0),
    ]
    for step in range(recipe.vae_steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.vae_lr * min(1.0, (step + 1) / 50, 1.02 - step / recipe.vae_steps)
        x = pictures[torch.randint(len(pictures), (recipe.vae_batch,))]
        posterior = vae.encode(x).latent_dist
        loss = 10 * (vae.decode(posterior.sample()).sample - x).square().mean()
        loss = loss + 1e-5 * 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = kernel.grad.view_as(matrix)
        for optimizer in optimizers:
            optimizer.step()


def training_pictures(recipe: Recipe, count: int = 3500, textures: int = 1000) -> Tensor:
    """Training scenes, their corners of the smallest level's size, and textures: (N, 3, 64, 64) in [-1, 1]."""
    rng, draws, side = random.Random(recipe.seed), np.random.default_rng(recipe.seed), LEVELS[1].resolution
    pictures: list[np.ndarray] = []
    while len(pictures) < count:
        level = rng.choice(sorted(LEVELS))
        scene = random_scene(rng, level, rng.randint(1, LEVELS[level].max_objects))
        if scene.split == "train":
            picture = render(scene)
            top, left = (rng.choice((0, picture.shape[0] - side)) for _ in range(2))  # where convolutions pad
            pictures.append(picture[top : top + side, left : left + side])
    pictures += [texture(draws, side) for _ in range(textures)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def texture(draws: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise of several octaves with random shapes on it, (side, side, 3) uint8."""
    canvas = np.zeros((side, side, 3))
    for octave in (2, 4, 8, 16, 32):
        noise = draws.normal(0, 1, (octave, octave, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((side, side), Image.Resampling.BICUBIC) for c in range(3)]
        canvas += (
            np.stack([np.asarray(layer) for layer in layers], -1)
            * draws.uniform(0, 1.5)
            / octave ** draws.uniform(0.5, 1.2)
        )
    picture = Image.fromarray(np.uint8(np.clip(128 + 90 * canvas + draws.uniform(-90, 90, 3), 0, 255)))
    pen = ImageDraw.Draw(picture)
    for _ in range(draws.integers(0, 8)):
        x, y = (int(v) for v in draws.integers(0, side, 2))
        w, h = (int(v) for v in draws.integers(2, side // 2, 2))
        colour = tuple(int(v) for v in draws.integers(0, 256, 3))
        shape = draws.integers(0, 3)
        if shape == 2:
            pen.line([x, y, x + w, y + h], fill=colour, width=int(draws.integers(1, 4)))
        else:
            (pen.ellipse if shape else pen.rectangle)([x, y, x + w, y + h], fill=colour)
    return np.asarray(picture)


def corpus(recipe: Recipe, texts: int = 2000) -> list[str]:
    """Captions and instructions of all levels, from training scenes."""
    rng = random.Random(recipe.seed)
    captions = [random_caption(rng, level, "train")[1].text for level in sorted(LEVELS) for _ in range(texts)]
    return captions + [random_edit(rng, level, "train").instruction for level in sorted(LEVELS) for _ in range(texts)]


def build_clip_tokenizer(folder: Path, recipe: Recipe) -> None:
    """Byte-level BPE within words."""
    clip_tokenizer(corpus(recipe), 700, recipe.clip_tokens).save_pretrained(folder)


def build_t5_tokenizer(folder: Path, recipe: Recipe) -> None:
    """Byte-level BPE within and across words."""
    phrase_tokenizer(corpus(recipe), 700, 300, recipe.t5_tokens).save_pretrained(folder)


def build_clip(folder: Path, recipe: Recipe) -> None:
    """An untrained CLIP text encoder: random features of the words and their places, which is enough to learn from."""
    config = CLIPTextConfig(
        vocab_size=1024,
        hidden_size=recipe.clip_width,
        intermediate_size=2 * recipe.clip_width,
        projection_dim=recipe.clip_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=recipe.clip_tokens,
        bos_token_id=None,
        eos_token_id=2,  # the class then takes the largest id, which is <|endoftext|> in a vocabulary that ends with it
    )
    encoder = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for table in (m for m in encoder.modules() if isinstance(m, torch.nn.Embedding)):
            table.weight.normal_()
    encoder.save_pretrained(folder)


def build_t5(folder: Path, recipe: Recipe) -> None:
    """An untrained T5 encoder whose heads look at the neighbouring tokens, so that word order reaches the features."""
    config = T5Config(
        vocab_size=1200,
        d_model=recipe.text_width,
        d_kv=recipe.text_width // len(NEIGHBOURS),
        d_ff=2 * recipe.text_width,
        num_layers=1,
        num_heads=len(NEIGHBOURS),
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with torch.no_grad():
        bias.weight.zero_()
        for head, offset in enumerate(NEIGHBOURS):
            # T5 has a bucket for each small distance, those to the right in the upper half.
            bucket = abs(offset) + (config.relative_attention_num_buckets // 2 if offset > 0 else 0)
            bias.weight[bucket, head] = 8.0
    encoder.save_pretrained(folder)


def build_transformer(folder: Path, recipe: Recipe) -> None:
    """The Kontext transformer at its random initialisation."""
    KontextTransformer(
        sample_size=recipe.sample_size,
        patch_size=recipe.patch_size,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        num_layers=recipe.layers,
        attention_head_dim=recipe.head_dim,
        num_attention_heads=recipe.heads,
        joint_attention_dim=recipe.text_width,
        caption_projection_dim=recipe.heads * recipe.head_dim,
        pooled_projection_dim=2 * recipe.clip_width,
        pos_embed_max_size=recipe.max_positions,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    ).save_pretrained(folder)


def build_scheduler(folder: Path, recipe: Recipe) -> None:
    """SD3's Euler scheduler; its shift spends the steps where the layout is decided."""
    FlowMatchEulerDiscreteScheduler(shift=recipe.scheduler_shift).save_pretrained(folder)


PARTS: dict[str, Callable[..., None]] = {
    "scheduler": build_scheduler,
    "tokenizer": build_clip_tokenizer,
    "tokenizer_2": build_clip_tokenizer,
    "tokenizer_3": build_t5_tokenizer,
    "text_encoder": build_clip,
    "text_encoder_2": build_clip,
    "text_encoder_3": build_t5,
    "transformer": build_transformer,
    "vae": build_vae,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}

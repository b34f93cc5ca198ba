"""An untrained micro checkpoint folder in the full layout, micro shards and a micro run: what the tests run on."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from data_pipeline.recipe import Recipe as DataRecipe
from data_pipeline.sources import Repeat, Scenes
from data_pipeline.steps.keep_scores import KeepScores
from data_pipeline.steps.scene_judge import SceneJudge
from lightning_modules import pocket, pocket_vlm
from lightning_modules.networks import Conditioner
from lightning_modules.networks.tokenizers import clip_tokenizer, phrase_tokenizer
from lightning_modules.networks.vlm import Reading
from lightning_modules.pipelines import MetaqueryPipeline
from lightning_modules.pipelines.metaquery import Querying
from lightning_modules.pipelines.sampled_edits import SampledEdits
from lightning_modules.rewards.protocol import Request

RECIPE = pocket.Recipe(
    vae_channels=(8, 8, 8),
    latent_channels=2,
    vae_steps=0,
    clip_width=8,
    clip_tokens=6,
    t5_tokens=14,
    text_width=16,
    layers=2,
    heads=2,
    head_dim=8,
    patch_size=4,
    sample_size=16,
    max_positions=8,
)


def session_folder() -> Path:
    """A folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def built() -> Path:
    """One folder for the whole test session, of which a parent process may say where it is."""
    given = os.environ.get("MICRO_FOLDER")
    return Path(given) if given else pocket.checkpoint_folder("pocket", session_folder(), RECIPE)


def micro_folder(path: Path) -> Path:
    """A micro checkpoint folder of the test's own at `path`."""
    shutil.copytree(built(), path)
    return path


VLM_RECIPE = pocket_vlm.VlmRecipe(
    width=32, layers=2, heads=2, inner=32, vision_width=16, vision_layers=1, vocabulary=400, questions=200, steps=0
)


@functools.cache
def built_vlm() -> Path:
    """One untrained vision-language model for the whole test session."""
    return pocket_vlm.vlm_folder("pocket", session_folder(), VLM_RECIPE)


def micro_metaquery(path: Path, reference: str = "both", **reading: object) -> Path:
    """A Metaquery folder at `path`, with heads that are not zero, so that the queries matter."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = Querying(reference, Reading(**reading))
    torch.manual_seed(0)
    conditioner = Conditioner(sizes, 4, 32, 16, 16, len(settings.reading.layers))
    for head in (conditioner.projector_2, conditioner.projector_3):
        torch.nn.init.normal_(head.weight)
    MetaqueryPipeline.assembled(built(), conditioner, built_vlm(), settings).save_pretrained(path)
    return path


def micro_clip(folder: Path) -> Path:
    """A micro CLIP in transformers' layout."""
    text = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 12}
    text |= {"bos_token_id": None, "eos_token_id": 2}  # the class then takes the largest id, which is <|endoftext|>
    vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**text, **small}, vision_config={**vision, **small}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer(["a red cat", "two dogs"], 300, 12).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def micro_shards(path: Path, text_image: int = 48, edit: int = 48, level: int = 1) -> Path:
    """Shards of scenes at `path`."""
    DataRecipe(Scenes(level, text_image, edit, 0), records_per_shard=40).build(path)
    return path


def judged_shards(path: Path, edits: int = 24, copies: int = 2) -> Path:
    """Shards of edits by an untrained model, with the scene verifier's scores in their metadata."""
    steps = [SampledEdits(str(built()), 64, [1.0], [1]), KeepScores(SceneJudge())]
    DataRecipe(Repeat(Scenes(1, 0, edits, 0), copies), steps, records_per_shard=40).build(path)
    return path


def tiny_vlm(path: Path) -> Path:
    """An untrained Qwen2.5-VL in transformers' layout, whose tokens are 32 x 32 pixels."""
    tokenizer = phrase_tokenizer(["make the red circle blue", "keep everything"] * 10, 300, 10, 128)
    names = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    small = {"hidden_size": 32, "intermediate_size": 32}
    positions = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 128, "rope_parameters": positions, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"depth": 1, "num_heads": 2, "patch_size": 16, "window_size": 64, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, **small},
        vision_config={**vision, **small, "fullatt_block_indexes": [0]},
        **{key: tokenizer.convert_tokens_to_ids(name) for key, name in zip(keys, names, strict=True)},
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    each = "{{ '" + picture + "' if part['type'] == 'image' else part['text'] }}"
    template = f"{{% for turn in messages %}}{{% for part in turn['content'] %}}{each}{{% endfor %}}{{% endfor %}}"
    images = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128})
    video = Qwen2VLVideoProcessor(patch_size=16)
    Qwen2_5_VLProcessor(images, tokenizer, video, chat_template=template).save_pretrained(path)
    return path


def micro_config(folder: Path, **changes: object) -> Path:
    """configs/edit.yaml shrunk to a micro folder, micro shards and a dozen steps, at `folder`/configs/micro.yaml."""
    config = yaml.safe_load((Path(__file__).parents[1] / "configs" / "edit.yaml").read_text())
    config["model"]["init_args"] |= {"pretrained": str(micro_folder(folder / "pretrained")), "compile": False}
    config["model"]["init_args"]["max_sequence_length"] = 8
    data = config["data"]["init_args"]
    data |= {"scenes": None, "shards": [str(micro_shards(folder / "shards"))], "batch_size": 2, "val_batches": 2}
    data |= {"cache": None, "size_multiple": 16, "ratio": {"text_to_image": 3, "edit": 1}}
    config["trainer"] |= {
        "max_steps": 12,
        "precision": "32-true",
        "val_check_interval": 6,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    for entry in config["trainer"]["callbacks"]:
        if "every_n_steps" in entry.get("init_args", {}):
            entry["init_args"]["every_n_steps"] = 3
        if entry["class_path"] == "callbacks.SampleGrid":
            entry["init_args"] |= {"num_samples": 1, "num_inference_steps": 1}
    config["trainer"]["callbacks"].append(
        {"class_path": "micro.Ledger", "init_args": {"file": str(folder / "ledger.jsonl")}}
    )
    config["benchmark"] |= {"count": 2, "num_inference_steps": 1, "guidance_scales": [2.0]}
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = config
        for name in path:
            place = place[name]
        place[last] = value
    target = folder / "configs" / "micro.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(config))
    return target


class Brightness:
    """A reward that any policy can raise: the mean of all pixels."""

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        return pictures.flatten(1).mean(dim=1).tolist()


class Ledger(Callback):
    """Writes each step's samples, loss and a hash of all weights to a file; kills its own process where told to.

    Args:
        file: JSON lines.
        kill_at: optimiser step after which, before its checkpoint, SIGKILL ends the process.
    """

    def __init__(self, file: str, kill_at: int | None = None) -> None:
        self.file, self.kill_at = file, kill_at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        digest = hashlib.sha256()
        for p in pl_module.parameters():
            digest.update(p.detach().numpy().tobytes())
        row = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "ids": batch.sample_ids.tolist(),
            "loss": outputs["loss"].item().hex() if outputs else None,
            "weights": digest.hexdigest(),
        }
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

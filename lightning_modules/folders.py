"""Where a run's models lie: a folder, a pocket part, or a model of the Hugging Face hub, owner/name."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from data_pipeline.errors import InputError
from lightning_modules import pocket, pocket_llm, pocket_vlm
from lightning_modules.networks.loading import CheckpointError

OWN = {"configs", "data", "models", "pocket", "runs", "weights"}  # folders of this project, never a hub's owners
IMAGE_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "conditioner", "vlm")
TEXTS = ["*.json", "*.txt", "*.model", "*.jinja"]
TWICE = ["*.fp16.*", "*.bf16.*"]  # the same weights once more


class NotBuilt(InputError):
    """A pocket part, which fit builds itself."""


def checkpoint_folder(pretrained: str) -> Path:
    """The folder of a checkpoint in the diffusers layout; "pocket" is built and a hub's is downloaded where missing."""
    if pretrained == "pocket":
        return pocket.checkpoint_folder(pretrained)
    return fetched(pretrained, [f"{part}/*.safetensors" for part in IMAGE_PARTS])


def vlm_folder(vlm: str) -> Path:
    """The folder of a vision-language model; "pocket" is built and a hub's is downloaded where missing."""
    return pocket_vlm.vlm_folder(vlm) if vlm == "pocket" else fetched(vlm)


def r1v_folder(name: str) -> Path:
    """The folder of an R1V or of a part of it; pocket parts are built and a hub's are downloaded where missing."""
    return pocket_llm.resolve(name) if is_pocket_part(name) else fetched(name)


def planned_checkpoint(pretrained: str) -> Path:
    """`checkpoint_folder` without building or downloading: the folder need not be there."""
    if pretrained != "pocket":
        return located(pretrained)
    return built(Path("pocket", pocket.Recipe().name), "model_index.json")


def planned_vlm(vlm: str) -> Path:
    """`vlm_folder` without building or downloading."""
    if vlm != "pocket":
        return located(vlm)
    return built(Path("pocket", pocket_vlm.VlmRecipe().name), "config.json")


def planned_r1v(name: str) -> Path:
    """`r1v_folder` without building or downloading."""
    if not is_pocket_part(name):
        return located(name)
    part = name.removeprefix(pocket_llm.POCKET)
    return built(pocket_llm.Recipe().folder(part, Path("pocket")) / part, "config.json")


def is_pocket_part(name: str) -> bool:
    """Whether it is a part of R1V that is built here."""
    return name.startswith(pocket_llm.POCKET) and name.removeprefix(pocket_llm.POCKET) in pocket_llm.PARTS


def built(folder: Path, file: str) -> Path:
    """A pocket part that is whole."""
    if not (folder / file).is_file():
        raise NotBuilt(f"{folder} is not built yet; fit does so when it first needs it, in minutes")
    return folder


def is_hub_id(name: str) -> bool:
    """Whether it can only be owner/name of the hub: no folder, and none of that owner's name is here.

    >>> is_hub_id("Qwen/Qwen2.5-VL-7B-Instruct"), is_hub_id("weights/Qwen2.5-VL-7B-Instruct"), is_hub_id("a/b/c")
    (True, False, False)
    """
    named = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", name)
    return named is not None and named[1] not in OWN and not Path(name).exists() and not Path(named[1]).is_dir()


def located(name: str) -> Path:
    """A folder as it is, or what was downloaded of a hub's model before; a path that is not there if nothing was."""
    if not is_hub_id(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(name)


def fetched(name: str, weights: list[str] | None = None) -> Path:
    """A folder as it is, or a hub's model in the hub's cache, downloaded where it is missing: safetensors only."""
    if not is_hub_id(name):
        return Path(name)
    try:
        return Path(
            snapshot_download(name, allow_patterns=[*TEXTS, *(weights or ["*.safetensors"])], ignore_patterns=TWICE)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name}, and the hub's model of that name cannot be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Download it where there is a network and give "
            f"its folder: hf download {name} --local-dir weights/{Path(name).name} (gated ones: hf auth login first)"
        ) from error

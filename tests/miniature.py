"""Any run's config at micro size: its own settings, on untrained weights, a few samples and one CPU, for two steps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from chains import folder as reasoner_folder
from micro import built, built_vlm, judged_shards, micro_metaquery, micro_shards, session_folder, tiny_vlm
from micro_r1v import part, question_shards

Settings = dict[str, Any]


def miniature(path: Path, folder: Path) -> Settings:
    """The config of `path`; what it writes goes below `folder`."""
    config = yaml.safe_load(path.read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    stage = config["model"]["class_path"].rpartition(".")[2]
    {"R1VModule": answers, "ReasoningGrpoModule": chains, "EditRewardModule": reward}.get(stage, images)(model, folder)
    if "rewards" in model:
        rollouts(model)
    serve(data, model, folder)
    trainer |= {"max_steps": 2, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    accumulated = min(2, trainer.get("accumulate_grad_batches", 1))
    trainer |= {"accumulate_grad_batches": accumulated, "val_check_interval": 2 * accumulated, "log_every_n_steps": 1}
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"] != "callbacks.Probe"]
    for callback in trainer["callbacks"]:
        if callback["class_path"] == "callbacks.SampleGrid":
            callback["init_args"] |= {"num_inference_steps": 1, "num_samples": 1}
    return config | {"benchmark": None}


def images(model: Settings, folder: Path) -> None:
    """Stages that train a transformer, or what feeds it."""
    model |= {"pretrained": str(built()), "compile": False}
    if "max_sequence_length" in model:
        model["max_sequence_length"] = min(model["max_sequence_length"], 14)
    if "text_cache" in model:
        model["text_cache"] = str(folder / "texts")
    if model.get("conditioner"):
        model["conditioner"] = str(metaquery())
    if model.get("vlm"):
        model["vlm"] = str(built_vlm())
    if model.get("connector"):
        model["connector"] |= {"num_queries": 4, "width": 16, "inner": 24, "layers": 2, "heads": 2}
    for teacher in model.get("teachers", {}).values():
        teacher["folder"] = str(built())


def answers(model: Settings, folder: Path) -> None:
    """R1V's supervised stages."""
    language = "substitute" if "substitute" in model["language"] else "reasoner"
    model |= {"vision": str(part("tower")), "language": str(part(language)), "projector": None}
    model |= {"context": min(model["context"], 256), "max_tiles": 1}


def chains(model: Settings, folder: Path) -> None:
    """R1V's reinforcement; a barely trained policy answers nothing rightly, nor comes to an end."""
    model |= {"pretrained": reasoner_folder(), "context": min(model["context"], 256)}
    model["overlong"] = {"cut_off": "learn", "buffer": 0}


def reward(model: Settings, folder: Path) -> None:
    """The learned edit reward, which may read edits with a vision-language model."""
    model["pretrained"] = str(built() if model["tower"] else tiny_vlm(folder / "vlm"))
    model["dimensions"] = {name: f"judge_{name}" for name in ("instruction", "preservation")}


def rollouts(model: Settings) -> None:
    """Rewards that any policy can raise, and the smallest groups."""
    model["advantages"] = {"kind": "group"}
    if "max_new_tokens" in model["sampling"]:
        model["rewards"] = {"vowels": {"reward": {"class_path": "chains.Vowels"}}}
        model["sampling"] |= {"group_size": 2, "groups": 2, "micro_answers": 2, "max_new_tokens": 4}
        return
    model["rewards"] = {"bright": {"reward": {"class_path": "micro.Brightness"}}}
    model["sampling"] |= {"group_size": 2, "groups": 2, "micro_groups": 2, "num_inference_steps": 2}
    if window := model["algorithm"]["init_args"].get("window"):
        window |= {"size": 1, "within": [0, 1]}


def serve(data: Settings, model: Settings, folder: Path) -> None:
    """A few samples, as the config serves them."""
    data |= {"batch_size": 2, "val_batches": min(2, data.get("val_batches", 1)), "num_workers": 0}
    tokens = data.pop("batch_tokens", None)
    if "image_size" not in data:  # conversations
        data["batch_tokens"] = tokens and model["context"]
        if "scenes" in data:
            data["scenes"] |= {"counts": dict.fromkeys(data["scenes"]["counts"], 16), "root": str(folder / "scenes")}
        else:
            data["shards"] = [str(questions())]
        return
    data |= {"index_root": str(folder / "index")}
    if data["image_size"] > 96:
        data |= {"image_size": 64, "size_multiple": 16}
    if data.get("cache"):
        data["cache"] = {"folder": str(folder / "latents")}
    if data.pop("prompt_records", False):
        data["ratio"] = {{"edit_prompt": "edit", "prompt": "text_to_image"}[name]: 1 for name in data["ratio"]}
    scenes = data.get("scenes") or []
    for each in scenes if isinstance(scenes, list) else [scenes]:
        each |= {name: min(each[name], 32) for name in ("count_text_image", "count_edit")}
        each["root"] = str(folder / "scenes")
    if not scenes:
        data["shards"] = [str(judged() if "dimensions" in model else drawn())]


@functools.cache
def root() -> Path:
    """What all tests of a session learn from."""
    return session_folder()


@functools.cache
def drawn() -> Path:
    """Shards of scenes."""
    return micro_shards(root() / "scenes")


@functools.cache
def judged() -> Path:
    """Shards of scored edits."""
    return judged_shards(root() / "judged")


@functools.cache
def questions() -> Path:
    """Shards of questions, with chains that answer them."""
    return question_shards(root() / "questions")


@functools.cache
def metaquery() -> Path:
    """A folder with queries and a connector."""
    return micro_metaquery(root() / "metaquery")

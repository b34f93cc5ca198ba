"""Every run's config: headed by its command, complete, and two steps of it at micro size; full-size ones are made."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from chains import folder as grpo_folder
from lightning import LightningDataModule, LightningModule
from micro import judged_shards, micro_config
from micro_r1v import part

from lightning_modules.cli import CLI
from lightning_modules.experiments import effective, read
from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.adapters import add_lora
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards.answers import Accuracy
from lightning_modules.rollouts.arithmetic import Arithmetic

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FULL_SIZE = sorted((ROOT / "configs" / "sd35m").glob("*.yaml"))
PAPER = [ROOT / "configs" / "pdtr_paper.yaml", ROOT / "configs" / "sd35m" / "pdtr_paper.yaml"]
SD35M = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16,
    "out_channels": 16, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip


def instantiated(path: Path) -> CLI:
    """What a config makes, on one CPU, before anything is loaded."""
    here = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    argv = ["--config", str(path), *(f"--trainer.{name}={value}" for name, value in here.items())]
    subclasses = {"subclass_mode_model": True, "subclass_mode_data": True}
    return CLI(LightningModule, LightningDataModule, **subclasses, run=False, save_config_callback=None, args=argv)


@pytest.mark.parametrize("path", [*CONFIGS, *FULL_SIZE], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_is_headed_by_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python -m lightning_modules.cli fit -c {path.relative_to(ROOT)}")


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
def test_a_full_size_config_fits_its_devices_and_the_model(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    found = instantiated(path)
    assert found.model.steps == config["trainer"]["max_steps"]
    assert found.datamodule.steps == found.model.steps * config["trainer"].get("accumulate_grad_batches", 1)
    if isinstance(found.model, ReinforceModule):
        for devices in (1, config["trainer"]["devices"]):
            cost = replace(found.model.arithmetic, devices=devices, prompts=found.datamodule.batch_size)
            assert cost.micro_batches * cost.sampling.micro_groups * devices == cost.sampling.groups
        with torch.device("meta"):
            transformer = KontextTransformer(**SD35M)
        add_lora(transformer, found.model.lora, 0)
        trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
        # Two matrices for each of eight projections; the last block has none for the text's output.
        assert len(trained) == 2 * (24 * 8 - 1)


def test_the_links_of_r1v_are_runs_that_can_be_made(tmp_path: Path) -> None:
    experiment = read(ROOT / "configs" / "experiments" / "r1v.yaml")
    found = {}
    supervised = ("third_pass", "reassembled", "iteration_3", "other_third_pass", "direct")
    for name in (*supervised, "grpo", "grpo_buffer", "mixed_preference"):
        link = experiment.links[name]
        content = effective(experiment.set, replace(link, config=ROOT / link.config), 3, {})
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        found[name] = instantiated(path)
    iteration = found["iteration_3"].model.iteration
    assert iteration.threshold == 4.0 and isinstance(iteration.verifier, Accuracy)
    assert found["third_pass"].datamodule.minimum == {"score": 4}
    assert found["third_pass"].model.optimizer_settings.lr == pytest.approx(4e-4)
    assert found["reassembled"].model.iteration is None
    assert found["grpo"].model.buffer is None and found["grpo_buffer"].model.buffer.share == 0.5
    assert found["mixed_preference"].model.algorithm.weights == (0.8, 0.2, 1.0)
    assert found["other_third_pass"].model.folders == ("pocket/tower", "pocket/other", None)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.parent.name)
def test_the_preset_is_the_papers(path: Path) -> None:
    """UniPic 2.0 (arXiv 2509.04548), section 4.1."""
    model = instantiated(path).model
    sampling, optimizer = model.sampling, model.optimizer_settings
    assert (sampling.num_inference_steps, sampling.group_size, sampling.groups * sampling.group_size) == (10, 16, 256)
    assert (model.algorithm.sampler, model.algorithm.noise, model.regularisation.latent_kl) == ("flow", 0.7, 0.04)
    assert (model.lora.rank, model.lora.alpha) == (32, 64)
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (3e-4, (0.9, 0.999), 1e-8)
    cost: Arithmetic = replace(model.arithmetic, backward=1)  # where activations are kept
    assert cost.to_sample + cost.to_train == 74


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_takes_two_steps(path: Path, tmp_path: Path) -> None:
    small = yaml.safe_load(micro_config(tmp_path).read_text())
    config = yaml.safe_load(path.read_text())
    model = config["model"]["init_args"]
    changes = {"pretrained": small["model"]["init_args"]["pretrained"], "compile": False}
    model |= {name: value for name, value in changes.items() if name in model}
    for teacher in model.get("teachers", {}).values():
        teacher["folder"] = changes["pretrained"]
    if "ReasoningGrpoModule" in config["model"]["class_path"]:  # a barely trained policy answers nothing rightly
        model["pretrained"] = grpo_folder()
        model["rewards"] = {"vowels": {"reward": {"class_path": "chains.Vowels"}}}
        model["sampling"] |= {"group_size": 2, "groups": 2, "micro_answers": 2, "max_new_tokens": 4}
    elif "rewards" in config["model"]["init_args"]:  # an untrained policy draws no scenes: all would be worth nothing
        config["model"]["init_args"]["rewards"] = {"bright": {"reward": {"class_path": "micro.Brightness"}}}
        config["model"]["init_args"]["sampling"] |= {"group_size": 2, "groups": 2, "micro_groups": 2}
        config["model"]["init_args"]["advantages"] = {"kind": "group"}
    data = small["data"]["init_args"]
    own = config["data"]["init_args"]
    own |= {k: data[k] for k in ("batch_size", "val_batches")}
    if "ChatDataModule" in config["data"]["class_path"]:
        own["scenes"] |= {"counts": dict.fromkeys(own["scenes"]["counts"], 16), "root": str(tmp_path / "scenes")}
        parts = {"vision": str(part("tower")), "language": str(part("reasoner")), "projector": None}
        model |= {name: value for name, value in parts.items() if name in model}
    elif scenes := own.get("scenes"):
        for each in scenes if isinstance(scenes, list) else [scenes]:
            each |= {name: min(each[name], 32) for name in ("count_text_image", "count_edit")}
            each["root"] = str(tmp_path / "scenes")
    else:
        own["shards"] = data["shards"]
    if "dimensions" in model:  # learns from scores, which plain scenes do not have
        config["data"]["init_args"]["shards"] = [str(judged_shards(tmp_path / "judged"))]
    elif "ShardDataModule" in config["data"]["class_path"]:
        config["data"]["init_args"]["cache"] = {"folder": str(tmp_path / "latents")}
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu"}
    config["trainer"]["callbacks"] = [
        c for c in config["trainer"]["callbacks"] if c["class_path"].split(".")[-1] not in ("SampleGrid", "Probe")
    ]
    config["benchmark"] = None
    target = tmp_path / "configs" / path.name
    target.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    argv = [sys.executable, "-m", "lightning_modules.cli", "fit", "-c", str(target)]
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "runs" / path.stem / "latest" / "summary.json").is_file()

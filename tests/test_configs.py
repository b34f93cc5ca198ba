"""Every run's config: headed by its command, complete, two steps of it at micro size; full-size ones are planned."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule
from miniature import miniature

from data_pipeline.recipe import load_recipe
from lightning_modules.ahead import planned
from lightning_modules.cli import CLI, main, outlined
from lightning_modules.experiments import chain, effective, read
from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.adapters import add_lora
from lightning_modules.planning import Plan
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


# One of each kind of stage; the others take as long and say the like.
FIRST = ("edit", "pdtr_edit", "joint", "r1v_sft", "r1v_grpo", "edit_reward")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in FIRST else pytest.mark.slow) for path in FULL_SIZE],
    ids=lambda p: p.stem,
)
def test_a_full_size_config_is_planned_as_its_head_says(path: Path) -> None:
    """On the meta device, without its weights: "# Expected (not measured): 126 GiB and 48.5 samples/s a GPU"."""
    made = outlined(["--config", str(path)])
    head = re.search(r"# Expected \(not measured\): ([\d.]+) GiB and ([\d.]+) samples/s a GPU", path.read_text())
    plan = Plan(planned(made))
    assert head is not None and plan.needs.assumed and plan.peak < plan.machine.memory * 2**30
    assert float(head[1]) == pytest.approx(plan.peak / 2**30, abs=1)
    assert float(head[2]) == pytest.approx(plan.step_samples / plan.run.devices / plan.seconds, rel=0.02)


@pytest.mark.parametrize("path", [*CONFIGS, *FULL_SIZE], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_takes_two_steps_at_micro_size(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / path.relative_to(ROOT)
    target.parent.mkdir(parents=True)
    target.write_text(yaml.safe_dump(miniature(path, tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli"])
    assert main(["fit", "-c", str(target)]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / path.relative_to(ROOT / "configs").with_suffix("") / "latest"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    model = yaml.safe_load(target.read_text())["model"]["init_args"]
    if "dimensions" not in model:
        assert (run / "export" / "lora").is_dir() == (model.get("lora") is not None)


@pytest.mark.parametrize("name", ["r1v_projector", "r1v_sft"])
def test_every_pass_of_r1v_at_full_size_warms_up_for_three_percent(name: str) -> None:
    """Published (arXiv 2504.05599): 3 % and batches of 512, of 2 million, 200,000 and 40,000 conversations."""
    text = (ROOT / "configs" / "sd35m" / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    own = config["trainer"]["max_steps"], config["model"]["init_args"]["optimizer"]["warmup_steps"]
    told = re.findall(r"max_steps (\d+) --model\.init_args\.optimizer\.warmup_steps (\d+)", text)
    passes = [own, *((int(steps), int(warmup)) for steps, warmup in told)]
    assert [warmup for _, warmup in passes] == [round(0.03 * steps) for steps, _ in passes]
    plan = Plan(planned(outlined(["--config", str(ROOT / "configs" / "sd35m" / f"{name}.yaml")])))
    assert plan.step_samples == pytest.approx(512, rel=0.02)
    wanted = [2_000_000, 200_000, 40_000] if name == "r1v_projector" else [2_000_000]
    assert [steps * plan.step_samples for steps, _ in passes] == pytest.approx(wanted, rel=0.01)


def test_an_iteration_of_r1v_at_full_size_is_what_its_head_says(tmp_path: Path) -> None:
    path = ROOT / "configs" / "sd35m" / "r1v_sft.yaml"
    head = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    [said] = re.findall(r'--model\.init_args\.iteration "([^"]+)"', head)
    argv = ["--config", str(path), "--model.init_args.iteration", said.replace("TAU", "3")]
    made = outlined([*argv, "--model.init_args.optimizer.lr", "2.0e-5"]).model
    assert (made.iteration.threshold, made.iteration.score) == (3.0, "score")
    assert made.wanted() == (("score",), ("answer",), True)


def test_the_links_of_r1v_are_runs_that_can_be_made(tmp_path: Path) -> None:
    experiment, second = (read(ROOT / "configs" / "experiments" / f"{name}.yaml") for name in ("r1v", "r1v2"))
    found = {}
    supervised = ("third_pass", "reassembled", "iteration_3", "other_third_pass", "direct", "direct_of_80")
    for name in (*supervised, "grpo", "grpo_buffer", "mixed_preference"):
        link = experiment.links.get(name) or second.links[name]
        content = effective(experiment.set, replace(link, config=ROOT / link.config), 3, {})
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        found[name] = instantiated(path)
    iteration = found["iteration_3"].model.iteration
    assert iteration.threshold == 4.0 and isinstance(iteration.verifier, Accuracy)
    assert found["third_pass"].datamodule.minimum == {"score": 4}
    assert found["third_pass"].model.optimizer_settings.lr == pytest.approx(4e-4)
    assert found["reassembled"].model.iteration is None and found["direct_of_80"].trainer.max_steps == 80
    assert found["direct_of_80"].model.folders[2] is None
    assert found["grpo"].model.buffer is None and found["grpo_buffer"].model.buffer.share == 0.5
    assert found["mixed_preference"].model.algorithm.weights == (0.8, 0.2, 1.0)
    assert found["other_third_pass"].model.folders == ("pocket/tower", "pocket/other", None)


def test_a_round_of_r1v_makes_what_its_run_learns_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions as without a round, and the model before it as the generator."""
    monkeypatch.chdir(ROOT)
    experiment = read(Path("configs/experiments/r1v.yaml"))
    *_, reassembled, run, first, second = chain(experiment, "r1v", "AL-CoTD, iteration 2", 0)
    plain = instantiated(ROOT / "configs" / "r1v_sft.yaml").datamodule.scenes[0].recipe().source
    path = tmp_path / "run.yaml"
    for link, before, last in (("stage_1", reassembled, run), ("iteration_2", first, second)):
        path.write_text(yaml.safe_dump(last.content, sort_keys=False))
        made = instantiated(path)
        [folder] = made.datamodule.shards
        assert folder.startswith(f"runs/rounds/experiments/r1v/{link}_distilled/") and not made.datamodule.scenes
        assert made.model.folders[2] == str(before.version / "export")
        path.write_text(yaml.safe_dump(last.recipe, sort_keys=False))
        step = load_recipe(path).steps[0]
        assert step.generator.pretrained == str(before.version / "export")
        assert step.graded == "score" and step.judge.minimum == {"score": 5}
        assert list(last.link.build) == ["data/chains"] and load_recipe(last.link.build["data/chains"]).source == plain
    assert made.model.iteration.threshold == 3.0


def test_the_stages_of_r1v_are_compared_with_those_that_they_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = read(Path("configs/experiments/r1v.yaml"))
    told = [arm for arm in experiment.reported if arm not in ("substitute", "re-assembled")]
    assert set(told) <= set(experiment.after) and experiment.after["GRPO"] == "iteration 4"
    for arm in told:
        assert experiment.arms[arm][:-1] == experiment.arms[experiment.after[arm]] or arm == "SFT stage 1"
    # No two arms are one chain.
    ends = [tuple(chain) for chain in experiment.arms.values()]
    assert len(set(ends)) == len(ends)


# Evaluations of a picture to sample it, to learn from it, and of one that the policy is held to the reference on.
COSTS = {
    "pdtr_edit": (10, 16, 4),
    "pdtr_edit_learned": (10, 16, 0),
    "pdtr_interleaved": (10, 16, 0),
    "pdtr_paper": (20, 54, 0),
    "pdtr_t2i": (10, 16, 0),
    "sd35m/pdtr_edit": (10, 12, 0),
    "sd35m/pdtr_interleaved": (10, 12, 0),
    "sd35m/pdtr_paper": (20, 72, 0),  # 54, and activations computed again
    "sd35m/pdtr_t2i": (10, 12, 0),
}


def test_what_a_picture_of_reinforcement_costs_where_every_group_teaches() -> None:
    found, tables = {}, {}
    for path in [*CONFIGS, *FULL_SIZE]:
        if not path.stem.startswith("pdtr_") or not isinstance((made := instantiated(path)).model, ReinforceModule):
            continue
        name = str(path.relative_to(ROOT / "configs").with_suffix(""))
        cost = replace(made.model.arithmetic, prompts=made.datamodule.batch_size)
        found[name], tables[name] = (cost.to_sample, cost.to_train, cost.to_anchor), cost.table()
        said = re.search(r"(\d+) evaluations a picture", path.read_text())
        kept: Arithmetic = replace(cost, backward=cost.backward - bool(made.model.compute.recompute))
        assert said is None or int(said[1]) == kept.to_sample + kept.to_train
        assert path.parent.name != "sd35m" or said is not None
    assert found == COSTS
    shown = "\n".join(f"    {line}" for line in tables["pdtr_edit"].splitlines())
    assert shown in (ROOT / "README.md").read_text(), shown


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

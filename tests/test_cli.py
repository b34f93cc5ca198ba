"""The command line on micro models: what a run leaves, exact resumption after SIGKILL, mistakes in every slot."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro import micro_config
from PIL import Image

from lightning_modules.cli import VERSION, main
from lightning_modules.pipelines import KontextPipeline

ROOT = Path(__file__).parents[1]


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-m", "lightning_modules.cli", *map(str, arguments)]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """What a command that ends with a status prints to both streams, run in this process."""

    def run_here(status: int, *arguments: str | Path, cwd: Path) -> tuple[str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["cli", *map(str, arguments)])
        monkeypatch.setenv(VERSION, "")
        monkeypatch.delenv(VERSION)  # whatever a run sets it to is forgotten after the test
        capsys.readouterr()
        try:
            found = main([*map(str, arguments)])
        except SystemExit as end:
            found = end.code
        streams = capsys.readouterr()
        assert found == status, streams.err[-2000:]
        return streams.out, streams.err

    return run_here


@pytest.fixture
def refused(said: Callable[..., tuple[str, str]]) -> Callable[..., str]:
    """What a command says that is a mistake."""
    return lambda *arguments, cwd: said(2, *arguments, cwd=cwd)[1]


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished micro run."""
    folder = tmp_path_factory.mktemp("run")
    result = command("fit", "-c", micro_config(folder), cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_a_run_leaves_what_the_design_says(run: Path) -> None:
    latest = run / "runs" / "micro" / "latest"
    assert os.readlink(latest) == "version_0"
    for name in ("config.yaml", "summary.json", "export/model_index.json", "checkpoints/step_00000012.ckpt"):
        assert (latest / name).is_file(), name
    assert (latest / "samples" / "step_000000.png").is_file() and (latest / "samples" / "step_000012.png").is_file()
    assert list(latest.glob("events.out.tfevents*"))
    assert "look at runs/micro/version_0" in (run / "stdout").read_text().strip().splitlines()[-1]


def test_the_summary_holds_every_figure(run: Path) -> None:
    summary = json.loads((run / "runs/micro/latest/summary.json").read_text())
    names = ("edit_success", "t2i_success", "preservation", "seconds", "setup_seconds", "eval_seconds", "samples_seen")
    assert set(names) | {"samples_per_second", "peak_memory_bytes", "seed", "git_commit"} <= set(summary)
    assert summary["samples_seen"] == 24 and summary["steps"] == 12 and summary["seed"] == 0
    assert all(0 <= summary[name] <= 1 for name in names[:3])
    assert summary["seconds"] > 0 and summary["val/loss_edit"] > 0


def test_the_checkpoint_holds_the_average_once_and_no_frozen_weights(run: Path) -> None:
    state = torch.load(run / "runs/micro/latest/checkpoints/step_00000012.ckpt", weights_only=True)
    assert all(name.startswith("transformer.") for name in state["state_dict"])
    shadow = next(v for k, v in state["callbacks"].items() if k.startswith("EMA"))["shadow"]
    sizes = [sum(t.numel() for t in weights.values()) for weights in (state["state_dict"], shadow)]
    file = (run / "runs/micro/latest/checkpoints/step_00000012.ckpt").stat().st_size
    assert file < 4 * (3 * sizes[0] + sizes[1]) + 300_000  # weights, two moments and the average, each once


def test_the_export_is_the_average_and_loads(run: Path) -> None:
    pipeline = KontextPipeline.from_pretrained(run / "runs/micro/latest/export")
    state = torch.load(run / "runs/micro/latest/checkpoints/step_00000012.ckpt", weights_only=True)
    shadow = next(v for k, v in state["callbacks"].items() if k.startswith("EMA"))["shadow"]
    exported = dict(pipeline.transformer.named_parameters())
    assert shadow and all(torch.equal(exported[name.removeprefix("transformer.")], t) for name, t in shadow.items())


def killed_and_resumed(folder: Path, kill_at: int, **changes: object) -> list[dict]:
    config = micro_config(folder, **changes)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"][-1]["init_args"]["kill_at"] = kill_at
    fatal = config.with_name("fatal.yaml")
    fatal.write_text(yaml.safe_dump(content))
    result = command("fit", "-c", fatal, cwd=folder)
    assert result.returncode == -signal.SIGKILL
    fatal.write_text(config.read_text())
    result = command("fit", "-c", fatal, "--resume", cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(p.name for p in (folder / "runs/fatal").iterdir()) == ["latest", "version_0"]
    return ledger(folder)


QUICK = {(7, 2)}  # the others take minutes


@pytest.mark.parametrize(
    ("kill_at", "workers"),
    [
        pytest.param(kill_at, workers, marks=[] if (kill_at, workers) in QUICK else pytest.mark.slow)
        for kill_at in range(4, 13)  # step 3 is the first to be saved, after the point where a run is killed
        for workers in (0, 1, 2)
    ],
)
def test_a_killed_run_resumes_bit_for_bit(run: Path, tmp_path: Path, kill_at: int, workers: int) -> None:
    whole = {row["step"]: row for row in ledger(run)}
    rows = killed_and_resumed(tmp_path, kill_at, data__init_args__num_workers=workers)
    assert [row["step"] for row in rows] == [*range(1, kill_at + 1), *range((kill_at - 1) // 3 * 3 + 1, 13)]
    assert all(row == whole[row["step"]] for row in rows)
    averages = [
        next(v for k, v in torch.load(p, weights_only=True)["callbacks"].items() if k.startswith("EMA"))["shadow"]
        for p in (
            run / "runs/micro/latest/checkpoints/step_00000012.ckpt",
            tmp_path / "runs/fatal/latest/checkpoints/step_00000012.ckpt",
        )
    ]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    ranks = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    result = command("fit", "-c", micro_config(tmp_path / "whole", **ranks), cwd=tmp_path / "whole")
    assert result.returncode == 0, result.stderr[-3000:]
    whole = {(row["rank"], row["step"]): row for row in ledger(tmp_path / "whole")}
    assert len(whole) == 24 and all(set(whole[0, i]["ids"]).isdisjoint(whole[1, i]["ids"]) for i in range(1, 13))
    assert all(whole[0, i]["weights"] == whole[1, i]["weights"] for i in range(1, 13))
    rows = killed_and_resumed(tmp_path / "killed", 7, **ranks)
    assert sorted({(row["rank"], row["step"]) for row in rows}) == sorted(whole)
    assert all(row == whole[row["rank"], row["step"]] for row in rows)


def test_predict_edits_a_folder_and_draws_prompts(run: Path, tmp_path: Path, said: Callable) -> None:
    pictures = tmp_path / "in"
    pictures.mkdir()
    Image.fromarray(np.zeros((30, 60, 3), np.uint8)).save(pictures / "a.png")
    (pictures / "broken.png").write_text("no picture")
    options = ["-c", run / "configs/micro.yaml", "--steps", "1"]
    edit = [*options, "--input", pictures, "--instruction", "make it red", "--output", tmp_path / "edited"]
    out, err = said(0, "predict", *edit, cwd=run)
    assert "1 pictures" in out and "broken.png" in err
    assert Image.open(tmp_path / "edited" / "a.png").size == (64, 32)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": "it", "image": "in/a.png"}\n')
    said(0, "predict", *options, "--input", prompts, "--output", tmp_path / "drawn", cwd=run)
    sizes = [Image.open(p).size for p in sorted((tmp_path / "drawn").iterdir())]
    assert sizes == [(64, 64), (64, 32)]


def test_test_gives_the_summarys_metrics(run: Path, said: Callable) -> None:
    out, _ = said(0, "test", "-c", run / "configs/micro.yaml", cwd=run)
    summary = json.loads((run / "runs/micro/latest/summary.json").read_text())
    metrics = json.loads(out)
    assert metrics and metrics == {name: summary[name] for name in metrics}


def test_validate_gives_the_losses_of_the_trained_weights(run: Path) -> None:
    before = sorted((run / "runs/micro").iterdir())
    result = command("validate", "-c", run / "configs/micro.yaml", cwd=run)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((run / "runs/micro/latest/summary.json").read_text())
    for name in ("val/loss_edit", "val/loss_text_to_image"):
        (value,) = re.findall(rf"{name}\W+([0-9.]+)", result.stdout)
        assert float(value) == pytest.approx(summary[name], rel=1e-3)
    assert before == sorted((run / "runs/micro").iterdir())


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """The finished run, as if it had died before its summary."""
    shutil.copytree(run / "runs/micro/version_0", tmp_path / "runs/micro/version_0")
    (tmp_path / "runs/micro/version_0/summary.json").unlink()
    return tmp_path


def test_resuming_with_other_settings_is_refused_and_the_record_stays(
    run: Path, unfinished: Path, refused: Callable
) -> None:
    record = unfinished / "runs/micro/version_0/config.yaml"
    before = record.read_bytes()
    changed = ["--model.init_args.optimizer.lr", "1e-6", "--trainer.gradient_clip_val", "2"]
    told = refused("fit", "-c", run / "configs/micro.yaml", "--resume", *changed, cwd=unfinished)
    assert "Traceback" not in told
    assert "optimizer.lr: 0.004 -> 1e-06" in told and "gradient_clip_val: 1.0 -> 2" in told
    assert record.read_bytes() == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def misshape(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = torch.zeros(3)
    torch.save(checkpoint, path)


DAMAGE = {
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), "is truncated or is no checkpoint"),
    "a bit flipped": (flip, "checksum"),
    "another file": (lambda path: torch.save([1, 2], path), "no checkpoint of a Lightning run"),
    "another shape": (misshape, "1 misshapen"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_message(name: str, run: Path, unfinished: Path, refused: Callable) -> None:
    damage, expected = DAMAGE[name]
    damage(unfinished / "runs/micro/version_0/checkpoints/step_00000012.ckpt")
    told = refused("fit", "-c", run / "configs/micro.yaml", "--resume", cwd=unfinished)
    assert expected in told and "Traceback" not in told


MISTAKES = {
    "no config": (["fit", "-c", "nowhere.yaml"], "there is no config nowhere.yaml"),
    "unknown field": (["fit", "-c", "{config}", "--data.init_args.bogus", "1"], "bogus"),
    "unknown model field": (["fit", "-c", "{unknown}"], "learning_rate"),
    "missing shards": (
        ["fit", "-c", "{config}", "--data.init_args.shards", "[nowhere]"],
        "no folder of shards at nowhere",
    ),
    "empty shards": (["fit", "-c", "{config}", "--data.init_args.shards", "[{empty}]"], "holds no shards"),
    "missing checkpoint": (
        ["fit", "-c", "{config}", "--model.init_args.pretrained", "nowhere"],
        "no checkpoint folder nowhere",
    ),
    "bad resolution": (
        ["fit", "-c", "{config}", "--data.init_args.image_size", "70"],
        "not divisible by size_multiple 16",
    ),
    "indivisible by the model": (
        ["fit", "-c", "{config}", "--data.init_args.size_multiple", "8", "--data.init_args.image_size", "40"],
        "it takes multiples of 16 pixels",
    ),
    "no batch in a step": (
        ["fit", "-c", "{config}", "--trainer.accumulate_grad_batches", "0"],
        "accumulate_grad_batches is 0; expected at least 1 batch a step",
    ),
    "one file for a folder": (
        ["fit", "-c", "{config}", "--model.init_args.pretrained", "{config}"],
        "is one file; expected a folder in the diffusers layout",
    ),
    "nothing to resume": (["fit", "-c", "{config}", "--resume", "--trainer.max_steps", "1"], "no unfinished version"),
    "no export": (["test", "-c", "{config}", "--export", "nowhere"], "no export nowhere"),
    "nothing to predict": (
        ["predict", "-c", "{config}", "--input", "nowhere", "--output", "o"],
        "nowhere does not exist",
    ),
    "benchmark level": (["fit", "-c", "{config}", "--benchmark.level", "7"], "benchmark.level is 7"),
    "benchmark count": (["fit", "-c", "{config}", "--benchmark.count", "0"], "benchmark.count is 0"),
    "benchmark scales": (["test", "-c", "{config}", "--benchmark.guidance_scales", "[]"], "at least one number"),
    "a task's name": (["fit", "-c", "{config}", "--model.init_args.task_weights", "{{edt: 0.5}}"], "names edt"),
    "clipping by value": (["fit", "-c", "{config}", "--trainer.gradient_clip_algorithm", "value"], "clipped by norm"),
    "a path that is no hub id": (
        ["fit", "-c", "{config}", "--model.init_args.pretrained", "pretrained/nowhere"],
        "no checkpoint folder pretrained/nowhere",
    ),
    "nothing to validate": (["validate", "-c", "{unknown}"], "has no finished run"),
    "resume is for fit": (["validate", "-c", "{config}", "--resume"], "--resume belongs to fit"),
    "no steps": (["predict", "-c", "{config}", "--input", "x", "--output", "o", "--steps", "0"], "--steps"),
    "output is input": (
        ["predict", "-c", "{config}", "--input", "{pictures}", "--instruction", "x", "--output", "{pictures}"],
        "choose another folder",
    ),
    "no instruction": (["predict", "-c", "{config}", "--input", "{pictures}", "--output", "o"], "--instruction TEXT"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_message(name: str, run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    arguments, expected = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config = run / "configs/micro.yaml"
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(config.read_text().replace("lr:", "learning_rate:"))
    places = {"config": config, "unknown": unknown, "empty": tmp_path / "empty", "pictures": tmp_path}
    assert expected in refused(*(a.format(**places) for a in arguments), cwd=run)
    assert (run / "runs/micro/latest/summary.json").is_file()

"""Every run's config: headed by its command, complete, and two steps of it at micro size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from micro import judged_shards, micro_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_headed_by_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python -m lightning_modules.cli fit -c configs/{path.name}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_takes_two_steps(path: Path, tmp_path: Path) -> None:
    small = yaml.safe_load(micro_config(tmp_path).read_text())
    config = yaml.safe_load(path.read_text())
    model = config["model"]["init_args"]
    changes = {"pretrained": small["model"]["init_args"]["pretrained"], "compile": False}
    model |= {name: value for name, value in changes.items() if name in model}
    if "rewards" in config["model"]["init_args"]:  # an untrained policy draws no scenes: all would be worth nothing
        config["model"]["init_args"]["rewards"] = {"bright": {"reward": {"class_path": "micro.Brightness"}}}
        config["model"]["init_args"]["sampling"] |= {"group_size": 2, "groups": 2, "micro_groups": 2}
        config["model"]["init_args"]["advantages"] = {"kind": "group"}
    data = small["data"]["init_args"]
    config["data"]["init_args"] |= {k: data[k] for k in ("scenes", "shards", "batch_size", "val_batches")}
    if "dimensions" in model:  # learns from scores, which plain scenes do not have
        config["data"]["init_args"]["shards"] = [str(judged_shards(tmp_path / "judged"))]
    else:
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

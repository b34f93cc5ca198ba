"""What a finished run was: summary.json, and `latest` beside the run's folder."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.atomic import replace_file
from callbacks.dashboard import Dashboard
from callbacks.ema import averaged
from callbacks.sample_grid import inference
from callbacks.stage import sharded, stage
from callbacks.throughput import Throughput, peak_memory_bytes
from lightning_modules.evaluation import questions, scenes
from lightning_modules.evaluation.questions import QuestionBenchmark
from lightning_modules.evaluation.scenes import SceneBenchmark

SUMMARY = "summary.json"
OUTCOMES = "outcomes.json"
SHOWN = ("edit_success", "t2i_success", "preservation", "understanding", "right_pictures", "right_words", "right_blind")


Benchmark = SceneBenchmark | QuestionBenchmark


class Summary(Callback):
    """Writes <log_dir>/summary.json when training has ended, evaluated with the averaged weights.

    Holds the benchmark's metrics, the last losses, `seconds` (first to last optimiser step), `setup_seconds` (before),
    `eval_seconds` (the benchmark), `evaluations` (of the transformer, where the module counts them), what Throughput
    counted and Dashboard saw of rewards, seed, versions and git commit; outcomes.json beside it holds the benchmark's
    outcome scene by scene. List it after Export.

    Args:
        benchmark: scenes or questions to evaluate on; None where the data has no ground truth.
        seed: the run's seed, for the record.
    """

    def __init__(self, benchmark: Benchmark | None = None, seed: int | None = None) -> None:
        self.benchmark, self.seed = benchmark, seed
        self._created = time.perf_counter()
        self._setup_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._setup_seconds = time.perf_counter() - self._created

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks rank 0, so every rank must ask
        if trainer.fast_dev_run or not (trainer.is_global_zero or sharded(pl_module)):  # type: ignore[attr-defined]
            return
        started, metrics = time.perf_counter(), dict[str, float]()
        if self.benchmark is not None:
            with averaged(trainer, pl_module, full_precision=True), inference(trainer, pl_module):
                found = outcomes(stage(pl_module).pipeline(), self.benchmark)
            if trainer.is_global_zero:
                replace_file(folder / OUTCOMES, lambda file: file.write(json.dumps(found).encode()))
            metrics = means(found, self.benchmark)
        if not trainer.is_global_zero:
            return
        summary = {
            **metrics,
            **{
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith(("train/", "val/"))
            },
            "setup_seconds": self._setup_seconds,
            "eval_seconds": time.perf_counter() - started,
            "evaluations": getattr(pl_module, "evaluations", None),
            **throughput(trainer),
            **rewards(trainer),
            "benchmark": None if self.benchmark is None else asdict(self.benchmark),
            "steps": trainer.global_step,
            "seed": self.seed,
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "git_commit": git_commit(),
        }
        text = json.dumps(summary, indent=2) + "\n"
        replace_file(folder / SUMMARY, lambda file: file.write(text.encode()))
        point_latest(folder)
        for name in (*SHOWN, "seconds"):
            if name in summary:
                print(f"{name} {summary[name]:.4g}")
        print(
            f"look at {folder / SUMMARY}, {folder / 'samples'} and {folder / 'export'}; "
            f"curves: tensorboard --logdir {folder}"
        )


def outcomes(pipeline: Any, benchmark: Benchmark) -> dict[str, list[float]]:
    """What became of each item of a benchmark."""
    if isinstance(benchmark, QuestionBenchmark):
        return questions.outcomes(pipeline, benchmark)
    return scenes.outcomes(pipeline, benchmark)


def means(found: dict[str, list[float]], benchmark: Benchmark) -> dict[str, float]:
    """The benchmark's metrics."""
    if isinstance(benchmark, QuestionBenchmark):
        return questions.means(found)
    return scenes.means(found, benchmark)


def throughput(trainer: Trainer) -> dict[str, Any]:
    """What the Throughput callback counted, if there is one."""
    found = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
    facts: dict[str, Any] = {"peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device)}
    if found is not None:
        facts |= {
            "seconds": found.train_seconds,
            "samples_seen": found.samples_seen,
            "samples_per_second": found.samples_per_second,
        }
    return facts


def rewards(trainer: Trainer) -> dict[str, float]:
    """What the Dashboard callback, if there is one, has seen of each reward: means of the first and last tenth."""
    found = next((c for c in trainer.callbacks if isinstance(c, Dashboard)), None)  # type: ignore[attr-defined]
    means = {}
    for name, values in ({} if found is None else found.curves).items():
        if name.startswith("reward/"):
            tenth = -(-len(values) // 10)
            means[f"{name}_first"], means[f"{name}_last"] = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    return means


def git_commit() -> str | None:
    """The commit that is checked out, "+" behind it where files differ; None outside a checkout."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def point_latest(folder: Path) -> None:
    """Sets the link `latest` beside a run's folder to it, in one step."""
    temporary = folder.parent / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, folder.parent / "latest")

"""The Slurm and torchrun examples, with what they start replaced by scripts that note how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "configs" / "sd35m"
SCRIPTS = [FOLDER / "slurm.sbatch", *sorted(FOLDER.glob("*.sh"))]
CONFIG = "configs/sd35m/edit.yaml"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the scripts in it, whose programs write their names and arguments to calls."""
    for program in ("python", "srun", "torchrun", "scontrol"):
        script = tmp_path / "bin" / program
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f'#!/bin/bash\necho {program} "$@" >> {tmp_path}/calls\n[ {program} != srun ] || exec sleep $LAST\n'
        )
        script.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sd35m").symlink_to(FOLDER)
    return tmp_path


def started(here: Path, script: str, last: float = 0, **variables: str) -> subprocess.Popen[str]:
    environment = {"PATH": f"{here}/bin:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "GPUS": "8"}
    environment |= {"LAST": str(last), **variables}
    return subprocess.Popen(
        ["bash", f"configs/sd35m/{script}", CONFIG, "--a", "1"], cwd=here, env=environment, text=True
    )


def called(here: Path) -> list[str]:
    return (here / "calls").read_text().splitlines()


def saved(here: Path, finished: bool = False) -> None:
    version = here / "runs" / "sd35m" / "edit" / "version_3"
    (version / "checkpoints").mkdir(parents=True)
    (version / "checkpoints" / "step_00000500.ckpt").touch()
    if finished:
        (version / "summary.json").touch()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0


def test_slurm_begins_with_a_dry_run_of_the_same_run(here: Path) -> None:
    saved(here)  # of an earlier job, which this one does not go on with
    assert started(here, "slurm.sbatch").wait() == 0
    dry, run = called(here)
    fit = f"-m lightning_modules.cli fit -c {CONFIG} --a 1 --trainer.num_nodes 2"
    assert dry == f"python {fit} --dry_run" and run == f"srun --kill-on-bad-exit=1 python {fit}"


def test_a_dry_run_that_finds_something_starts_nothing(here: Path) -> None:
    (here / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    assert started(here, "slurm.sbatch").wait() == 1 and started(here, "torchrun.sh").wait() == 1
    assert not (here / "calls").exists()


@pytest.mark.parametrize(
    ("there", "finished", "resumes"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_only_a_run_with_a_checkpoint_is_resumed(here: Path, there: bool, finished: bool, resumes: bool) -> None:
    if there:
        saved(here, finished)
    assert started(here, "slurm.sbatch", SLURM_RESTART_COUNT="1").wait() == 0
    assert started(here, "torchrun.sh", RESUME="1").wait() == 0
    runs = [call for call in called(here) if call.startswith(("srun", "torchrun"))]
    assert len(runs) == 2 and all(call.endswith(" --resume") == resumes for call in runs)
    assert "--nnodes 1 --nproc-per-node 8" in runs[1] and "--trainer.num_nodes 1 --trainer.devices 8" in runs[1]


def test_a_job_whose_time_is_nearly_up_is_queued_again(here: Path) -> None:
    job = started(here, "slurm.sbatch", last=3)
    while not (here / "calls").exists() or not any(call.startswith("srun") for call in called(here)):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 0  # it waits for what runs, which Slurm ends
    assert called(here)[-1] == "scontrol requeue 7"
    head = (FOLDER / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@300\n" in head and "#SBATCH --requeue\n" in head


def test_a_run_that_fails_is_a_job_that_fails(here: Path) -> None:
    (here / "bin" / "srun").write_text("#!/bin/bash\nexit 3\n")
    assert started(here, "slurm.sbatch").wait() == 3

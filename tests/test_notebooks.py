"""Every notebook runs from top to bottom, on a micro folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from micro import micro_folder
from micro_r1v import micro_r1v
from nbclient import NotebookClient

from lightning_modules.evaluation.comparison import Trial, compare, record
from lightning_modules.experiments import read

ROOT = Path(__file__).parents[1]


def results(path: Path) -> Path:
    """A results.json as an experiment writes it, of made-up outcomes for R1V's first arms."""
    experiment = read(ROOT / "configs" / "experiments" / "r1v.yaml")
    names = [name for several in experiment.columns.values() for name in several]
    arms = [experiment.baseline, *(arm for arm in experiment.arms if arm != experiment.baseline)][:5]
    trials = {arm: [Trial({n: [0.0, 1.0, float(i > 2)] for n in names}, 10, 60.0)] for i, arm in enumerate(arms)}
    rows = compare(trials, dict.fromkeys(arms, 3), experiment.columns, experiment.baseline)
    path.write_text(json.dumps({"baseline": experiment.baseline, "rows": [*map(record, rows)], "stages": []}))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT", str(micro_folder(tmp_path / "micro")))
    if path.stem == "reason":
        micro_r1v().save_pretrained(tmp_path / "r1v")
        monkeypatch.setenv("R1V", str(tmp_path / "r1v"))
        monkeypatch.setenv("QUESTIONS", "12")
        monkeypatch.setenv("RESULTS", str(results(tmp_path / "results.json")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}}).execute()
    figures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(figures) >= (4 if path.stem == "reason" else 3)

"""Every notebook runs from top to bottom, on a micro folder."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from micro import micro_folder
from micro_r1v import micro_r1v
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT", str(micro_folder(tmp_path / "micro")))
    if path.stem == "reason":
        micro_r1v().save_pretrained(tmp_path / "r1v")
        monkeypatch.setenv("R1V", str(tmp_path / "r1v"))
        monkeypatch.setenv("QUESTIONS", "12")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}}).execute()
    figures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(figures) >= 3

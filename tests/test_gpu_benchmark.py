"""The GPU's benchmark without a GPU: it runs, writes its table, and says that the table is none of a GPU."""

from __future__ import annotations

import datetime
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from micro import built

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures the full size, for minutes")
def test_it_runs_at_pocket_scale_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)  # where its dataclasses look for it
    spec.loader.exec_module(benchmark)
    output, cases = tmp_path / "table.md", ["t2i_512", "rl_edit_512"]
    shown = ["--pretrained", str(built()), "--steps", "2", "--eager", "--output", str(output), "--cases", *cases]
    benchmark.main(shown)
    head, _, *table = output.read_text().splitlines()
    assert head.startswith(f"{datetime.date.today()}, no GPU: the pocket model on the CPU")
    assert torch.__version__ in head and output.read_text() in capsys.readouterr().out
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert names == ["case", "encoders", "blocks", "pictures", "s a step", "pictures/s", "MFU", "peak GiB"]
    wanted = [[case, encoders, "eager"] for case in cases for encoders in ("cached", "online")]
    assert [row[:3] for row in rows] == wanted
    assert all(float(row[5]) > 0 and row[6] == "-" for row in rows) and "sampling" in rows[-1][4]

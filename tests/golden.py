"""Golden values: what a short training gave when it was last looked at, with the torch release and the CPU it ran on.

Another release or CPU rounds otherwise, and training amplifies that: there only the beginning is compared, and within a
tolerance. Where a change of the values is meant, `python -m pytest --rewrite-golden TESTS` writes them anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "golden"
BEGINNING = 20  # values that are compared everywhere
TOLERANCE = 1e-4


def check(name: str, values: Sequence[float], rewrite: bool = False) -> None:
    """Compares values with those in golden/<name>.json, or writes them there."""
    here = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    path = FOLDER / f"{name}.json"
    assert all(map(math.isfinite, values)), f"{name}: {values}"
    if rewrite:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**here, "values": list(values)}, indent=1) + "\n")
        return
    golden = json.loads(path.read_text())
    assert len(values) == len(golden["values"]) >= BEGINNING
    if all(golden[key] == found for key, found in here.items()):
        assert list(values) == golden["values"]
    else:
        wanted = pytest.approx(golden["values"][:BEGINNING], rel=TOLERANCE, abs=TOLERANCE)
        assert list(values)[:BEGINNING] == wanted

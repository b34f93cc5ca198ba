"""Golden values: what a short training gave when it was last looked at, with the torch release and the CPU it ran on.

Another release or CPU rounds otherwise, and training amplifies that: there only the beginning is compared, and within a
tolerance. Where a change of the values is meant, `python -m pytest --rewrite-golden TESTS` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "golden"
BEGINNING = 20  # values that are compared everywhere
TOLERANCE = 1e-4


def cpu() -> str:
    """The family, model and instructions of the CPU, by which libraries choose their kernels."""
    file = Path("/proc/cpuinfo")
    said = [line.partition(":") for line in file.read_text().splitlines()] if file.exists() else []
    facts = {key.strip(): " ".join(sorted(value.split())) for key, _, value in reversed(said)}
    chosen = [facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "flags")]
    return hashlib.sha256("\n".join([platform.machine(), *chosen]).encode()).hexdigest()[:12]


def expected(name: str, values: Sequence[float], rewrite: bool = False) -> list[object]:
    """What `values` must equal by golden/<name>.json; with `rewrite` they are written there and equal themselves."""
    here = {"torch": torch.__version__, "cpu": cpu()}
    path = FOLDER / f"{name}.json"
    assert len(values) >= BEGINNING and all(map(math.isfinite, values)), f"{name}: {values}"
    if rewrite:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**here, "values": list(values)}, indent=1) + "\n")
        return list(values)
    golden = json.loads(path.read_text())
    if all(golden.get(key) == found for key, found in here.items()):
        return golden["values"]
    assert len(golden["values"]) == len(values), f"{name}: {len(golden['values'])} values are stored"
    close = [pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE) for value in golden["values"][:BEGINNING]]
    return [*close, *values[BEGINNING:]]

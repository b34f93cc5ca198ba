"""Shared set-up: tests may import `micro`, take one thread, and never reach a network."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import golden
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden/*.json anew")


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> partial[list[object]]:
    """recorded(name, values): what the values must equal by golden/<name>.json."""
    return partial(golden.expected, rewrite=request.config.getoption("--rewrite-golden"))

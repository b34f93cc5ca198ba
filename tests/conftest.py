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


LONG = ("test_cli.py", "test_notebooks.py", "test_serving.py", "test_configs.py", "test_parallel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes that take file by file then end together."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> partial[list[object]]:
    """recorded(name, values): what the values must equal by golden/<name>.json."""
    return partial(golden.expected, rewrite=request.config.getoption("--rewrite-golden"))

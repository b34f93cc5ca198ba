"""Imports go down only, as README's picture of the house says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "lightning_modules", "callbacks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# The longest prefix of a module's name decides its layer.
LAYERS = {
    "data_pipeline": 0,
    "lightning_modules.networks": 1,
    "lightning_modules.samplers": 1,
    "lightning_modules.losses": 1,
    "lightning_modules.schedule": 1,
    "lightning_modules.pipelines": 2,
    "lightning_modules.rewards": 2,
    "lightning_modules.evaluation": 3,
    "lightning_modules.rollouts": 3,
    "lightning_modules.pocket": 4,
    "lightning_modules.pocket_vlm": 4,
    "lightning_modules": 4,
    "callbacks": 4,
    "lightning_modules.commands": 5,
    "lightning_modules.ahead": 5,
    "lightning_modules.cli": 5,
    "lightning_modules.experiments": 5,
    "lightning_modules.distillation_rounds": 5,
}
# Within a layer these never import each other.
APART = [
    {"lightning_modules.networks", "lightning_modules.samplers", "lightning_modules.losses"},
    {"lightning_modules.kontext", "callbacks"},
    {"lightning_modules.pipelines", "lightning_modules.rewards"},
]
TORCH_ONLY = ("lightning_modules.samplers", "lightning_modules.losses")
STANDARD_ONLY = ("data_pipeline.records", "data_pipeline.errors")
LIGHTNING_ALLOWED = ("callbacks", "data_pipeline.datamodule", "data_pipeline.chat_datamodule")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Absolute names of imported modules, also of those imported inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
            inside = ROOT.joinpath(*node.module.split("."))
            found |= {f"{node.module}.{a.name}" for a in node.names if (inside / f"{a.name}.py").exists()}
    return found


def prefix(name: str, candidates) -> str | None:
    matches = [c for c in candidates if name == c or name.startswith(c + ".")]
    return max(matches, key=len) if matches else None


def layer(name: str) -> int:
    found = prefix(name, LAYERS)
    assert found is not None, f"{name} is in no layer"
    return LAYERS[found]


def ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    name = name_of(path)
    for imported in filter(ours, imports_of(path)):
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which stands above it"
        if name.startswith("data_pipeline"):
            assert imported.startswith("data_pipeline"), f"{name} imports {imported}"
        for group in APART:
            a, b = prefix(name, group), prefix(imported, group)
            assert a is None or b is None or a == b, f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_low_layers_import_only_what_they_may(path: Path) -> None:
    name, imported = name_of(path), {m.split(".")[0] for m in imports_of(path)}
    if prefix(name, TORCH_ONLY):
        assert imported <= {
            "__future__",
            "torch",
            "jaxtyping",
            "collections",
            "dataclasses",
            "lightning_modules",
            "math",
            "typing",
        }
    if prefix(name, STANDARD_ONLY):
        assert imported <= {"__future__", "collections", "dataclasses", "typing", "re"}
    if "lightning" in imported:
        assert layer(name) >= 4 or prefix(name, LIGHTNING_ALLOWED), f"{name} imports lightning"
    if name.startswith("data_pipeline.executors"):
        content = {m for m in imports_of(path) if m.startswith(("data_pipeline.steps", "data_pipeline.sources"))}
        assert content <= {"data_pipeline.sources.protocol"}  # what a part of a source is, and no source


def test_no_two_packages_import_each_other() -> None:
    def package(name: str) -> str:
        return ".".join(name.split(".")[:2]) if name.split(".")[0] != "callbacks" else "callbacks"

    edges = {(package(name_of(p)), package(i)) for p in FILES for i in imports_of(p) if ours(i)}
    assert not [(a, b) for a, b in edges if a != b and (b, a) in edges]


def test_files_and_functions_stay_readable() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] <= 120
    assert lengths[int(len(lengths) * 0.9)] <= 350
    assert lengths[-1] <= 500
    functions = sorted(
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert functions[int(len(functions) * 0.9)] <= 45


def test_training_step_reads_as_the_algorithm() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "training_step":
                assert node.end_lineno - node.lineno + 1 <= 25, path


def test_commands_on_data_start_without_torch() -> None:
    """It takes longer to import than all the rest of them."""
    code = "import sys, data_pipeline.__main__; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

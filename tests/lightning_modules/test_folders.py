"""Where models lie: paths, pocket parts, and models of the hub that were downloaded before or cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from micro import built, built_vlm
from rl import prompts

from lightning_modules import folders, preflight
from lightning_modules.connector import Connector, ConnectorModule
from lightning_modules.folders import (
    NotBuilt,
    checkpoint_folder,
    is_hub_id,
    planned_checkpoint,
    planned_r1v,
    planned_vlm,
    r1v_folder,
    vlm_folder,
)
from lightning_modules.kontext import KontextModule
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.planning import Plan, Run
from lightning_modules.pocket_llm import Recipe

HUB = {"Owner/micro": built, "Owner/vlm": built_vlm}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub of two models; what it is asked for is noted."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **settings: Any) -> str:
        asked.append({"name": name, **settings})
        if name not in HUB:
            raise LocalEntryNotFoundError("no network here")
        return str(HUB[name]())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "snapshot_download", download)
    return asked


def test_a_path_is_taken_as_it_is_and_never_asked_for(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for name in (
        "weights/absent",
        "models/absent",
        "runs/edit/latest/export",
        "mine/model",
        "mine/absent",
        str(built()),
    ):
        assert not is_hub_id(name)
        for folder in (checkpoint_folder, vlm_folder, r1v_folder, planned_checkpoint, planned_vlm, planned_r1v):
            assert folder(name) == Path(name)
    assert not hub


def test_pocket_parts_that_are_not_built_are_said_to_be_so(hub: list[dict[str, Any]]) -> None:
    for planned, name in ((planned_checkpoint, "pocket"), (planned_vlm, "pocket"), (planned_r1v, "pocket/tower")):
        with pytest.raises(NotBuilt, match="fit does so"):
            planned(name)
    assert not hub


@pytest.mark.parametrize("part", ["tower", "reasoner"])
def test_pocket_parts_that_are_built_are_planned_with(hub: list[dict[str, Any]], part: str) -> None:
    folder = Recipe().folder(part, Path("pocket")) / part
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert planned_r1v(f"pocket/{part}") == folder


def test_a_hubs_model_is_trained_and_planned_from_its_download(hub: list[dict[str, Any]]) -> None:
    module = KontextModule("Owner/micro")
    module.configure_model()
    assert module.flow_matching_loss(prompts(0)).isfinite()
    wanted = hub[0]["allow_patterns"]
    assert "transformer/*.safetensors" in wanted and not any(p.endswith((".bin", ".pt")) for p in wanted)
    sizes = Connector(num_queries=4, width=16, inner=24, layers=1, heads=2)
    connector = ConnectorModule("Owner/micro", "Owner/vlm", connector=sizes)
    connector.configure_model()
    plan = Plan(Run(connector, {}, 32, {"edit": 1}, 2, None, 16, False, 2))
    assert not any("not here" in text for text in plan.needs.assumed)
    assert [finding.level for finding in preflight.weights("Owner/vlm", "vlm")] == ["ok"]


def test_a_hubs_model_that_cannot_be_had_is_refused_with_what_to_do(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"hf download Owner/other --local-dir weights/other"):
        KontextModule("Owner/other").configure_model()
    plan = Plan(Run(KontextModule("Owner/other"), {}, 512, {"edit": 1}, 2, None, 32, False, 2))
    assert any("Owner/other is not here" in text for text in plan.needs.assumed)
    [finding] = preflight.weights("Owner/other")
    assert finding.level == "note" and "hf download" in finding.found

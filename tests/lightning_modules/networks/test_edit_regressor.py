"""Readers of edits: a tower over a checkpoint's words, and any vision-language model of transformers; both export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from micro import micro_folder, tiny_vlm
from torch import Tensor

from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.edit_readers import Tower, TowerReader, VlmReader
from lightning_modules.networks.edit_regressor import EditRegressor
from lightning_modules.networks.loading import CheckpointError

TOWER = Tower(arguments={"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]}, image_size=64, width=8, layers=1, heads=2)
WORDS = ["make the red circle blue", "keep everything"]


def pictures(seed: int = 0, size: tuple[int, int] = (64, 64), count: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.rand(3, *size, generator=generator) for _ in range(count)] for _ in WORDS]


def drawn(kind: str, folder: Path) -> EditRegressor:
    if kind == "tower":
        reader = TowerReader.drawn(micro_folder(folder / "micro"), TOWER, 0)
    else:
        reader = VlmReader.from_pretrained(tiny_vlm(folder / "vlm"))
    regressor = EditRegressor(reader, ["instruction", "preservation"]).eval()
    torch.nn.init.normal_(regressor.head.weight, generator=torch.Generator().manual_seed(0))
    return regressor


@pytest.fixture(scope="module", params=["tower", "vlm"])
def regressor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EditRegressor:
    return drawn(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_ratings_depend_on_the_text_on_both_pictures_and_on_nothing_else_in_the_batch(regressor: EditRegressor) -> None:
    shown, others = pictures(), pictures(1)
    base = regressor(regressor.prepare(WORDS, shown))
    assert base.shape == (2, 2)
    alone = torch.cat([regressor(regressor.prepare([WORDS[i]], [shown[i]])) for i in (0, 1)])
    assert torch.allclose(base, alone, atol=1e-5)  # padding is not read
    for words, changed in (
        (["make the blue circle red", WORDS[1]], shown),
        (WORDS, [[others[0][0], shown[0][1]], shown[1]]),
        (WORDS, [[shown[0][0], others[0][1]], shown[1]]),
    ):
        found = regressor(regressor.prepare(words, changed))
        assert (found[0] - base[0]).abs().max() > 1e-4 and torch.allclose(found[1], base[1], atol=1e-5)


@torch.no_grad()
def test_an_export_loads_and_rates_the_same(regressor: EditRegressor, tmp_path: Path) -> None:
    regressor.save_pretrained(tmp_path / "export", safe_serialization=True)
    loaded = EditRegressor.from_pretrained(tmp_path / "export").eval()
    assert loaded.dimensions == ["instruction", "preservation"]
    inputs = regressor.prepare(WORDS, pictures())
    assert torch.equal(loaded(inputs), regressor(inputs))
    assert not [file for file in (tmp_path / "export").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


@torch.no_grad()
def test_an_untrained_head_rates_everything_in_the_middle(tmp_path: Path) -> None:
    regressor = EditRegressor(TowerReader.drawn(micro_folder(tmp_path / "micro"), TOWER, 0), ["a"])
    assert regressor(regressor.prepare(WORDS, pictures())).tolist() == [[0.5], [0.5]]


@torch.no_grad()
def test_a_tower_resizes_pictures_and_takes_one_to_edit(tmp_path: Path) -> None:
    regressor = drawn("tower", tmp_path)
    assert regressor(regressor.prepare(WORDS, pictures(size=(96, 128)))).shape == (2, 2)
    with pytest.raises(CheckpointError, match="one picture to edit"):
        regressor.prepare(WORDS, pictures(count=3))
    again = TowerReader.drawn(tmp_path / "micro", TOWER, 0).own_state()
    assert all(torch.equal(again[name], tensor) for name, tensor in regressor.reader.own_state().items())


@torch.no_grad()
def test_a_damaged_export_is_named(tmp_path: Path) -> None:
    drawn("tower", tmp_path).save_pretrained(tmp_path / "export")
    settings = json.loads((tmp_path / "export" / "tower.json").read_text())
    (tmp_path / "export" / "tower.json").write_text(json.dumps(settings | {"layers": 2}))
    with pytest.raises(CheckpointError, match="missing"):
        EditRegressor.from_pretrained(tmp_path / "export")


@torch.no_grad()
def test_a_vision_language_model_takes_several_pictures_and_adapters_are_merged(tmp_path: Path) -> None:
    regressor = drawn("vlm", tmp_path)
    inputs = regressor.prepare(WORDS, pictures(count=3))
    assert regressor(inputs).shape == (2, 2)
    add_lora(regressor.reader.model, Lora(2, 4, ["q_proj", "v_proj"]), 0)
    for name, parameter in regressor.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    adapted = regressor(inputs)
    regressor.save_pretrained(tmp_path / "export")
    assert torch.allclose(EditRegressor.from_pretrained(tmp_path / "export").eval()(inputs), adapted, atol=1e-5)


def test_a_model_that_cannot_chat_is_refused(tmp_path: Path) -> None:
    (tiny_vlm(tmp_path / "vlm") / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat template"):
        VlmReader.from_pretrained(tmp_path / "vlm")

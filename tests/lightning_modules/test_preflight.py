"""What is refused before anything is loaded."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from chains import folder as r1v_folder
from jsonargparse import Namespace
from micro import built, built_vlm, micro_folder, micro_metaquery
from micro_r1v import part as r1v_part

from lightning_modules import preflight
from lightning_modules.preflight import Finding

ON_GPU = {"accelerator": "gpu"}


def bad(findings: object) -> list[str]:
    return [finding.found for finding in findings if finding.level == "BAD"]


@pytest.mark.parametrize(
    ("package", "release", "why"),
    [
        ("lightning", "2.6.2", "malware"),
        ("lightning", "2.6.3", "malware"),
        ("lightning", "2.6.4", "CVE-2026-58659"),
        ("torch", "2.5.1+cu124", "can run code"),
        ("transformers", "5.2.0", "CVE-2026-4372"),
        ("lightning", "2.6.6", None),
        ("torch", "2.15.0", None),
    ],
)
def test_releases_on_the_deny_list_are_named(
    package: str, release: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release if name == package else real(name))
    found = bad(preflight.versions())
    assert found == [] if why is None else any(why in text and release.split("+")[0] in text for text in found)


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bad(preflight.requested_devices({"devices": 8, "accelerator": "gpu"})) == [
        "trainer.devices is 8 and this machine has 1 GPUs; use --trainer.devices 1"
    ]
    assert bad(preflight.requested_devices({"devices": 1, "accelerator": "auto"})) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--trainer.accelerator cpu" in bad(preflight.requested_devices({"devices": 2, "accelerator": "gpu"}))[0]
    assert bad(preflight.requested_devices({"devices": 2, "accelerator": "cpu"})) == []
    for devices in ("auto", -1, "0,3"):  # Lightning itself would not say what to do
        assert "--trainer.accelerator cpu" in bad(preflight.requested_devices({"devices": devices, **ON_GPU}))[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for devices in ([0, 3], "0,3", "3,", 3):
        assert (
            "has 2 GPUs; use --trainer.devices 2" in bad(preflight.requested_devices({"devices": devices, **ON_GPU}))[0]
        )
    for devices in ("auto", -1, [0, 1], "1,", 2):
        assert bad(preflight.requested_devices({"devices": devices, **ON_GPU})) == []


def test_shards_over_other_devices_than_there_are() -> None:
    strategy = Namespace(class_path="lightning_modules.strategies.ShardedStrategy")
    strategy.init_args = Namespace(data_parallel_size=8)
    run = {"accelerator": "cpu", "strategy": strategy}
    for devices, nodes, world in ((4, 1, 4), ([0, 1], 2, 4), (4, 4, 16)):
        [found] = bad(preflight.requested_devices({**run, "devices": devices, "num_nodes": nodes}))
        assert f"data_parallel_size is 8 and the run has {world}; set it to {world}" in found
    for devices, nodes in ((8, 1), (4, 2), ("auto", 1)):
        assert bad(preflight.requested_devices({**run, "devices": devices, "num_nodes": nodes})) == []
    assert bad(preflight.requested_devices({"accelerator": "cpu", "devices": 2, "strategy": "ddp"})) == []


def test_a_step_has_a_batch() -> None:
    assert "is 0; expected at least 1" in bad(preflight.portions({"accumulate_grad_batches": 0}))[0]
    assert not any(bad(preflight.portions(trainer)) for trainer in ({}, {"accumulate_grad_batches": 1}))


def test_one_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "expected a folder in the diffusers layout" in bad(preflight.weights(str(tmp_path / "model.safetensors")))[0]


@pytest.mark.parametrize(
    ("capabilities", "precision", "noted"),
    [({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "bf16-mixed", True),
     ({"avx2": True, "avx512_bf16": True}, "bf16-mixed", False), ({"amx_bf16": True}, "bf16-true", False),
     ({}, "bf16-true", True), ({}, "32-true", False), ({}, None, False)],
)  # fmt: skip
def test_a_cpu_without_bfloat16_is_noted(
    capabilities: dict[str, bool], precision: str | None, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    found = list(preflight.cpu_precision({"accelerator": "cpu", "precision": precision}))
    assert [finding.level for finding in found] == ["note"] * noted
    assert all("--trainer.precision 32-true" in finding.found for finding in found)


def test_a_precision_that_rounds_everything_is_refused() -> None:
    [found] = bad(preflight.true_precision({"precision": "bf16-true"}))
    assert "use 32-true" in found
    assert not any(list(preflight.true_precision({"precision": p})) for p in ("32-true", "bf16-mixed", None))


def test_every_bad_part_of_the_weights_is_named(tmp_path: Path) -> None:
    assert bad(preflight.weights(str(built()))) == []
    folder = micro_folder(tmp_path / "folder")
    (folder / "vae" / "diffusion_pytorch_model.safetensors.incomplete").touch()
    weights = folder / "text_encoder_3" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("SD3Transformer2DModel", "FluxTransformer2DModel"))
    found = bad(preflight.weights(str(folder)))
    assert len(found) == 3
    for part in ("is half downloaded", "can run code when loaded", "describes a FluxTransformer2DModel"):
        assert any(part in text for text in found), part
    assert "there is no folder" in bad(preflight.weights(str(tmp_path / "absent")))[0]


def test_shards_and_disk(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = bad(preflight.shards([str(tmp_path / "absent"), str(tmp_path / "empty")]))
    assert "there is no folder" in found[0] and "holds no shards" in found[1]
    assert bad(preflight.disk(tmp_path / "runs", 1e3)) == []
    assert "make room" in bad(preflight.disk(tmp_path / "runs", 1e18))[0]


def test_a_line_of_the_report() -> None:
    assert str(Finding("BAD", "disk", "full")) == "BAD  disk            full"
    assert [finding.what for finding in preflight.accelerators()]


def test_folders_of_every_kind_are_checked(tmp_path: Path) -> None:
    metaquery = str(micro_metaquery(tmp_path / "metaquery"))
    tower, reasoner = str(r1v_part("tower")), str(r1v_part("reasoner"))
    good = {metaquery: "conditioner", str(built_vlm()): "vlm", tower: "tower", reasoner: "model", r1v_folder(): "r1v"}
    good |= {"pocket/tower": "tower", str(built()): "pictures"}
    for folder, kind in good.items():
        assert bad(preflight.weights(folder, kind)) == [], (folder, kind)
    assert "expected qwen2_5_vl" in bad(preflight.weights(reasoner, "vlm"))[0]
    assert "expected intern_vit_6b or timm" in bad(preflight.weights(reasoner, "tower"))[0]
    assert "no llm_config" in bad(preflight.weights(tower, "r1v"))[0]
    assert "no conditioner" in bad(preflight.weights(str(built()), "conditioner"))[0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    assert "holds no *.safetensors" in bad(preflight.weights(str(tmp_path / "model"), "model"))[0]

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import ToyLoader, ToyModule, toy_trainer

from callbacks import EMA, Checkpoint, Export


class Saver(ToyModule):
    """Its own pipeline: saves the weights it has at the moment, in their precision."""

    def pipeline(self) -> "Saver":
        return self

    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        assert safe_serialization
        save_file(self.state_dict(), folder / "model.safetensors")


def exported(folder: Path) -> dict[str, torch.Tensor]:
    assert os.listdir(folder / "version_0/export") == ["model.safetensors"]
    return load_file(folder / "version_0/export/model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_the_average_in_float32_and_leaves_the_module_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    ema, module = EMA(0.9), Saver(dtype=dtype)
    toy_trainer(tmp_path, [Export(), ema]).fit(module, ToyLoader())
    weights = exported(tmp_path)
    assert weights["layer.weight"].dtype == torch.float32
    assert torch.equal(weights["layer.weight"], ema.shadow["layer.weight"])
    assert torch.equal(module.layer.weight, module.history[-1])


def test_without_an_average_the_weights_themselves(tmp_path: Path) -> None:
    module = Saver()
    toy_trainer(tmp_path, [Export()]).fit(module, ToyLoader())
    assert torch.equal(exported(tmp_path)["layer.weight"], module.history[-1])


def test_replaces_an_older_export_only_when_complete(tmp_path: Path) -> None:
    class Full(Saver):
        def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
            super().save_pretrained(folder, safe_serialization)
            raise OSError("No space left on device")

    toy_trainer(tmp_path, [Export()], max_steps=2).fit(Saver(), ToyLoader())
    before = exported(tmp_path)["layer.weight"]
    with pytest.raises(OSError, match="No space"):
        toy_trainer(tmp_path, [Export()], max_steps=4).fit(Full(), ToyLoader())
    assert torch.equal(exported(tmp_path)["layer.weight"], before)
    toy_trainer(tmp_path, [Export()], max_steps=4).fit(Saver(), ToyLoader())
    assert not torch.equal(exported(tmp_path)["layer.weight"], before)
    assert [name for name in os.listdir(tmp_path / "version_0") if name.startswith(".")] == []


def test_a_finished_run_that_is_resumed_exports_its_average(tmp_path: Path) -> None:
    # As when the run was killed between its last checkpoint and its export.
    ema = EMA(0.9)
    toy_trainer(tmp_path, [ema, Checkpoint(4)], max_steps=4).fit(Saver(), ToyLoader())
    path = tmp_path / "version_0/checkpoints/step_00000004.ckpt"
    toy_trainer(tmp_path, [EMA(0.9), Export(), Checkpoint(4)], max_steps=4).fit(Saver(), ToyLoader(), ckpt_path=path)
    assert torch.equal(exported(tmp_path)["layer.weight"], ema.shadow["layer.weight"])

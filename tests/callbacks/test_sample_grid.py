from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import ToyLoader, ToyModule, toy_trainer

from callbacks import EMA, Checkpoint, SampleGrid
from callbacks.grid import GAP
from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError


class Painter:
    """A pipeline whose pictures show the weights it was called with, and which keeps its arguments."""

    def __init__(self, module: ToyModule) -> None:
        self.module = module
        self.calls: list[dict[str, Any]] = []

    def set_progress_bar_config(self, disable: bool) -> None:
        assert disable

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        assert not self.module.training and not torch.is_grad_enabled()
        noise = torch.rand(3, 3, generator=arguments["generator"])
        weight = self.module.layer.weight.detach().clone()
        self.calls.append(arguments | {"noise": noise, "weight": weight, "step": self.module.global_step})
        size = (arguments["width"], arguments["height"])
        return SimpleNamespace(images=[PIL.Image.new("RGB", size, shade(weight)) for _ in arguments["prompt"]])


def shade(weight: torch.Tensor) -> tuple[int, int, int]:
    return (int(weight.sum().sigmoid() * 255), 0, 255)


class Painted(ToyModule):
    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.frozen.eval()
        self.painter = Painter(self)

    def pipeline(self) -> Painter:
        return self.painter


class Data(LightningDataModule):
    def train_dataloader(self) -> ToyLoader:
        return ToyLoader()

    def sample_batches(self, num_samples: int) -> list[ImageBatch]:
        def batch(task: str, references: torch.Tensor | None) -> ImageBatch:
            ids, prompts = torch.arange(num_samples), [f"{task} {i}" for i in range(num_samples)]
            zeros = torch.zeros(num_samples, dtype=torch.int64)
            return ImageBatch(
                [task] * num_samples, prompts, ids, zeros, prompts, torch.ones(num_samples, 3, 64, 64), references
            )

        return [batch("text_to_image", None), batch("edit", -torch.ones(num_samples, 1, 3, 64, 64))]


def run(folder: Path, *callbacks: Any, max_steps: int = 5, ckpt: Path | None = None, **options: Any) -> Painted:
    module = Painted()
    torch.manual_seed(0)
    toy_trainer(folder, list(callbacks), max_steps, **options).fit(module, datamodule=Data(), ckpt_path=ckpt)
    return module


def grid(every: int = 2) -> SampleGrid:
    return SampleGrid(every, num_samples=3, num_inference_steps=4, guidance_scale=2.0, seed=1)


def test_draws_before_the_first_step_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    module = run(tmp_path, grid(), accumulate_grad_batches=2)
    names = sorted(p.name for p in (tmp_path / "version_0/samples").iterdir())
    assert names == [f"step_{step:06d}.png" for step in (0, 2, 4, 5)]
    assert [call["step"] for call in module.painter.calls] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert torch.equal(module.painter.calls[0]["weight"], Painted().layer.weight)


def test_pictures_show_the_average_and_are_enlarged(tmp_path: Path) -> None:
    # SampleGrid stands before EMA in the list and must not see the average of a step ago.
    ema = EMA(0.9)
    module = run(tmp_path, grid(), ema)
    assert torch.equal(module.painter.calls[-1]["weight"], ema.shadow["layer.weight"])
    assert not torch.equal(module.painter.calls[-1]["weight"], module.layer.weight)
    image = np.asarray(PIL.Image.open(tmp_path / "version_0/samples/step_000005.png"))
    color = np.array(shade(ema.shadow["layer.weight"]))
    assert (image == color).all(axis=-1).sum() == 6 * 128 * 128
    assert image.shape[1] == 2 * (3 * (128 + GAP) + GAP) + 3 * GAP


def test_arguments_tell_edits_from_text_to_image_and_noise_stays(tmp_path: Path) -> None:
    calls = run(tmp_path, grid()).painter.calls
    plain, edit = calls[:2]
    assert plain["image"] is None and [len(images) for images in edit["image"]] == [1, 1, 1]
    assert plain["prompt"] == [f"text_to_image {i}" for i in range(3)]
    assert (edit["height"], edit["width"], edit["num_inference_steps"], edit["guidance_scale"]) == (64, 64, 4, 2.0)
    assert all(torch.equal(call["noise"], plain["noise"]) for call in calls[::2])
    assert all(torch.equal(call["noise"], edit["noise"]) for call in calls[1::2])
    assert not torch.equal(plain["noise"], edit["noise"])


def test_training_does_not_notice(tmp_path: Path) -> None:
    watched, alone = run(tmp_path / "a", grid(), EMA(0.9)), run(tmp_path / "b")
    assert watched.losses == alone.losses
    assert watched.dropout.training and not watched.frozen.training


def test_a_resumed_run_does_not_draw_again_where_it_was(tmp_path: Path) -> None:
    run(tmp_path, grid(), Checkpoint(2), max_steps=2)
    path = tmp_path / "version_0/checkpoints/step_00000002.ckpt"
    module = run(tmp_path, grid(), Checkpoint(2), max_steps=4, ckpt=path)
    assert [call["step"] for call in module.painter.calls] == [4, 4]


def test_tensorboard_gets_the_same_pictures(tmp_path: Path) -> None:
    run(tmp_path, grid(), max_steps=2, logger=TensorBoardLogger(str(tmp_path), name="", version=0))
    events = EventAccumulator(str(tmp_path / "version_0")).Reload()
    assert [image.step for image in events.Images("samples")] == [0, 2]


def test_a_datamodule_without_samples_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sample_batches"):
        toy_trainer(tmp_path, [grid()]).fit(Painted(), ToyLoader())

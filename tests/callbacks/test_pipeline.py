"""The sample grid and the export with the real module, data and pipeline."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from micro import micro_folder, micro_shards
from toy import toy_trainer

from callbacks import EMA, Export, NonFiniteGuard, SampleGrid, Throughput
from data_pipeline.datamodule import ShardDataModule
from lightning_modules.kontext import KontextModule
from lightning_modules.pipelines import KontextPipeline


def test_kontext_is_drawn_from_step_0_and_exported(tmp_path: Path) -> None:
    data = ShardDataModule([str(micro_shards(tmp_path / "shards"))], batch_size=2, steps=4, val_batches=1)
    module, ema, speed = KontextModule(str(micro_folder(tmp_path / "model")), steps=4), EMA(0.9), Throughput(1e12, 2)
    before = torch.get_rng_state()
    grid = SampleGrid(2, num_samples=2, num_inference_steps=2, guidance_scale=2.0, seed=0)
    toy_trainer(tmp_path, [grid, ema, speed, NonFiniteGuard(), Export()], max_steps=4).fit(module, datamodule=data)
    assert speed.samples_seen == 8
    assert torch.equal(torch.get_rng_state(), before)

    run = tmp_path / "version_0"
    pictures = {p.name: np.asarray(PIL.Image.open(p)) for p in (run / "samples").iterdir()}
    assert sorted(pictures) == ["step_000000.png", "step_000002.png", "step_000004.png"]
    assert len({picture.shape for picture in pictures.values()}) == 1
    assert not np.array_equal(pictures["step_000000.png"], pictures["step_000004.png"])

    exported = KontextPipeline.from_pretrained(run / "export").transformer
    weights = dict(exported.named_parameters())
    averaged = {name.removeprefix("transformer."): value for name, value in ema.shadow.items()}
    assert averaged.keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in averaged.items())

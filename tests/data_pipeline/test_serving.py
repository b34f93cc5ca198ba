"""From shards to batches: geometry, colours, the cache, and exact resumption under a Trainer."""

from __future__ import annotations

import io
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from micro import micro_shards
from PIL import Image

from data_pipeline.batches import ImageBatch, collate_references
from data_pipeline.cache import build_cache
from data_pipeline.counters import draw, generator
from data_pipeline.datamodule import SceneShards, ShardDataModule
from data_pipeline.errors import InputError
from data_pipeline.index import load_index
from data_pipeline.transforms import check_size, decode, fit_size, to_tensor


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_shards(tmp_path_factory.mktemp("shards") / "scenes"))


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((600, 800), (384, 512)), ((512, 512), (512, 512)), ((100, 1000), (64, 512)), ((1, 1000), (32, 512))],
)
def test_the_released_size_rule(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_size(*size, 512, 32) == expected


def test_a_resolution_that_does_not_divide_is_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(InputError, match=r"image_size 70 is not divisible by size_multiple 16.*use 64"):
        check_size(70, 16)


def test_decoding_turns_upright_and_puts_transparency_over_white() -> None:
    picture = Image.new("RGB", (4, 2), (0, 0, 0))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    assert decode(encoded(picture, exif=exif)).size == (2, 4)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9] * 256)
    assert decode(encoded(palette, transparency=0)).getpixel((1, 1)) == (255, 255, 255)


def test_pixels_survive_and_height_comes_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels), (16, 32))
    assert tensor.shape == (3, 16, 32)
    assert np.array_equal(((tensor + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8), pixels)
    assert tensor.min() >= -1 and tensor.max() <= 1


def test_references_stack_only_where_equal() -> None:
    small, large = torch.zeros(3, 4, 4), torch.zeros(3, 8, 4)
    assert collate_references([[], []]) is None
    assert collate_references([[small, small], [small, small]]).shape == (2, 2, 3, 4, 4)
    assert isinstance(collate_references([[small], [small, large]]), list)
    assert isinstance(collate_references([[small, large], [small, large]]), list)


def test_draws_are_functions_of_their_counters() -> None:
    ids, epochs = torch.tensor([5, 9]), torch.tensor([0, 1])
    both = draw(torch.randn, (3,), 1, "noise", epochs, ids)
    assert torch.equal(both[1:], draw(torch.randn, (3,), 1, "noise", epochs[1:], ids[1:]))
    others = [(2, "noise", 0, 5), (1, "sigma", 0, 5), (1, "noise", 1, 5), (1, "noise", 0, 6)]
    assert all(not torch.equal(both[0], torch.randn(3, generator=generator(*other))) for other in others)


def module(folder: str, **options) -> ShardDataModule:
    defaults = {"shards": [folder], "batch_size": 4, "steps": 12, "seed": 1, "ratio": {"edit": 2, "text_to_image": 1}}
    return ShardDataModule(**{**defaults, **options})


def test_batches_have_the_stated_shapes_and_ranges(shards: str) -> None:
    data = module(shards)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [b.task for b in batches[:3]] == ["edit", "text_to_image", "edit"] and len(batches) == 12
    edit, caption = batches[0], batches[1]
    assert edit.target.shape == (4, 3, 64, 64) and edit.references.shape == (4, 1, 3, 64, 64)
    assert caption.references is None and len(caption) == len(caption.prompts) == 4
    assert edit.target.dtype == torch.float32 and edit.target.min() >= -1 and edit.target.max() <= 1
    assert {r.split for r in data.records if r.key in edit.keys} == {"train"}


def test_validation_and_sample_batches_are_held_out(shards: str) -> None:
    data = module(shards, val_batches=2)
    data.setup("fit")
    splits = {record.key: record.split for record in data.records}
    batches = [*data.val_dataloader(), *data.sample_batches(2)]
    assert {b.task for b in batches} == {"edit", "text_to_image"}
    assert {splits[key] for batch in batches for key in batch.keys} == {"val"}
    assert all(
        torch.equal(a.target, b.target) for a, b in zip(data.sample_batches(2), data.sample_batches(2), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shards": ["nowhere"]}, "there is no folder of shards at nowhere"),
        ({"shards": [], "scenes": None}, "there is no data"),
        ({"image_size": 60}, "not divisible"),
        ({"ratio": {"video": 1}}, "ratio asks for video"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_named(shards: str, options: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        module(shards, **options).setup("fit")


class Mean:
    """An encoder whose moments are the means of 4 x 4 pixels."""

    def __init__(self, fingerprint: str = "mean") -> None:
        self.fingerprint, self.calls = fingerprint, 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.avg_pool2d(pixels, 4)


class Recorder(L.LightningModule):
    """Trains one number and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.encoder = Mean()

    def latent_encoder(self) -> Mean:
        return self.encoder

    def training_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(batch.sample_ids.tolist()))
        self.encoded = batch.encoded
        return self.weight * batch.target.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(
    shards: str, folder: Path, steps: int, checkpoint: str | None = None, **options
) -> tuple[Recorder, L.Trainer]:
    accumulation = options.pop("accumulation", 1)
    recorder = Recorder()
    data = module(shards, steps=6 * accumulation, **options)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        accumulate_grad_batches=accumulation,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return recorder, trainer


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 1), (0, 2)])
def test_resuming_continues_the_sequence_of_samples(
    shards: str, tmp_path: Path, workers: int, accumulation: int
) -> None:
    whole, _ = train(shards, tmp_path, 6, accumulation=accumulation)
    part, trainer = train(shards, tmp_path, 2, accumulation=accumulation, num_workers=workers)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    rest, _ = train(shards, tmp_path, 6, str(tmp_path / "two.ckpt"), accumulation=accumulation, num_workers=workers)
    assert len(whole.seen) == 6 * accumulation
    assert part.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)


def test_resuming_on_other_data_is_refused(shards: str, tmp_path: Path) -> None:
    _, trainer = train(shards, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="trained on other data, or in another order"):
        train(shards, tmp_path, 6, str(tmp_path / "two.ckpt"), batch_size=2)


def test_the_cache_serves_what_the_encoder_gives(shards: str, tmp_path: Path) -> None:
    recorder, trainer = train(shards, tmp_path, 3, cache=str(tmp_path / "cache"))
    assert recorder.encoded and recorder.encoder.calls > 0
    data = trainer.datamodule
    batch = next(iter(data.train_dataloader()))
    data._cache = None
    pixels = next(iter(data.train_dataloader()))
    assert batch.keys == pixels.keys
    assert torch.equal(batch.target, Mean().encode(pixels.target))
    assert torch.equal(batch.references[:, 0], Mean().encode(pixels.references[:, 0]))
    again, _ = train(shards, tmp_path, 3, cache=str(tmp_path / "cache"))
    assert again.encoder.calls == 0 and torch.equal(again.weight, recorder.weight)


def test_another_encoder_or_content_gets_another_cache(shards: str, tmp_path: Path) -> None:
    record = load_index(Path(shards))[0]
    item = (record.members["image"].sha256, (64, 64))

    def load(*_: object) -> torch.Tensor:
        return torch.zeros(3, 64, 64)

    folders = {
        build_cache(tmp_path, Mean("a"), {item: (record, "image")}, load),
        build_cache(tmp_path, Mean("b"), {item: (record, "image")}, load),
        build_cache(tmp_path, Mean("a"), {(item[0], (32, 32)): (record, "image")}, lambda *_: torch.zeros(3, 32, 32)),
    }
    assert len(folders) == 3


def test_missing_scene_shards_are_built_once(tmp_path: Path) -> None:
    scenes = SceneShards(level=1, count_text_image=32, count_edit=32, root=str(tmp_path))
    for _ in range(2):
        data = ShardDataModule(scenes=scenes, batch_size=2, steps=1)
        data.prepare_data()
        data.setup("fit")
    assert len(data.records) == 64 and len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1

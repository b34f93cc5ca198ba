"""From shards to batches: geometry, colours, the cache, and exact resumption under a Trainer."""

from __future__ import annotations

import io
import json
import random
import threading
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from micro import micro_shards
from PIL import Image

from data_pipeline.batches import ImageBatch, collate_references
from data_pipeline.cache import FeatureStore
from data_pipeline.counters import draw, generator
from data_pipeline.datamodule import Cache, SceneShards, ShardDataModule
from data_pipeline.dataset import Augmentation, content_name
from data_pipeline.errors import InputError
from data_pipeline.index import load_index
from data_pipeline.plan import Draw
from data_pipeline.recipe import Recipe
from data_pipeline.select import Selection, select
from data_pipeline.sources import Manifest, Scenes
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


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where data/index is made


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
    assert {r.split for r in load_index(Path(shards)) if r.key in edit.keys} == {"train"}


def test_validation_and_sample_batches_are_held_out(shards: str) -> None:
    data = module(shards, val_batches=2)
    data.setup("fit")
    splits = {record.key: record.split for record in load_index(Path(shards))}
    batches = [*data.val_dataloader(), *data.sample_batches(2)]
    assert {b.task for b in batches} == {"edit", "text_to_image"}
    assert {splits[key] for batch in batches for key in batch.keys} == {"val"}
    assert all(
        torch.equal(a.target, b.target) for a, b in zip(data.sample_batches(2), data.sample_batches(2), strict=True)
    )


def test_mixed_batches_hold_captions_and_edits_side_by_side(shards: str) -> None:
    data = module(shards, mixing="mixed", batch_size=6)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.task == "mixed" and sorted(batch.tasks) == ["edit"] * 4 + ["text_to_image"] * 2
    assert [len(images) for images in batch.references] == [int(task == "edit") for task in batch.tasks]


def test_sets_may_be_named_by_folder(shards: str, tmp_path: Path) -> None:
    captions = str(micro_shards(tmp_path / "captions", 16, 0))
    data = module(shards, shards={"scenes": [shards], "captions": [captions]}, ratio=None)
    data.setup("fit")
    assert set(data.ratio) == {"scenes.edit", "scenes.text_to_image", "captions"}
    tasks = {(b.task, b.keys[0].split("-")[0]) for b in data.train_dataloader()}
    assert tasks == {("edit", "edit"), ("text_to_image", "caption")}


def test_resolutions_follow_each_other(shards: str, tmp_path: Path) -> None:
    recorder, trainer = train(shards, tmp_path, 6, image_size={0: 32, 4: 64})
    assert recorder.sides == [32] * 4 + [64] * 2
    part, trainer = train(shards, tmp_path, 5, image_size={0: 32, 4: 64})
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    rest, _ = train(shards, tmp_path, 6, str(tmp_path / "five.ckpt"), image_size={0: 32, 4: 64})
    assert part.seen + rest.seen == recorder.seen and torch.equal(rest.weight, recorder.weight)


def test_mirroring_takes_target_and_references_alike_and_spares_texts_with_sides(shards: str) -> None:
    plain, flipped = (module(shards, augmentation=Augmentation(flip=p), steps=30) for p in (0.0, 1.0))
    for data in (plain, flipped):
        data.setup("fit")
    turned = 0
    for before, after in zip(plain.train_dataloader(), flipped.train_dataloader(), strict=True):
        for i, prompt in enumerate(before.prompts):
            sided = bool({"left", "right"} & set(prompt.split()))
            turned += not sided
            assert torch.equal(after.target[i], before.target[i] if sided else before.target[i].flip(-1))
            if before.references is not None:
                reference = before.references[i, 0]
                assert torch.equal(after.references[i, 0], reference if sided else reference.flip(-1))
    assert turned > 10
    some = Augmentation(flip=0.5, seed=3)
    record = load_index(Path(shards))[0]
    draws = [some.mirrored(Draw(("edit", ()), 0, epoch), record, "a cat") for epoch in range(200)]
    assert 70 < sum(draws) < 130


@pytest.mark.parametrize(
    ("prompt", "sided"),
    [
        ("move it to the left.", True),
        ("the top-left corner", True),
        ("a left-hand drive car", True),
        ("the cup (right)", True),
        ("Right of the tree", True),
        ("the leftmost of three, upper_left", True),
        ("the bottomright square", True),
        ("a bright, upright copyright sign", False),
        ("a cleft rock", False),
    ],
)
def test_a_text_that_speaks_of_a_side_is_never_mirrored(shards: str, prompt: str, sided: bool) -> None:
    record = load_index(Path(shards))[0]
    assert Augmentation(flip=1.0).mirrored(Draw(("edit", ()), 0, 0), record, prompt) is not sided


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shards": ["nowhere"]}, "there is no folder of shards at nowhere"),
        ({"shards": [], "scenes": None}, "there is no data"),
        ({"image_size": 60}, "not divisible"),
        ({"image_size": {5: 64}}, "begins at step 5"),
        ({"ratio": {"video": 1}}, "asks for video, but there are no training records"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"val_batches": -3}, "data.val_batches is -3"),
        ({"val_fraction": -1.0}, "data.val_fraction is -1"),
        ({"val_fraction": float("nan")}, "data.val_fraction is nan"),
        ({"val_fraction": 1.5}, "data.val_fraction is 1.5"),
        ({"ratio": {}}, "data.ratio is {}"),
        ({"ratio": {"edit": 0, "text_to_image": 0}}, "one of them above 0"),
        ({"ratio": {"edit": 1, "text_to_image": -1}}, "numbers of 0 or more"),
        ({"ratio": {"edit": float("nan")}}, "numbers of 0 or more"),
        ({"ratio": {"edit": float("inf")}}, "numbers of 0 or more"),
    ],
)
def test_wrong_options_are_named(shards: str, options: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        module(shards, **options).setup("fit")


def test_a_folder_that_is_named_twice_is_refused(shards: str) -> None:
    with pytest.raises(InputError, match="more than once"):
        module(shards, shards=[shards, f"{shards}/../{Path(shards).name}/"]).setup("fit")


def test_sets_that_a_ratio_leaves_out_or_misspells_are_told(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    module(shards, ratio={"edit": 1, "edits": 0}).setup("fit")
    assert "leaves out text_to_image" in caplog.text and "names edits, of which" in caplog.text


def test_a_selection_that_keeps_nothing_is_named(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "shards", 4, 0)
    select(folder, Selection(where=["text_length > 9999"]))
    with pytest.raises(InputError, match=r"keep.parquet keeps 0 records"):
        module(str(folder)).setup("fit")


def test_shards_without_anything_to_train_on_are_named(tmp_path: Path) -> None:
    row = {"prompt": "a cat"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    Recipe(Manifest(str(tmp_path / "prompts.jsonl"), "prompts")).build(tmp_path / "out")
    with pytest.raises(InputError, match=r"no record of .* can be trained on here"):
        module(str(tmp_path / "out")).setup("fit")


def test_small_buckets_are_warned_of_and_batches_by_tokens(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    data = module(shards, batch_size=100)
    data.setup("fit")
    assert "samples for batches of 100 on 1 ranks: batches are smaller" in caplog.text
    data = module(shards, batch_tokens=32, size_multiple=16)
    data.setup("fit")
    assert {b.task: len(b) for b in data.train_dataloader()} == {"edit": 1, "text_to_image": 2}


class Mean:
    """An encoder whose moments are the means of 4 x 4 pixels."""

    def __init__(self, fingerprint: str = "mean") -> None:
        self.fingerprint, self.calls, self.store = fingerprint, 0, None
        self.devices: list[str] = []

    def to(self, device: torch.device | str) -> None:
        self.devices.append(str(device))

    def encode(self, inputs: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.calls += len(inputs)
        return [{"moments": torch.nn.functional.avg_pool2d(pixels, 4)} for pixels in inputs]


class Recorder(L.LightningModule):
    """Trains one number and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.sides: list[int] = []
        self.encoder = Mean()

    def latent_encoder(self) -> Mean:
        return self.encoder

    def training_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(batch.sample_ids.tolist()))
        self.sides.append(batch.target.shape[-1])
        self.encoded = batch.encoded
        return self.weight * batch.target.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(
    shards: str, folder: Path, steps: int, checkpoint: str | None = None, **options
) -> tuple[Recorder, L.Trainer]:
    accumulation = options.pop("accumulation", 1)
    recorder = Recorder()
    data = module(shards, steps=max(6, steps) * accumulation, **options)
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


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (1, 1), (2, 1), (0, 2)])
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


def test_the_ledger_of_a_trainer_stopped_again_and_again(shards: str, tmp_path: Path) -> None:
    """Workers, accumulation, batch size and ratio change at every stop: each sample comes exactly once an epoch."""
    rng = random.Random(0)
    checkpoint, seen, steps = None, Counter(), 0
    for stop in range(6):
        steps += rng.randint(1, 3)
        ratio = {"edit": rng.choice([1, 2]), "text_to_image": rng.choice([0, 1])}
        options = {"batch_size": rng.randint(1, 5), "num_workers": stop % 3, "ratio": ratio}
        recorder, trainer = train(shards, tmp_path, steps, checkpoint, accumulation=rng.randint(1, 3), **options)
        for ids in recorder.seen:
            seen.update(ids)
        checkpoint = str(tmp_path / f"{stop}.ckpt")
        trainer.save_checkpoint(checkpoint)
    cursors = {name: n for name, n in trainer.datamodule.state_dict()["plans"][0]["cursors"].items()}
    assert sum(seen.values()) == sum(cursors.values()) and steps > 6
    for name, part in (("edit 64x64+64x64", "edit"), ("text_to_image 64x64", "caption")):
        counts = [seen[r.sample_id] for r in load_index(Path(shards)) if r.key.startswith(part) and r.split == "train"]
        epochs = cursors.get(name, 0) // len(counts)
        assert set(counts) <= {epochs, epochs + 1} and sum(counts) == cursors.get(name, 0)


def test_resuming_on_other_data_is_refused(shards: str, tmp_path: Path) -> None:
    _, trainer = train(shards, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="trained on other samples, or on other sizes"):
        train(shards, tmp_path, 6, str(tmp_path / "two.ckpt"), val_fraction=0.5, image_size=32)


@pytest.mark.parametrize("fill", ["ahead", "lazy"])
def test_the_cache_serves_what_the_encoder_gives(shards: str, tmp_path: Path, fill: str) -> None:
    cache = Cache(str(tmp_path / "cache"), fill)
    _, trainer = train(shards, tmp_path, 3, cache=cache)
    encoder = Mean()
    data = trainer.datamodule
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    data._store = None
    pixels = next(iter(data.train_dataloader()))
    assert batch.keys == pixels.keys
    if fill == "ahead":
        assert batch.encoded and torch.equal(
            batch.target, torch.stack([e["moments"] for e in encoder.encode([*pixels.target])])
        )
    again, _ = train(shards, tmp_path, 3, cache=cache)
    assert fill == "lazy" or (again.encoder.calls == 0 and again.encoded)


def test_a_cache_that_must_be_there_and_is_not_is_named(shards: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"no entry of the encoder mean for 135 of 135 pictures, first .* 64x64"):
        train(shards, tmp_path, 3, cache=Cache(folder, "never"))
    FeatureStore(folder, "another")
    with pytest.raises(InputError, match=r"it holds those of other encoders: another\); fill it with python -m"):
        train(shards, tmp_path, 3, cache=Cache(folder, "never"))
    train(shards, tmp_path, 3, cache=Cache(folder), ratio={"edit": 1})
    with pytest.raises(InputError, match=r"for 4\d of 135 pictures"):
        train(shards, tmp_path, 3, cache=Cache(folder, "never"))
    assert train(shards, tmp_path, 3, cache=Cache(folder, "never"), ratio={"edit": 1})[0].encoded


def test_the_cache_is_filled_on_the_device_that_trains(shards: str, tmp_path: Path) -> None:
    recorder, trainer = train(shards, tmp_path, 1, cache=Cache(str(tmp_path / "cache")))
    assert recorder.encoder.devices == [str(trainer.strategy.root_device), "cpu"]


def test_another_way_to_make_pixels_does_not_meet_old_entries(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load_index(Path(shards))[0]
    name = next(name for name, member in record.members.items() if member.width)
    before = content_name(record, name, (64, 64), False)
    monkeypatch.setattr("data_pipeline.dataset.REVISION", 2)
    assert before != content_name(record, name, (64, 64), False)


def test_missing_scene_shards_are_built_once(tmp_path: Path) -> None:
    scenes = SceneShards(level=1, count_text_image=32, count_edit=32, root=str(tmp_path))
    for _ in range(2):
        data = ShardDataModule(scenes=scenes, batch_size=2, steps=1)
        data.prepare_data()
        data.setup("fit")
    index = data.indexes[0]
    assert sum(count for part in index.streams.values() for count in part.values()) == 64
    assert len([path for path in tmp_path.glob("level1-*") if path.is_dir()]) == 1


def test_scenes_of_two_levels_keep_their_own_sizes(tmp_path: Path) -> None:
    few = SceneShards(2, 32, 0, tasks={"counting": 1, "colors": 2}, name="harder", root=str(tmp_path / "scenes"))
    many = SceneShards(1, 32, 32, root=str(tmp_path / "scenes"))
    data = ShardDataModule(scenes=[many, few], batch_size=2, image_size=96, upscale=False, index_root=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    small, large = ((64, 64),), ((96, 96),)
    assert set(data.indexes[0].streams["train"]) == {
        ("text_to_image", small), ("edit", ((64, 64), (64, 64))), ("harder", large)
    }  # fmt: skip
    source = few.recipe().source
    assert {record.metadata["task"] for unit in source.units(30) for record in source.read(unit)} == set(few.tasks)
    for batch in data.first_batches():
        assert batch.task in ("text_to_image", "edit") and batch.target.shape[-1] in (64, 96)


@pytest.mark.parametrize(("level", "tasks"), [(1, {"colours": 1.0}), (1, {"colors": 0.0}), (3, {"colors": 1.0})])
def test_shares_of_tasks_that_no_caption_could_have_are_refused(level: int, tasks: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"source\.tasks"):
        Scenes(level, 8, 8, tasks=tasks)


def test_a_thread_s_mistake_is_the_loop_s_and_leaving_early_ends_it(shards: str) -> None:
    data = module(shards)
    data.setup("fit")
    before = threading.active_count()
    for _ in data.train_dataloader():
        break
    assert threading.active_count() == before
    loader = data.train_dataloader()
    loader.loader.dataset.indexes = []  # a mistake in the middle
    with pytest.raises(IndexError):
        list(loader)
    assert threading.active_count() == before

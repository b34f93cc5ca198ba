"""Cached, lazy and online encoding train alike, bit for bit; in bfloat16 they do too."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL
from micro import micro_folder, micro_metaquery, micro_shards

from data_pipeline.cache import FeatureStore
from data_pipeline.datamodule import Cache, ShardDataModule
from data_pipeline.dataset import Augmentation
from lightning_modules.connector import ConnectorModule
from lightning_modules.kontext import KontextModule
from lightning_modules.networks.compute import Compute
from lightning_modules.pipelines import KontextPipeline, encoders
from lightning_modules.pipelines import kontext as pipelines
from lightning_modules.pipelines.kontext import FROZEN


class Losses(L.Callback):
    def __init__(self) -> None:
        self.found: list[str] = []
        self.encoded: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(outputs["loss"].item().hex())
        self.encoded.append(batch.encoded)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("encodings")
    return str(micro_folder(folder / "model")), str(micro_shards(folder / "shards", 24, 24))


def losses(built: tuple[str, str], work: Path, cache: Cache | None, workers: int = 0, **options) -> Losses:
    module = options.pop("module", None)
    module = module or KontextModule(built[0], steps=8, max_sequence_length=8, text_cache=cache and cache.folder)
    precision = options.pop("precision", "32-true")
    data = ShardDataModule(
        [built[1]], batch_size=3, size_multiple=16, steps=8, cache=cache, num_workers=workers,
        index_root=str(work / "index"), **options,
    )  # fmt: skip
    seen = Losses()
    trainer = L.Trainer(
        max_steps=8, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[seen],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=work, limit_val_batches=0,
        precision=precision,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return seen


OPTIONS = [{}, {"mixing": "mixed"}, {"augmentation": Augmentation(flip=0.5)}, {"precision": "bf16-mixed"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_cached_lazy_and_online_encoding_give_the_same_losses(
    built: tuple[str, str], tmp_path: Path, options: dict
) -> None:
    online = losses(built, tmp_path, None, **options)
    ahead = losses(built, tmp_path, Cache(str(tmp_path / "ahead")), workers=1, **options)
    lazy = losses(built, tmp_path, Cache(str(tmp_path / "lazy"), "lazy"), **options)
    again = losses(built, tmp_path, Cache(str(tmp_path / "lazy"), "lazy"), **options)
    never = losses(built, tmp_path, Cache(str(tmp_path / "ahead"), "never"), **options)
    assert online.found == ahead.found == lazy.found == again.found == never.found and len(set(online.found)) > 1
    assert not any(online.encoded) and not any(lazy.encoded)
    assert all(ahead.encoded) and all(again.encoded) and all(never.encoded)


def test_where_caches_hold_all_no_encoder_is_loaded(
    built: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for what is trained on, nor to tell whose the caches are; what ends a run's log is the same."""
    first = losses(built, tmp_path, Cache(str(tmp_path / "cache")))
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("the autoencoder was loaded"))
    monkeypatch.setattr(pipelines, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    module = KontextModule(built[0], steps=8, max_sequence_length=8, text_cache=str(tmp_path / "cache"))
    again = losses(built, tmp_path, Cache(str(tmp_path / "cache")), module=module)
    assert again.found == first.found and all(again.encoded) and len(set(again.found)) == 8
    assert module._pipeline.put_off_parts == {*FROZEN}
    with pytest.raises(pytest.fail.Exception, match="a text encoder"):
        module._prompts(["a text that no shard has"])


def test_the_posterior_is_sampled_anew_each_epoch(built: tuple[str, str], tmp_path: Path) -> None:
    module = KontextModule(built[0], max_sequence_length=8)
    module.configure_model()
    data = ShardDataModule([built[1]], batch_size=2, size_multiple=16, index_root=str(tmp_path / "index"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    first, _ = module.encode(batch)
    batch.epochs = batch.epochs + 1
    second, _ = module.encode(batch)
    assert not torch.equal(first, second) and (first - second).abs().max() < 1


def test_what_was_encoded_while_training_is_kept(built: tuple[str, str], tmp_path: Path) -> None:
    """Texts that did not fit in memory ahead are written at the end, few as they are."""
    cache = Cache(str(tmp_path / "cache"), "lazy")
    module = KontextModule(built[0], steps=2, max_sequence_length=8, text_cache=cache.folder)
    module.configure_model()
    module._prompts(["a text that no shard has"])
    module.teardown("fit")
    assert "a text that no shard has" in FeatureStore(cache.folder, module._prompts.encoder.fingerprint)


def test_weights_are_hashed_only_for_a_cache(built: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "weights_of", lambda *modules: pytest.fail("hashed"))
    module = KontextModule(built[0], max_sequence_length=8)
    module.configure_model()
    with pytest.raises(pytest.fail.Exception, match="hashed"):
        assert module.latent_encoder().fingerprint


@pytest.mark.parametrize("options", OPTIONS[1:3])
def test_a_vlm_reads_the_same_pixels_beside_cached_moments(
    built: tuple[str, str], tmp_path: Path, options: dict
) -> None:
    folder, found = str(micro_metaquery(tmp_path / "metaquery")), []
    caches = (None, Cache(str(tmp_path / "ahead")), Cache(str(tmp_path / "ahead")))
    for features, cache in zip((None, str(tmp_path / "features"), str(tmp_path / "features")), caches, strict=True):
        module = ConnectorModule(folder, train=["connector", "transformer"], steps=8, feature_cache=features)
        found.append(losses(built, tmp_path, cache, module=module, reference_pixels=True, **options))
    assert found[0].found == found[1].found == found[2].found and all(found[1].encoded) and not any(found[0].encoded)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_texts_encoded_ahead_are_those_that_a_run_looks_up(
    built: tuple[str, str], tmp_path: Path, precision: str
) -> None:
    """Whatever the precision of the files, which for SD3.5-Medium is float16."""
    folder = tmp_path / "half"
    pipeline = KontextPipeline.from_pretrained(built[0], text_dtype=torch.float16)
    pipeline.save_pretrained(folder)
    ahead = encoders.TextEncoder.from_pretrained(str(folder), precision)
    module = KontextModule(str(folder), compute=Compute(frozen=precision))
    module.configure_model()
    assert ahead.fingerprint == module._prompts.encoder.fingerprint


def test_validation_alone_moves_the_frozen_parts(built: tuple[str, str], tmp_path: Path) -> None:
    for module in (KontextModule(built[0]), ConnectorModule(str(micro_metaquery(tmp_path / "metaquery")))):
        module.configure_model()
        module.to("meta").on_validation_start()
        assert next(module._pipeline.vae.parameters()).device.type == "meta"

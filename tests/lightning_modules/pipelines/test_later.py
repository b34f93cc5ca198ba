"""Parts that are loaded when something asks: the same pipeline, and files that are told apart without being read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from micro import built, micro_folder

from data_pipeline.cache import FeatureStore
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.encoders import LatentEncoder, TextEncoder
from lightning_modules.pipelines.kontext import FROZEN, TEXT_ENCODERS


def later(folder: Path | None = None) -> KontextPipeline:
    return KontextPipeline.from_pretrained(folder or built(), later=FROZEN)


def test_what_is_loaded_later_draws_and_is_written_the_same(tmp_path: Path) -> None:
    whole, parts = KontextPipeline.from_pretrained(built()), later()
    assert parts.put_off_parts == {*FROZEN}
    assert (parts.vae_scale_factor, parts.text_tokens) == (whole.vae_scale_factor, whole.text_tokens)
    assert parts.device == whole.device and parts.put_off_parts == {*FROZEN}

    def drawn(pipeline: KontextPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red circle", num_inference_steps=1, generator=generator, output_type="pt").images

    assert torch.equal(drawn(parts), drawn(whole)) and not parts.put_off_parts
    parts.let_go(FROZEN)
    parts.save_pretrained(tmp_path / "export")
    assert torch.equal(drawn(KontextPipeline.from_pretrained(tmp_path / "export")), drawn(whole))


def test_parts_are_loaded_where_the_pipeline_is_and_one_at_a_time() -> None:
    pipeline = later().to("meta")
    assert pipeline.put_off_parts == {*FROZEN} and pipeline.device.type == "meta"
    with torch.inference_mode():
        assert pipeline.vae.device.type == "meta" and not pipeline.vae.encoder.conv_in.weight.is_inference()
    assert pipeline.put_off_parts == {*TEXT_ENCODERS}
    alone = KontextPipeline.from_pretrained(built(), later=(*FROZEN, "transformer")).to("meta")
    assert alone.device.type == "meta" and "transformer" in alone.put_off_parts
    assert pipeline.components.keys() == KontextPipeline.from_pretrained(built()).components.keys()
    assert not pipeline.put_off_parts


def test_a_part_that_cannot_be_loaded_is_named_each_time_it_is_asked_for(tmp_path: Path) -> None:
    pipeline = later(micro_folder(tmp_path / "model"))
    (tmp_path / "model" / "text_encoder" / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"text_encoder holds no \*\.safetensors"):
            assert pipeline.text_encoder


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_store_is_found_without_the_weights_and_never_anothers(kind: str, tmp_path: Path) -> None:
    folder, root = micro_folder(tmp_path / "model"), tmp_path / "cache"
    part = "vae" if kind == "latents" else "text_encoder"

    def store(length: int | None = None) -> tuple[FeatureStore, bool]:
        """The store, and whether the encoder was loaded for it."""
        pipeline = later(folder)
        if length is not None:
            pipeline.limit_t5(length)
        encoder = LatentEncoder.of(pipeline) if kind == "latents" else TextEncoder(pipeline)
        return FeatureStore.of(root, encoder), part not in pipeline.put_off_parts

    (first, loaded), (again, reloaded) = store(), store()
    assert loaded and not reloaded and again.folder == first.folder
    if kind == "texts":
        assert store(length=5)[0].folder != first.folder
    (file,) = (folder / part).glob("*.safetensors")
    facts, data = file.stat(), bytearray(file.read_bytes())
    data[-3000:] = bytes(3000)
    file.write_bytes(data)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as an archive that was unpacked with its times
    other, loaded = store()
    assert loaded and other.folder != first.folder

"""The pipeline: stock diffusers' text-to-image, edits of one and several pictures, and its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from micro import micro_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.kontext import EDIT_NEGATIVE_PROMPT, FROZEN
from lightning_modules.preflight import weights


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> KontextPipeline:
    return KontextPipeline.from_pretrained(micro_folder(tmp_path_factory.mktemp("micro") / "folder"))


def picture(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_exports_load_in_stock_diffusers_and_give_the_same_pictures(pipeline: KontextPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert {library for library, _ in (v for v in index.values() if isinstance(v, list))} <= {
        "diffusers",
        "transformers",
        None,
    }
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    ours = KontextPipeline.from_pretrained(tmp_path / "export")
    assert isinstance(ours.transformer, KontextTransformer)
    options = {
        "height": 32,
        "width": 64,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "latents": torch.randn(2, 2, 8, 16, generator=seeded()),
        "output_type": "latent",
    }
    expected = stock(["a red circle", "b"], max_sequence_length=pipeline.t5_tokens, **options).images
    found = ours(["a red circle", "b"], **options).images
    assert (expected - found).abs().max() / expected.abs().max() < 1e-5


def test_forms_of_references(pipeline: KontextPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 2.0}
    one = pipeline("x", image=picture(), generator=seeded(), **options).images
    assert one.shape == (1, 32, 32, 3) and one.min() >= 0 and one.max() <= 1
    listed = pipeline(["x"], image=[picture()], generator=seeded(), **options).images
    nested = pipeline(["x"], image=[[picture()]], generator=seeded(), **options).images
    assert np.array_equal(one, listed) and np.array_equal(one, nested)
    mixed = [[picture()], [], [picture((48, 16)), picture((16, 16))]]
    assert pipeline(["a", "b", "c"], image=mixed, height=32, width=32, **options).images.shape == (3, 32, 32, 3)


def test_the_output_follows_the_picture(pipeline: KontextPipeline) -> None:
    assert pipeline("x", image=picture((50, 30)), num_inference_steps=1).images[0].size == (48, 32)
    assert pipeline("x", num_inference_steps=1).images[0].size == (64, 64)


def test_a_reference_changes_the_result_and_guidance_1_ignores_the_negative(pipeline: KontextPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32, "guidance_scale": 1.0}
    results = [
        pipeline("x", image=image, generator=seeded(), negative_prompt=negative, **options).images
        for image, negative in ((picture(), None), (picture(), "other"), (picture(seed=1), None))
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_edits_use_the_released_negative_prompt(pipeline: KontextPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    default = pipeline("x", image=picture(), generator=seeded(), **options).images
    named = pipeline("x", image=picture(), generator=seeded(), negative_prompt=EDIT_NEGATIVE_PROMPT, **options).images
    assert torch.equal(default, named)


def test_embeddings_replace_prompts_and_encoders(pipeline: KontextPipeline) -> None:
    sequence, pooled = pipeline.encode_unique(["a", "b", "a"])
    assert torch.equal(sequence[0], sequence[2]) and not torch.equal(sequence[0], sequence[1])
    assert sequence.shape == (3, pipeline.text_tokens, 16)
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0, "height": 32, "width": 32}
    by_text = pipeline(["a", "b", "a"], generator=seeded(), **options).images
    by_embeds = pipeline(prompt_embeds=sequence, pooled_prompt_embeds=pooled, generator=seeded(), **options).images
    torch.testing.assert_close(by_text, by_embeds)


def test_mistakes_are_named(pipeline: KontextPipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be multiples of 16.*use 64 and 32"):
        pipeline("x", height=60, width=30)
    with pytest.raises(ValueError, match="for each of 2 prompts, got 1"):
        pipeline(["a", "b"], image=[picture()])
    for options in ({"output_type": "jpeg"}, {"num_inference_steps": 0}):
        with pytest.raises(CheckpointError, match="expected one of pil, np, pt, latent and at least 1 step"):
            pipeline("x", **options)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        KontextPipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"model_index.json is missing"):
        KontextPipeline.from_pretrained(tmp_path / "empty")
    folder = micro_folder(tmp_path / "folder")
    (folder / "transformer").rename(folder / "dit")
    with pytest.raises(CheckpointError, match=r"lacks transformer; it has .*dit"):
        KontextPipeline.from_pretrained(folder)


def without(folder: Path, part: str, name: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})


def misshapen(folder: Path, part: str, name: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    save_file({**load_file(file), name: torch.zeros(3)}, file, metadata={"format": "pt"})


def moved(folder: Path, part: str, name: str) -> None:
    next((folder / part).glob("*.safetensors")).rename(folder / part / name)


def unfinished(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    half = folder / ".cache" / "huggingface" / "download" / "transformer" / "x.incomplete"
    half.parent.mkdir(parents=True)
    half.touch()


SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
DAMAGE = {
    "T5 lacks a weight": (
        lambda f: without(f, "text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        r"text_encoder_3.*\n  1 missing: encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
    "CLIP of another shape": (
        lambda f: misshapen(f, "text_encoder", "text_projection.weight"),
        r"text_encoder.*\n  1 misshapen: text_projection.weight is \[3\]",
    ),
    "CLIP's config": (lambda f: (f / "text_encoder_2" / "config.json").write_text("{"), "text_encoder_2"),
    "no T5": (lambda f: shutil.rmtree(f / "text_encoder_3"), "lacks text_encoder_3"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks tokenizer_2"),
    "no words": (lambda f: (f / "tokenizer_3" / "tokenizer.json").unlink(), "tokenizer_3 holds no tokenizer"),
    "a part of T5": (
        lambda f: moved(f, "text_encoder_3", "model-00001-of-00002.safetensors"),
        r"incomplete: model-00002-of-00002\.safetensors are missing; download them again",
    ),
    "a part of the autoencoder": (
        lambda f: moved(f, "vae", "diffusion_pytorch_model-00002-of-00002.safetensors"),
        r"incomplete: diffusion_pytorch_model-00001-of-00002\.safetensors are missing",
    ),
    "a pickle for T5": (lambda f: moved(f, "text_encoder_3", "pytorch_model.bin"), "can run code when loaded"),
    "the hub's client was stopped": (
        lambda f: unfinished(f),
        r"lacks transformer; .* download the rest, .* \(1 files in .*\.cache are half downloaded\)",
    ),
    "T5 is not there yet": (
        lambda f: moved(f, "text_encoder_3", "model.json"),
        r"text_encoder_3 holds no \*\.safetensors; download them again",
    ),
    "scheduler": (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{}"), "expected FlowMatchEuler"),
    "dynamic shifting": (
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER)),
        "dynamic shifting True",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_part_that_does_not_fit_is_named_and_nothing_is_drawn_in_its_place(name: str, tmp_path: Path) -> None:
    """Also where it is to be loaded later, if ever, and before anything is loaded at all."""
    damage, expected = DAMAGE[name]
    damage(micro_folder(tmp_path / "folder"))
    for later in ((), FROZEN):
        with pytest.raises(CheckpointError, match=expected):
            KontextPipeline.from_pretrained(tmp_path / "folder", later=later)
    found = [finding.found for finding in weights(str(tmp_path / "folder")) if finding.level == "BAD"]
    assert any(re.search(expected, text) for text in found), found

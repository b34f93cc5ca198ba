"""One model, three verbs: equality with the released way of asking, folders, routing of references, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from micro import built, built_vlm, micro_metaquery
from PIL import Image

from lightning_modules.networks import Conditioner
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import KontextPipeline, MetaqueryPipeline
from lightning_modules.pipelines.kontext import EDIT_NEGATIVE_PROMPT
from lightning_modules.pipelines.opening import open_folder, prompts_of
from lightning_modules.pipelines.queries import QueryCache

OPTIONS = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}


def picture(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_metaquery(tmp_path_factory.mktemp("metaquery") / "folder")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> MetaqueryPipeline:
    return MetaqueryPipeline.from_pretrained(folder)


def released(pipeline: MetaqueryPipeline, texts: list[str], image: Image.Image | None) -> tuple[torch.Tensor, ...]:
    """UniPic 2.0's scripts: ids with zeros behind, queries over their embeddings, one pass, the conditioner."""
    vlm, count, found = pipeline.vlm, pipeline.conditioner.config.num_queries, []
    for text in texts:
        content = [{"type": "text", "text": text if image else f"Generate an image: {text}"}]
        turns = [{"role": "user", "content": [{"type": "image"}] * bool(image) + content}]
        told = vlm.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pixels = int(32 * 28 / 32 * 32 * 28 / 32)
        size = {"shortest_edge": pixels, "longest_edge": pixels}
        inputs = vlm.processor(text=[told], images=[image] if image else None, size=size, return_tensors="pt")
        ids = torch.cat([inputs.input_ids, torch.zeros(1, count, dtype=torch.int64)], dim=1)
        embedded, places = vlm.model.get_input_embeddings()(ids), None
        embedded[:, -count:] = pipeline.conditioner.meta_queries
        if image:
            images = vlm.model.model.get_image_features(inputs.pixel_values, inputs.image_grid_thw).pooler_output
            kinds = (ids == vlm.model.config.image_token_id).int()
            embedded[kinds.bool()] = torch.cat(list(images))
            places, _ = vlm.model.model.get_rope_index(ids, kinds, image_grid_thw=inputs.image_grid_thw)
        vlm.model.model.rope_deltas = None
        output = vlm.model.model(inputs_embeds=embedded, position_ids=places, use_cache=False)
        found.append(pipeline.conditioner(output.last_hidden_state[:, -count:]))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("image", [None, picture()], ids=["generate", "edit"])
@torch.no_grad()
def test_pictures_are_those_of_the_released_scripts(pipeline: MetaqueryPipeline, image: Image.Image | None) -> None:
    negative = EDIT_NEGATIVE_PROMPT if image else ""
    sequence, pooled = released(pipeline, ["make it red", negative], image)
    plain = KontextPipeline.from_pretrained(built())
    plain.transformer = pipeline.transformer
    options = {**OPTIONS, "image": image, "height": 32, "width": 32}
    expected = plain(
        prompt_embeds=sequence[:1], pooled_prompt_embeds=pooled[:1], negative_prompt_embeds=sequence[1:],
        negative_pooled_prompt_embeds=pooled[1:], generator=seeded(), **options,
    ).images  # fmt: skip
    found = pipeline("make it red", generator=seeded(), **options).images
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_mixed_batch_is_its_singles(pipeline: MetaqueryPipeline) -> None:
    prompts, images = (
        ["a", "make it red", "longer than the others by far"],
        [[], [picture()], [picture(), picture(seed=1)]],
    )
    latents = torch.randn(3, 2, 8, 8, generator=seeded())
    draws = [seeded(i) for i in range(3)]
    options = {**OPTIONS, "guidance_scale": 1.0, "height": 32, "width": 32}
    together = pipeline(prompts, image=images, latents=latents, generator=draws, **options).images
    for i in range(3):
        one = {"latents": latents[i : i + 1], "generator": [seeded(i)]}
        alone = pipeline(prompts[i], image=[images[i]], **one, **options).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_references_go_where_they_are_told(tmp_path: Path) -> None:
    changes = {}
    for reference in ("both", "vlm", "transformer"):
        pipeline = MetaqueryPipeline.from_pretrained(micro_metaquery(tmp_path / reference, reference))
        assert pipeline.reference == reference
        seen = [
            pipeline.read(["x"], [[image]])[0]["cache"] for image in (torch.zeros(3, 32, 32), torch.ones(3, 32, 32))
        ]
        encoded = pipeline._encode_references([[torch.zeros(3, 32, 32)]], seeded())
        changes[reference] = not torch.equal(*seen), encoded is not None
    assert changes == {"both": (True, True), "vlm": (True, False), "transformer": (False, True)}


def test_an_export_is_whole_and_stock_diffusers_reads_it(
    folder: Path, pipeline: MetaqueryPipeline, tmp_path: Path
) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert {entry[0] for entry in index.values() if isinstance(entry, list)} == {"diffusers", None}
    none = {name: None for name in index if name.startswith(("text_encoder", "tokenizer"))}
    stock = StableDiffusion3Pipeline.from_pretrained(folder, **none)
    with torch.no_grad():
        sequence, pooled = pipeline.encode_unique(["a red circle"])
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0, "height": 32, "width": 32}
    latents = torch.randn(1, 2, 8, 8, generator=seeded())
    found = stock(prompt_embeds=sequence, pooled_prompt_embeds=pooled, latents=latents, **options).images
    torch.testing.assert_close(found, pipeline("a red circle", latents=latents, **options).images, atol=1e-5, rtol=1e-4)
    # The frozen model's files are the same ones, and cost nothing.
    weights = [f / "model.safetensors" for f in (built_vlm(), folder / "vlm")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    pipeline.save_pretrained(tmp_path / "again")
    assert isinstance(open_folder(tmp_path / "again"), MetaqueryPipeline)


def test_a_release_without_a_vlm_takes_it_from_apart(folder: Path, pipeline: MetaqueryPipeline, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "release", ignore=shutil.ignore_patterns("vlm", "*.json.bak", "metaquery.json"))
    (tmp_path / "release" / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no vision-language model at .*model.init_args.vlm"):
        MetaqueryPipeline.from_pretrained(tmp_path / "release")
    found = MetaqueryPipeline.from_pretrained(tmp_path / "release", vlm=built_vlm())
    options = {**OPTIONS, "height": 32, "width": 32}
    pictures = [each("x", generator=seeded(), **options).images for each in (found, pipeline)]
    assert torch.equal(*pictures)


def test_it_answers_questions_with_and_without_pictures(pipeline: MetaqueryPipeline) -> None:
    questions, images = (
        ["What is it?", "Where is what? a red circle", "And here?"],
        [picture(), None, picture((64, 32))],
    )
    together = pipeline.ask(questions, images, max_new_tokens=5)
    assert together == [pipeline.ask(q, i, max_new_tokens=5)[0] for q, i in zip(questions, images, strict=True)]
    torch.manual_seed(0)
    sampled = {pipeline.ask("What is it?", picture(), 5, temperature=2.0)[0] for _ in range(4)}
    assert len(sampled) > 1
    with pytest.raises(CheckpointError, match="2 questions, 1 images"):
        pipeline.ask(["a", "b"], [picture()])


@torch.no_grad()
def test_what_was_read_is_remembered_in_memory_and_on_disk(
    folder: Path, pipeline: MetaqueryPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, pictures = ["x", "x", "y"], [[torch.zeros(3, 32, 32)], [torch.ones(3, 32, 32)], []]
    expected = pipeline.condition(pipeline.read(prompts, pictures))
    cache = prompts_of(pipeline, str(tmp_path))
    assert isinstance(cache, QueryCache)
    torch.testing.assert_close(cache(prompts, pictures), expected)
    cache.commit()
    fresh = QueryCache(pipeline, root=str(tmp_path))
    monkeypatch.setattr(pipeline.vlm, "prefix", None)
    for each in (cache, fresh):
        assert all(torch.equal(a, b) for a, b in zip(each(prompts, pictures), cache(prompts, pictures), strict=True))
    other = QueryCache(MetaqueryPipeline.from_pretrained(folder), rows=3)
    assert other.fingerprint != fresh.fingerprint


def test_what_was_least_used_is_forgotten(pipeline: MetaqueryPipeline) -> None:
    cache = QueryCache(pipeline, max_bytes=1)
    cache.prefixes(["a", "b", "c"])
    assert len(cache._entries) == 1


def test_parts_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "wide")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Conditioner(sizes, 4, 40, 16, 24).save_pretrained(tmp_path / "wide" / "conditioner")
    with pytest.raises(
        CheckpointError, match=r"llm_hidden_size 40 where the VLM's hidden_size is 32; joint_attention_dim 24"
    ):
        MetaqueryPipeline.from_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="has no conditioner/, so it is no Metaquery model"):
        MetaqueryPipeline.from_pretrained(built())
    with pytest.raises(CheckpointError, match="is a Metaquery model, which has no text encoders"):
        KontextPipeline.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="leave vlm out"):
        open_folder(built(), "somewhere")
    with pytest.raises(CheckpointError, match="a Metaquery model has no T5"):
        MetaqueryPipeline.from_pretrained(folder).limit_t5(9)

"""Queries behind a conversation: one pass and two are the same, padding is seen by nothing, positions have two axes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from micro import built_vlm
from torch import Tensor

from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.vlm import SYSTEM, Reading, Vlm

TEXTS = ["Generate an image: a red circle", "make it blue", "make the red circle in the top left a cross"]


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PICTURES = [[], [picture(64, 96)], [picture(64, 64), picture(32, 32, 1)]]


def opened(**reading: object) -> Vlm:
    return Vlm.from_pretrained(built_vlm(), Reading(**reading))


def conversations(vlm: Vlm) -> list[str]:
    return [vlm.conversation(text, len(own)) for text, own in zip(TEXTS, PICTURES, strict=True)]


def queries(count: int = 5) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(3), requires_grad=False)


def whole(vlm: Vlm, sample: int, learnt: Tensor, one_axis: bool) -> Tensor:
    """One pass over conversation and queries, as UniPic 2.0's script and DeepGen's trainer have it."""
    seen = [vlm.patches(own) for own in PICTURES[sample]]
    ids = vlm.tokens(conversations(vlm)[sample], [grid for _, grid in seen], len(learnt))
    ids = torch.cat([ids, ids.new_zeros(len(learnt))])[None]
    embedded = vlm.model.get_input_embeddings()(ids)
    places = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if seen:
        grids = torch.stack([grid for _, grid in seen])
        images = vlm.model.model.get_image_features(torch.cat([p for p, _ in seen]), grids).pooler_output
        embedded[ids == vlm.model.config.image_token_id] = torch.cat(list(images))
        if not one_axis:
            kinds = (ids == vlm.model.config.image_token_id).int()
            places, _ = vlm.model.model.get_rope_index(ids, kinds, image_grid_thw=grids)
    embedded[:, -len(learnt) :] = learnt
    output = vlm.model.model(inputs_embeds=embedded, position_ids=places, use_cache=False)
    return output.last_hidden_state[:, -len(learnt) :]


@pytest.mark.parametrize("positions", ["2d", "1d"])
@torch.no_grad()
def test_prefix_and_queries_are_one_pass_and_a_batch_its_singles(positions: str) -> None:
    vlm = opened(positions=positions)
    prefixes = vlm.prefix(conversations(vlm), PICTURES, 5, rows=2)
    together = vlm.query(queries(), prefixes)
    for i in range(len(TEXTS)):
        expected = whole(vlm, i, queries(), positions == "1d")[0]
        assert (together[i] - expected).norm() / expected.norm() < 1e-5
        alone = vlm.query(queries(), vlm.prefix(conversations(vlm)[i : i + 1], PICTURES[i : i + 1], 5, rows=2))[0]
        assert (together[i] - alone).norm() / alone.norm() < 1e-5


@torch.no_grad()
def test_positions_differ_where_there_are_pictures_alone() -> None:
    found = [vlm.query(queries(), vlm.prefix(conversations(vlm), PICTURES, 5, 2)) for vlm in map_positions()]
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-4)


def map_positions() -> list[Vlm]:
    return [opened(positions="2d"), opened(positions="1d")]


@torch.no_grad()
def test_a_prefix_has_the_same_bits_beside_any_other() -> None:
    vlm = opened()
    together = vlm.prefix([*conversations(vlm), *conversations(vlm)], [*PICTURES, *PICTURES], 5, rows=2)
    for i in range(3):
        (alone,) = vlm.prefix(conversations(vlm)[i : i + 1], PICTURES[i : i + 1], 5, rows=2)
        assert torch.equal(together[i]["cache"], alone["cache"]) and torch.equal(
            together[i + 3]["cache"], alone["cache"]
        )
        assert together[i]["position"] == alone["position"]


def test_gradients_reach_the_queries_and_no_weight() -> None:
    vlm, learnt = opened(), queries().requires_grad_()
    with torch.no_grad():
        prefixes = vlm.prefix(conversations(vlm), PICTURES, 5, 2)
    vlm.query(learnt, prefixes).sum().backward()
    assert learnt.grad is not None and learnt.grad.any()
    assert all(p.grad is None for p in vlm.parameters())


@torch.no_grad()
def test_several_layers_are_stacked_on_channels() -> None:
    last, fused = opened(), opened(layers=[-2, -1])
    prefixes = last.prefix(conversations(last), PICTURES, 5, 2)
    found = fused.query(queries(), prefixes)
    assert found.shape == (3, 5, 64)
    torch.testing.assert_close(found[..., 32:], last.query(queries(), prefixes))
    with pytest.raises(CheckpointError, match="expected numbers from -1 to -3"):
        opened(layers=[0])


def test_the_size_a_picture_is_read_at() -> None:
    """28 of 32 pixels, rounded to tokens of 28: 512 are 448, and the smallest picture is one token."""
    vlm = opened()
    for (height, width), grid in {(512, 512): (32, 32), (64, 96): (4, 6), (4, 6): (2, 2), (16, 64): (2, 4)}.items():
        patches, found = vlm.patches(picture(height, width))
        assert tuple(found.tolist()) == (1, *grid) and len(patches) == grid[0] * grid[1]
    with pytest.raises(CheckpointError, match="2 x 600 pixels does not fit the VLM"):
        vlm.patches(picture(2, 600))


def test_a_prompt_beyond_the_context_is_refused() -> None:
    vlm = opened()
    with pytest.raises(CheckpointError, match="the VLM's context has 256; shorten the text"):
        vlm.prefix([vlm.conversation("a red circle " * 200, 0)], [[]], 5, 2)


def test_the_system_turn_is_cut_out_for_generation_alone(tmp_path: Path) -> None:
    vlm = opened()
    vlm.processor.chat_template = vlm.processor.chat_template.replace("<|im_start|>", SYSTEM + "<|im_start|>", 1)
    again = Vlm(vlm.model, vlm.processor)
    assert "helpful assistant" not in again.conversation("hello", 1)
    assert "helpful assistant" in again.conversation("hello", 0, again.processor.chat_template)
    assert "<|image_pad|>" in again.conversation("hello", 1)


@torch.no_grad()
def test_adapters_train_and_are_merged_into_what_is_saved(tmp_path: Path) -> None:
    vlm = opened()
    add_lora(vlm.model, Lora(2, 4, ["language_model.layers.1.self_attn.q_proj"]), 0)
    trained = [p for p in vlm.parameters() if p.requires_grad]
    assert len(trained) == 2
    for p in trained:
        torch.nn.init.normal_(p)
    vlm.save_pretrained(tmp_path / "merged")
    other = Vlm.from_pretrained(tmp_path / "merged")
    prefixes = [each.prefix(conversations(each), PICTURES, 5, 2) for each in (vlm, other)]
    torch.testing.assert_close(vlm.query(queries(), prefixes[0]), other.query(queries(), prefixes[1]))
    untouched = opened().prefix(conversations(vlm), PICTURES, 5, 2)
    assert not torch.allclose(other.query(queries(), prefixes[1]), opened().query(queries(), untouched))


def test_a_vlm_without_weights_or_template_is_named(tmp_path: Path) -> None:
    shutil.copytree(built_vlm(), tmp_path / "vlm")
    (tmp_path / "vlm" / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template"):
        Vlm.from_pretrained(tmp_path / "vlm")
    (tmp_path / "vlm" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        Vlm.from_pretrained(tmp_path / "vlm")


def test_answers_are_of_pictures_at_the_processors_own_size() -> None:
    vlm = opened()
    assert vlm.patches(picture(512, 512), scaled=False)[1].tolist() == [1, 36, 36]
    assert vlm.patches(picture(64, 64), scaled=False)[1].tolist() == vlm.patches(picture(64, 64))[1].tolist()

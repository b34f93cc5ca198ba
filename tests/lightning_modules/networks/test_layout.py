from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro_r1v import part
from PIL import Image
from transformers import AutoTokenizer

from lightning_modules.networks.layout import IGNORED, Layout, LayoutError, best_grid, pack, packed, resized, tiles
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.r1v import IMAGE

PICTURE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)


def laid_out(name: str = "reasoner", **changes: object) -> Layout:
    return replace(Layout(AutoTokenizer.from_pretrained(part(name)), 4, 64, max_tiles=1, context=200), **changes)


def words(layout: Layout, ids: list[int]) -> str:
    return layout.tokenizer.decode(ids)


def test_only_answers_and_the_ends_of_their_turns_are_learned() -> None:
    layout = laid_out()
    sample = layout.sample(
        [("user", "<image>what is top left?"), ("assistant", "<think>\nred.\n</think>\n2")], [PICTURE]
    )
    learned = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
    assert words(layout, learned) == "red.\n</think>\n2<|end|>"  # R1's template has opened the thoughts
    given = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label == IGNORED]
    assert words(layout, given) == f"<|User|><img>{IMAGE * 4}</img>what is top left?<|Assistant|><think>\n"
    assert all(label in (IGNORED, i) for i, label in zip(sample.input_ids, sample.labels, strict=True))
    assert sample.tiles.shape == (1, 3, 64, 64)
    asked = layout.prompt([("user", "<image>what is top left?"), ("assistant", "2")], [PICTURE])
    assert asked.input_ids == given and set(asked.labels) == {IGNORED}


def test_all_answers_of_a_conversation_are_learned_unless_the_template_rewrites_them() -> None:
    turns = [
        ("user", "a"),
        ("assistant", "<think>\nb\n</think>\nc"),
        ("user", "d"),
        ("assistant", "<think>\ne\n</think>\nf"),
    ]
    chat, think = laid_out("substitute"), laid_out("reasoner")
    plain = [(role, text.rpartition("\n")[2]) for role, text in turns]
    sample = chat.sample(plain)
    learned = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
    assert words(chat, learned) == "c<|im_end|>f<|im_end|>"
    sample = think.sample(turns)
    learned = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
    assert words(think, learned) == "e\n</think>\nf<|end|>"
    assert "b" not in words(think, sample.input_ids)  # R1 does not see its earlier thoughts


@pytest.mark.parametrize("name", ["substitute", "reasoner"])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_a_conversation_is_measured_without_its_pictures(name: str, thumbnail: bool) -> None:
    layout = laid_out(name, max_tiles=6, thumbnail=thumbnail, context=1000)
    shapes = [(64, 64), (64, 190), (300, 100), (40, 300)]
    shown = [torch.zeros(3, *shape, dtype=torch.uint8) for shape in shapes]
    talks = [
        [
            ("user", "<image>a"),
            ("assistant", "<think>\nb\n</think>\nc"),
            ("user", "c<image>d<image>"),
            ("assistant", "e"),
        ],
        [("system", "be brief"), ("user", "<image><image><image>how many?"), ("assistant", "three")],
        [("user", "<image>a"), ("assistant", "b"), ("user", "<image>after the last answer <image>")],
    ]
    for turns in talks:
        for first in (0, 1):
            own = slice(first, first + 3)
            assert layout.length(turns, shapes[own]) == len(layout.sample(turns, shown[own]))
    assert layout.length(talks[1], [(0, 0)] * 3) - layout.length(talks[1], [(64, 64)] * 3) == 3 * 4 * (5 + thumbnail)
    with pytest.raises(LayoutError, match="missing picture"):
        layout.length(talks[0], shapes[:2])


@pytest.mark.parametrize("name", ["substitute", "reasoner"])
def test_pictures_may_come_in_any_turn_of_a_user(name: str) -> None:
    layout = laid_out(name)
    turns = [("user", "<image>a"), ("assistant", "b"), ("user", "c<image>d<image>"), ("assistant", "e")]
    flat = [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (0, 100, 200, 255)]
    sample = layout.sample(turns, flat[:3])
    assert sample.input_ids.count(layout.tokenizer.convert_tokens_to_ids(IMAGE)) == 3 * 4
    seen = f"<img>{IMAGE * 4}</img>"
    assert f"c{seen}d{seen}" in words(layout, sample.input_ids)
    assert torch.equal(sample.tiles, torch.cat([layout.tiles(picture) for picture in flat[:3]]))
    asked = layout.prompt(turns, flat[:3])
    assert sample.input_ids[: len(asked)] == asked.input_ids and torch.equal(asked.tiles, sample.tiles)
    later = layout.sample([*turns, ("user", "<image>f")], flat)
    assert later.input_ids == sample.input_ids and torch.equal(later.tiles, sample.tiles)


@pytest.mark.parametrize(
    ("turns", "pictures", "reason"),
    [
        ([("user", "<image>what?"), ("assistant", "2")], [], "missing picture"),
        ([("user", "what?"), ("assistant", "2")], [PICTURE], "missing picture"),
        ([("user", f"{IMAGE}what?"), ("assistant", "2")], [], "reserved token"),
        ([("user", "what?<|end|><|Assistant|>"), ("assistant", "2")], [], "reserved token"),
        ([("user", "what? " * 300), ("assistant", "2")], [], "too long"),
        ([("user", "what?")], [], "no answer"),
        ([("user", "what?"), ("assistant", "<image>")], [PICTURE], "picture in an answer"),
    ],
)
def test_what_cannot_be_trained_on_is_named(turns: list, pictures: list, reason: str) -> None:
    with pytest.raises(LayoutError) as error:
        laid_out().sample(turns, pictures)
    assert error.value.reason == reason


def test_a_tokenizer_that_lacks_what_is_needed_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(part("reasoner"))
    tokenizer.chat_template = None
    with pytest.raises(LayoutError, match="no chat template"):
        Layout(tokenizer, 4, 64)
    clip = AutoTokenizer.from_pretrained(part("base"))
    clip.add_tokens(["other"])
    assert Layout(clip, 4, 64).context == 16384
    from lightning_modules.networks.tokenizers import phrase_tokenizer

    with pytest.raises(CheckpointError, match="lacks the token <IMG_CONTEXT>"):
        Layout(phrase_tokenizer(["a red circle"] * 10, 300, 10, 40), 4, 64)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 12))
def test_a_grid_is_the_nearest_in_aspect(width: int, height: int, most: int) -> None:
    columns, rows = best_grid(width, height, 448, 1, most)
    assert 1 <= columns * rows <= most
    every = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    assert abs(width / height - columns / rows) == min(abs(width / height - i / j) for i, j in every)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((448, 448), (1, 1)), ((800, 400), (2, 1)), ((400, 1200), (1, 3)), ((2000, 2000), (3, 3)), ((1300, 650), (4, 2))],
)
def test_grids_that_internvl_chooses(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert best_grid(*size, 448, 1, 12) == grid


def test_tiles_are_cut_in_reading_order_and_the_whole_comes_last() -> None:
    picture = torch.zeros(3, 32, 64, dtype=torch.uint8)
    picture[:, :, 32:] = 255
    cut = tiles(picture, 32, 1, 12, True)
    assert len(cut) == 3
    black, white = cut[0, :, 0, 0], cut[1, :, 0, 0]
    assert torch.allclose(black, -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))
    assert (cut[0] == black[:, None, None]).all() and (cut[1] == white[:, None, None]).all()
    assert torch.allclose(cut[2][:, :, :14], black[:, None, None].expand(3, 32, 14))
    assert len(tiles(picture, 32, 1, 12, False)) == 2


def test_resizing_is_what_pillow_does() -> None:
    picture = (torch.rand(3, 40, 50) * 255).byte()
    ours = (resized(picture, 96, 64) * 255).round()
    theirs = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((64, 96), Image.Resampling.BICUBIC)
    assert (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() <= 2
    assert torch.equal(resized(picture, 40, 50) * 255, picture.float())


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(60, 200))
def test_packing_loses_nothing_and_overflows_nowhere(lengths: list[int], context: int) -> None:
    rows = pack(lengths, context)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= context for row in rows)
    assert len(rows) <= 2 * sum(lengths) / context + 1  # no two rows are both half empty


def test_rows_hold_tiles_in_the_order_of_their_tokens() -> None:
    layout = laid_out()
    flat = [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (0, 255)]
    short = layout.sample([("user", "<image>a"), ("assistant", "b")], [flat[0]])
    long = layout.sample([("user", "<image>a b c d e f"), ("assistant", "b")], [flat[1]])
    rows = packed([short, long], 200, 0)
    assert rows.attention_mask.tolist() == [[1] * len(long) + [2] * len(short)]
    assert rows.tiles[0].mean() > rows.tiles[1].mean()  # the longest goes first, and so does its picture
    assert rows.samples == 2

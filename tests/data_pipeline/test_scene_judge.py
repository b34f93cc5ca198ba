"""Edits of scenes judged exactly, scores kept in records, and records that come several times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_pipeline.errors import InputError
from data_pipeline.index import load_index, read_member
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.records import EditRecord, Record, Rejected
from data_pipeline.scenes import edit_record, encode_png, text_image_record
from data_pipeline.scenes.edits import Edit
from data_pipeline.scenes.verifier import UNREADABLE, Reading
from data_pipeline.scenes.world import Object, Scene
from data_pipeline.sources import Repeat, Scenes
from data_pipeline.steps.keep_scores import KeepScores
from data_pipeline.steps.scene_judge import SceneJudge, followed, kept, legible

RED, BLUE, GREEN = Object(0, "red", "circle"), Object(3, "blue", "square"), Object(1, "green", "cross")
REMOVED = Edit("remove", "remove the blue square", Scene(1, (RED, BLUE)), Scene(1, (RED,)))


def reading(*cells: Object | str | None, background: str | None = "white") -> Reading:
    return Reading(1, cells, background)


@pytest.mark.parametrize(
    ("seen", "scores"),
    [
        (reading(RED, None, None, None), (1, 1, 1)),
        (reading(RED, None, None, BLUE), (0, 1, 1)),
        (reading(None, None, None, None), (1, 2 / 3, 1)),
        (reading(RED, GREEN, UNREADABLE, None), (1, 1 / 3, 3 / 4)),
        (reading(RED, None, None, None, background="grey"), (1, 0, 1)),
        (reading(*[UNREADABLE] * 4, background=None), (0, 0, 0)),
    ],
)
def test_scores_by_hand(seen: Reading, scores: tuple[float, ...]) -> None:
    assert (followed(REMOVED, seen), kept(REMOVED, seen), legible(seen)) == pytest.approx(scores)


def test_a_background_that_was_asked_for_is_followed_and_one_that_stays_is_kept() -> None:
    source, target = Scene(2, (RED,), "white"), Scene(2, (RED,), "pink")
    edit = Edit("background", "make the background pink", source, target)
    cells = (RED, *[None] * 8)
    assert (followed(edit, Reading(2, cells, "pink")), kept(edit, Reading(2, cells, "pink"))) == (1, 1)
    assert (followed(edit, Reading(2, cells, "white")), kept(edit, Reading(2, cells, "white"))) == (0, 1)
    nothing = Edit("keep", "keep everything", source, source)
    assert followed(nothing, Reading(2, (None,) * 9, "white")) == 1


def test_pictures_are_judged_by_what_they_show() -> None:
    record = edit_record(1, 3, 5, "train")
    assert record.metadata["scene"] != record.metadata["source"]
    unchanged = replace(record, target=record.sources[0])
    others = [
        replace(record, target=encode_png(Scene(2, ()))),
        edit_record(3, 0, 0, "train"),
        text_image_record(1, 0, 0, "train"),
    ]
    right, undone, *refused = SceneJudge().score([record, unchanged, *others])
    assert list(right) == [column.name for column in SceneJudge().columns()]
    assert list(right.values()) == [1, 1, 1, None]
    assert list(undone.values()) == [0, 1, 1, None]
    assert [found["judge_note"] for found in refused] == [
        "the picture is 96 x 96, expected 64 x 64",
        *["no edit between scenes of level 1 or 2"] * 2,
    ]
    assert all(list(found.values())[:3] == [None] * 3 for found in refused)


@dataclass
class Parity:
    """Scores records by the parity of their number, and every third not at all."""

    batch_size: int = 2

    def columns(self) -> list[pa.Field]:
        return [pa.field("odd", pa.float32()), pa.field("odd_note", pa.string())]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        numbers = [int(record.key.split("-")[1]) for record in records]
        return [
            {"odd": None, "odd_note": "a third"} if n % 3 == 0 else {"odd": n % 2, "odd_note": None} for n in numbers
        ]


def test_kept_scores_are_in_the_records_and_what_has_none_is_rejected() -> None:
    records = [edit_record(1, 0, number, "train") for number in range(4)]
    found = KeepScores(Parity()).rewrite(records)
    assert found[0] == Rejected("edit-0000000", "unscored", "a third") and isinstance(found[3], Rejected)
    kept_records = [record for record in found if isinstance(record, EditRecord)]
    assert [record.metadata["odd"] for record in kept_records] == [1, 0]
    assert kept_records[0] == replace(records[1], metadata={**records[1].metadata, "odd": 1})


def test_a_repeated_source_gives_groups_under_keys_of_their_own(tmp_path: Path) -> None:
    source = Repeat(Scenes(1, 0, 6, 0), times=3)
    Recipe(source, [KeepScores(SceneJudge())], records_per_shard=7).build(tmp_path / "out")
    facts = {r.key: json.loads(read_member(r, "json"))["metadata"] for r in load_index(tmp_path / "out")}
    assert list(facts)[:4] == ["edit-0000000-0", "edit-0000000-1", "edit-0000000-2", "edit-0000001-0"]
    assert len(facts) == 18 and all(key.rpartition("-")[0] == found["group"] for key, found in facts.items())
    assert all(found["judge_instruction"] == found["judge_preservation"] == 1 for found in facts.values())
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3  # of 2 x 3 records: never more than asked for
    with pytest.raises(InputError, match="at least 1"):
        Repeat(Scenes(), times=0)


def test_a_recipe_names_the_source_inside_and_no_other_class(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    inner = "{class_path: data_pipeline.sources.Scenes, init_args: {count_text_image: 0, count_edit: 2}}"
    recipe.write_text(f"source: {{class_path: data_pipeline.sources.Repeat, init_args: {{source: {inner}}}}}\n")
    assert load_recipe(recipe, ["--source.source.init_args.count_edit", "5"]).source == Repeat(Scenes(1, 0, 5, 0), 4)
    recipe.write_text(recipe.read_text().replace("data_pipeline.sources.Scenes", "subprocess.Popen"))
    with pytest.raises(InputError, match="must start with"):
        load_recipe(recipe)

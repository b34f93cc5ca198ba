"""Tables in every format and layout of the field: each row is the right record or a named rejection, none is lost."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tables import read, write

from data_pipeline.errors import InputError
from data_pipeline.recipe import load_recipe
from data_pipeline.records import (
    EditRecord,
    EncodedImage,
    PreferenceRecord,
    PromptRecord,
    ReasoningRecord,
    Record,
    Rejected,
    TextImageRecord,
)
from data_pipeline.sources import Folder, Manifest, UrlList, WebDataset
from data_pipeline.sources.lines import MAX_LINE

NAMES = ("a.png", "b.jpg", "c.webp", "d.png")


def encoded(seed: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + seed, 9), (seed, 0, 0)).save(buffer, form)
    return buffer.getvalue()


DATA = {name: encoded(i, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name[2:]]) for i, name in enumerate(NAMES)}
A, B, C, D = DATA.values()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with pictures a.png, b.jpg, c.webp and d.png."""
    for name, data in DATA.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def bytes_of(record: Record) -> list[bytes]:
    return [image.data for image in record.images.values()]


def reasons(items: list[Record | Rejected]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Rejected)]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records(form: str, root: Path) -> None:
    rows = [
        {"source": "a.png", "target": "b.jpg", "instruction": 'say "no",\nthen\tgo'},
        {"source": "c.webp", "target": "a.png", "instruction": " épée "},
    ]
    first, second = read(Manifest(write(root / f"t.{form}", rows), origin="album", licence="CC0-1.0"))
    assert isinstance(first, EditRecord) and first.instruction == 'say "no",\nthen\tgo'
    assert first.sources == (EncodedImage(A, "png"),) and first.target == EncodedImage(B, "jpg")
    assert (second.instruction, bytes_of(second)) == ("épée", [C, A])
    assert (second.origin, second.licence, second.split) == ("album", "CC0-1.0", "")
    assert second.metadata["files"] == ["c.webp", "a.png"] and first.key != second.key


def test_rows_state_their_licence_origin_and_split(root: Path) -> None:
    edit = {"source": "a.png", "target": "b.jpg", "instruction": "go"}
    rows = [
        {**edit, "license": "CC0-1.0", "from": "web", "part": "validation"},
        {**edit, "licence": 3, "from": None, "part": "train"},
        edit,
        {**edit, "part": "test"},
        {**edit, "license": ["MIT"]},
    ]
    source = Manifest(
        str(write(root / "t.jsonl", rows)), columns={"origin": "from", "split": "part"}, origin="album", licence="MIT"
    )
    found = [item for unit in source.units(9) for item in source.read(unit)]
    facts = [(r.licence, r.origin, r.split) for r in found if isinstance(r, EditRecord)]
    assert facts == [("CC0-1.0", "web", "val"), ("3", "album", "train"), ("MIT", "album", "")]
    assert all(not {"license", "licence", "from", "part"} & r.metadata.keys() for r in found[:3])
    wrong = [item.detail for item in found if isinstance(item, Rejected)]
    assert "the split is 'test', expected train or val" in wrong[0] and "expected a text in licence" in wrong[1]


def test_the_licence_of_a_session_is_that_of_its_turns(root: Path) -> None:
    turn = {"prompt": "go", "input_images": ["a.png"], "output_images": ["b.jpg"]}
    table = write(root / "t.jsonl", [{"data": [turn, turn], "license": "CC0-1.0"}])
    assert [record.licence for record in read(Manifest(table, "imgedit"))] == ["CC0-1.0"] * 2


def image(name: str, embedded: bool) -> dict[str, Any]:
    return {"bytes": DATA[name], "path": None} if embedded else {"bytes": None, "path": name}


# Rows as the data sets have them (spec: on-disk formats), the pictures expected in order, the text, and some metadata.
LAYOUTS: list[tuple[str, str, dict[str, Any], list[bytes], str, dict[str, Any]]] = [
    (
        "omniedit",
        "parquet",
        {
            "omni_edit_id": "task_obj_swap_1",
            "task": "swap",
            "src_img": image("a.png", True),
            "edited_img": image("b.jpg", True),
            "edited_prompt_list": ["make it red", "recolour it in red"],
            "width": 8,
            "sc_score_1": 9,
            "o_score": 8.5,
        },
        [A, B],
        "make it red",
        {"texts": ["make it red", "recolour it in red"], "o_score": 8.5, "omni_edit_id": "task_obj_swap_1"},
    ),
    (
        "ultraedit",
        "parquet",
        {
            "source_image": image("c.webp", True),
            "edited_image": image("a.png", True),
            "mask_image": None,
            "edit_prompt": "add snow",
            "clip_sim_dir": 0.25,
            "dinov2_sim": math.nan,
        },
        [C, A],
        "add snow",
        {"clip_sim_dir": 0.25},
    ),
    (
        "anyedit",
        "json",
        {
            "edit": "put [V*] on it",
            "edit_type": "visual_bbox",
            "visual_input": "c.webp",
            "image_file": "a.png",
            "edited_file": "b.jpg",
        },
        [A, C, B],
        "put [V*] on it",
        {"edit_type": "visual_bbox"},
    ),
    (
        "anyedit",
        "jsonl",
        {
            "edit": "remove it",
            "edit_type": "remove",
            "visual_input": None,
            "image_file": "a.png",
            "edited_file": "d.png",
        },
        [A, D],
        "remove it",
        {"edit_type": "remove"},
    ),
    (
        "omnigen2",
        "jsonl",
        {
            "task_type": "edit",
            "instruction": "mix",
            "input_images": ["c.webp", "a.png", "b.jpg"],
            "output_image": "d.png",
        },
        [C, A, B, D],
        "mix",
        {"task_type": "edit"},
    ),
    ("omnigen2", "jsonl", {"task_type": "t2i", "instruction": "a cat", "output_image": "d.png"}, [D], "a cat", {}),
    (
        "opengpt4o",
        "json",
        {"input_prompt": "swap", "input_image": ["a.png"], "output_image": "b.jpg"},
        [A, B],
        "swap",
        {},
    ),
    (
        "seed_edit",
        "jsonl",
        {"source_image": "a.png", "target_image": "b.jpg", "instruction": "zoom"},
        [A, B],
        "zoom",
        {},
    ),
    (
        "imgedit",
        "parquet",
        {"input_images": ["a.png"], "output_images": ["b.jpg"], "prompt": "add", "edit_type": "add"},
        [A, B],
        "add",
        {"edit_type": "add"},
    ),
    ("edit", "parquet", {"source": [A, C], "target": D, "instruction": "merge"}, [A, C, D], "merge", {}),
    (
        "edit",
        "parquet",
        {
            "source": [image("a.png", True), image("c.webp", True)],
            "target": image("d.png", True),
            "instruction": "merge",
        },
        [A, C, D],
        "merge",
        {},
    ),
    (
        "edit",
        "parquet",
        {"source": [image("a.png", False)], "target": image("d.png", False), "instruction": "merge"},
        [A, D],
        "merge",
        {"files": ["a.png", "d.png"]},
    ),
    (
        "text_image",
        "jsonl",
        {
            "file_name": "a.png",
            "text": "a cat",
            "aesthetic": 5.5,
            "box": [1, 2],
            "boxes": [math.nan],
            "huge": "x" * 9999,
            "nan": math.nan,
        },
        [A],
        "a cat",
        {"aesthetic": 5.5, "box": [1, 2]},
    ),
    (
        "text_image",
        "jsonl",
        {"image": "data:image/png;base64," + base64.b64encode(A).decode(), "caption": "inline"},
        [A],
        "inline",
        {"files": []},
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: f"{case[0]}-{case[1]}-{len(case[3])}")
def test_rows_of_the_fields_data_sets(case: tuple, root: Path) -> None:
    layout, form, row, pictures, text, metadata = case
    (record,) = read(Manifest(write(root / f"t.{form}", [row]), layout))
    assert isinstance(record, EditRecord if len(pictures) > 1 else TextImageRecord)
    assert (bytes_of(record), record.prompt) == (pictures, text)
    assert metadata.items() <= record.metadata.items()
    assert not {"huge", "nan", "boxes", "dinov2_sim", "mask_image"} & record.metadata.keys()


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_a_session_is_one_record_for_each_turn_and_a_bad_turn_costs_only_itself(form: str, root: Path) -> None:
    turns = [
        {"input_images": ["a.png"], "output_images": ["b.jpg"], "prompt": "first"},
        {"input_images": ["b.jpg"], "output_images": [], "prompt": "second"},
        {"input_images": ["b.jpg"], "output_images": ["c.webp"], "prompt": "third"},
        {"input_images": ["a.png"], "output_images": ["c.webp"]},
        {"input_images": ["b.jpg"], "output_images": ["c.webp"], "prompt": "third"},
    ]
    rows = [{"data": turns, "id": 7, "prompt": "not of a turn"}, {"data": [], "id": 8, "prompt": ""}]
    first, second, third, fourth, fifth, empty = read(Manifest(write(root / f"t.{form}", rows), "imgedit"))
    assert [(r.instruction, bytes_of(r), r.metadata["turn"]) for r in (first, third)] == [
        ("first", [A, B], 0),
        ("third", [B, C], 2),
    ]
    assert first.metadata["id"] == 7 and len({first.key, third.key, fifth.key}) == 3
    assert reasons([second, fourth, empty]) == ["missing_field"] * 3


def test_prompts_for_reinforcement_keep_all_that_a_verifier_needs(root: Path) -> None:
    geneval = {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a dog right of a cat",
    }
    edit = {"prompt": "make it red", "source": "a.png", "requirement": "the car is red"}
    found = read(Manifest(write(root / "t.jsonl", [geneval, edit, {"text": "plain"}, {"tag": "x"}]), "prompts"))
    assert all(isinstance(record, PromptRecord) for record in found[:3]) and reasons(found[3:]) == ["missing_field"]
    assert found[0].prompt == "a dog right of a cat" and found[0].images == {}
    assert found[0].metadata["include"] == geneval["include"] and found[0].metadata["tag"] == "position"
    assert found[1].sources == (EncodedImage(A, "png"),) and found[1].metadata["requirement"] == "the car is red"
    assert found[2].prompt == "plain"


def test_prompts_one_a_line(root: Path) -> None:
    (root / "p.txt").write_bytes(b'\xef\xbb\xbfa "cat"\r\n\r\n  a dog, red \n\xe9\nlast')
    found = read(Manifest(str(root / "p.txt"), "prompts"))
    assert [r.prompt for r in found if isinstance(r, PromptRecord)] == ['a "cat"', "a dog, red", "last"]
    assert reasons(found) == ["bad_text"] and "p.txt line 4" in found[2].detail
    write(root / "q.jsonl", [{"prompt": "both"}])
    assert len(read(Manifest(str(root), "prompts"))) == 5
    with pytest.raises(InputError, match="holds no table"):
        read(Manifest(str(root / "p.txt"), "edit"))
    (root / "p.txt").write_text("x" * (2 * MAX_LINE) + "\nnext")
    long, following = read(Manifest(str(root / "p.txt"), "prompts"))
    assert long.reason == "bad_text" and "more than 1048576 bytes" in long.detail and following.prompt == "next"


def test_preference_pairs(root: Path) -> None:
    rows = [
        {"prompt": "a cat", "chosen": "a.png", "rejected": "b.jpg", "judge": "me"},
        {"prompt": "make it red", "chosen": "c.webp", "rejected": "b.jpg", "source": ["a.png", "d.png"]},
        {"prompt": "a cat", "chosen": "a.png"},
        {"prompt": "a cat", "chosen": ["a.png", "b.jpg"], "rejected": "c.webp"},
    ]
    found = read(Manifest(write(root / "t.jsonl", rows), "preference"))
    first, second = found[:2]
    assert isinstance(first, PreferenceRecord) and (first.chosen.data, first.rejected.data, first.sources) == (A, B, ())
    assert (second.chosen.data, second.rejected.data) == (C, B) and [s.data for s in second.sources] == [A, D]
    assert first.metadata["judge"] == "me" and reasons(found[2:]) == ["missing_field"] * 2


def test_questions_with_answers(root: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "How many?", "image": "a.png", "answer": "2", "subject": "math"},
        {"problem": "<image> or <image>?", "images": ["a.png", "b.jpg"], "solution": 4},
        {"question": "1 + 1?", "answer": 2.5},
        {"question": "<image><image>?", "image": "a.png", "answer": "x"},
        {"question": "?", "image": "a.png", "answer": " "},
        {"question": "?", "image": "a.png", "answer": ["x"]},
    ]
    found = read(Manifest(write(root / "t.jsonl", rows), "reasoning"))
    assert all(isinstance(record, ReasoningRecord) for record in found[:3]) and len(reasons(found[3:])) == 3
    assert found[0].turns == (("user", "<image>How many?"), ("assistant", "2")) and found[0].metadata["answer"] == "2"
    assert found[0].metadata["subject"] == "math"
    assert found[1].turns == (("user", "<image> or <image>?"), ("assistant", "4")) and bytes_of(found[1]) == [A, B]
    assert found[2].turns == (("user", "1 + 1?"), ("assistant", "2.5")) and found[2].pictures == ()


def test_columns_of_ones_own_names(root: Path) -> None:
    row = {"before": "a.png", "mask": "c.webp", "after": "b.jpg", "what": "paint", "instruction": "not this"}
    columns: dict[str, Any] = {"text": "what", "target": "after", "sources": ["before", "mask"]}
    (record,) = read(Manifest(write(root / "t.jsonl", [row]), columns=columns))
    assert (record.prompt, bytes_of(record)) == ("paint", [A, C, B]) and record.metadata["instruction"] == "not this"
    (other,) = read(Manifest(write(root / "t.jsonl", [row]), columns={**columns, "sources": ["mask", "before"]}))
    assert bytes_of(other) == [C, A, B]


def test_columns_from_yaml_and_the_command_line(root: Path) -> None:
    write(root / "t.csv", [{"file": "a.png", "my_caption": "a cat"}])
    recipe = root / "r.yaml"
    recipe.write_text(
        "source:\n  class_path: data_pipeline.sources.Manifest\n"
        f"  init_args: {{path: {root / 't.csv'}, layout: text_image, columns: {{target: file}}}}\n"
    )
    overrides = ["--source.columns.text", "my_caption"]
    (record,) = read(load_recipe(recipe, overrides).source)
    assert (record.prompt, bytes_of(record)) == ("a cat", [A])
    (record,) = read(load_recipe(recipe, ["--source.columns", '{"target": ["file"], "text": "my_caption"}']).source)
    assert (record.prompt, bytes_of(record)) == ("a cat", [A])
    assert load_recipe(recipe, overrides).fingerprint != load_recipe(recipe).fingerprint


def test_parquet_with_null_pictures_and_texts_that_are_none(root: Path) -> None:
    rows = [
        {"src_img": image("a.png", True), "edited_img": {"bytes": None, "path": None}, "edited_prompt_list": ["x"]},
        {"src_img": None, "edited_img": image("a.png", True), "edited_prompt_list": ["x"]},
        {"src_img": image("a.png", True), "edited_img": {"bytes": b"", "path": None}, "edited_prompt_list": ["x"]},
        {
            "src_img": image("a.png", True),
            "edited_img": {"bytes": b"<html>", "path": None},
            "edited_prompt_list": ["x"],
        },
        {"src_img": image("a.png", True), "edited_img": image("b.jpg", True), "edited_prompt_list": None},
        {"src_img": image("a.png", True), "edited_img": image("b.jpg", True), "edited_prompt_list": []},
    ]
    found = read(Manifest(write(root / "t.parquet", rows), "omniedit"))
    expected = ["missing_file", "missing_field", "missing_file", "not_a_picture", "missing_field", "missing_field"]
    assert reasons(found) == expected
    assert reasons(read(Manifest(str(root / "t.parquet"), "ultraedit"))) == ["missing_field"] * 6


def test_pictures_of_a_folder_are_the_same_in_units_of_any_size(root: Path) -> None:
    for name in NAMES[:3]:
        (root / name).with_suffix(".txt").write_text(f"caption of {name}")
    (root / "orphan.txt").write_text("no picture")
    whole = read(Folder(str(root)))
    assert len(whole) == 5 and sorted(reasons(whole)) == ["caption_without_image", "image_without_caption"]
    for records in (1, 2, 3):
        assert read(Folder(str(root)), records) == whole


# Inputs

SLOTS = [Folder, Manifest, UrlList, WebDataset]


@pytest.mark.parametrize("source", SLOTS, ids=lambda source: source.__name__)
def test_a_path_that_is_not_there_is_one_clear_error(source: Any, tmp_path: Path) -> None:
    for path, expected in (
        ("", r"source\.path is not set"),
        (str(tmp_path / "no"), r"source\.path .*no does not exist"),
    ):
        with pytest.raises(InputError, match=expected):
            list(source(path).units(9))
    with pytest.raises(InputError, match="holds no"):
        list(source(str(tmp_path)).units(9))


def mistakes(root: Path) -> Iterator[tuple[Any, str]]:
    table = write(root / "t.jsonl", [{"source": "a.png", "target": "b.jpg", "instruction": "x"}])
    yield lambda: Manifest(table, "omniedit2"), r"source\.layout is omniedit2; expected one of edit, text_image"
    yield lambda: UrlList(table, "no"), r"source\.layout is no"
    yield lambda: WebDataset(table, "no"), r"source\.layout is no"
    yield (
        lambda: Manifest(table, columns={"txt": "a"}),
        r"source\.columns names \['txt'\]; the layout edit has text, tar",
    )
    yield lambda: Manifest(table, "text_image", columns={"sources": "a"}), "the layout text_image has text, target"
    yield lambda: Manifest(table, columns={"text": []}), "no column for text"
    yield lambda: Manifest(table, columns={"target": [], "sources": ""}), "no column for sources, target"
    yield lambda: UrlList(table, threads=0), r"source\.threads 0"
    yield lambda: UrlList(table, seconds=float("inf")), "seconds inf"
    yield lambda: UrlList(table, max_bytes=-5), "max_bytes -5"
    yield lambda: Manifest(table, pictures="a", archives="b"), "both set"
    yield lambda: read(Manifest(table, pictures=str(root / "no"))), r"source\.pictures .*no is no folder"
    yield lambda: read(Manifest(table, pictures=table)), r"t\.jsonl is no folder"
    yield lambda: read(Manifest(table, archives=str(root / "no"))), r"source\.archives .*no is no folder with \*\.tar"
    yield lambda: read(Manifest(str(root / "a.png"))), r"a\.png is or holds no table; expected \.jsonl"
    yield lambda: read(Folder(table)), "is a file; expected a folder"


@pytest.mark.parametrize("number", range(16))
def test_a_mistake_names_the_setting_and_the_remedy(number: int, root: Path) -> None:
    act, expected = list(mistakes(root))[number]
    with pytest.raises(InputError, match=expected):
        act()


def test_a_folder_of_tables_takes_tables_only(root: Path) -> None:
    write(root / "b.jsonl", [{"image": "a.png", "caption": "second"}])
    write(root / "a.csv", [{"image": "b.jpg", "caption": "first"}])
    (root / "c.jsonl").mkdir()
    (root / "empty.jsonl").write_text("")
    found = read(Manifest(str(root), "text_image"))
    assert [(record.prompt, record.origin) for record in found] == [("first", "a.csv"), ("second", "b.jsonl")]


def test_a_table_whose_name_is_not_utf8_is_stored_readably(root: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.jsonl"))
    try:
        path.write_text('{"image": "a.png", "caption": "x"}\nbad')
    except OSError:
        pytest.skip("this file system stores UTF-8 names only")
    unit, *_ = Manifest(str(path), "text_image").units(9)
    record, rejected = Manifest(str(path), "text_image").read(unit)
    assert (unit.name + record.origin + rejected.detail).encode().count("caf\N{REPLACEMENT CHARACTER}".encode()) == 3

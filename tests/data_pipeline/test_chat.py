"""Conversations about pictures, as LLaVA, ShareGPT and chat APIs write them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.records import ReasoningRecord, Rejected
from data_pipeline.sources import Chat, Manifest


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + seed, 9)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a.png and coco/b.png."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "coco" / "b.png").write_bytes(png(2))
    return tmp_path


def read(source: Manifest, records: int = 99) -> list[Any]:
    return [item for unit in source.units(records) for item in source.read(unit)]


def chat(root: Path, row: dict[str, Any]) -> ReasoningRecord | Rejected:
    (root / "t.json").write_text(json.dumps([row]))
    (found,) = read(Chat(str(root / "t.json")))
    return found


def said(*texts: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


URL = "data:image/png;base64," + base64.b64encode(png(3)).decode()
ASK, IMAGE_PART = {"type": "text", "text": "what?"}, {"type": "image"}

# A row, the turns expected, and which pictures in order.
CHATS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], list[int]]] = {
    "llava": (
        {"id": "1", "image": "coco/b.png", "conversations": said("<image>\nwhat?", "a cat", "sure?", "yes")},
        [("user", "<image>\nwhat?"), ("assistant", "a cat"), ("user", "sure?"), ("assistant", "yes")],
        [2],
    ),
    "llava, text only": ({"conversations": said("hi", "hello")}, [("user", "hi"), ("assistant", "hello")], []),
    "llava, marks anywhere": (
        {"image": ["a.png", "coco/b.png"], "conversations": said("first", "ok", "<image> or <image>?", "left")},
        [("user", "first"), ("assistant", "ok"), ("user", "<image> or <image>?"), ("assistant", "left")],
        [1, 2],
    ),
    "sharegpt, several pictures without marks": (
        {
            "images": ["coco/b.png", "a.png"],
            "conversations": [{"from": "system", "value": "s"}, *said("differ?", "no")],
        },
        [("system", "s"), ("user", "<image><image>differ?"), ("assistant", "no")],
        [2, 1],
    ),
    "messages": (
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}],
        },
        [("user", "<image>?"), ("assistant", "x")],
        [1],
    ),
    "messages with parts, pictures beside": (
        {
            "images": ["a.png", "coco/b.png"],
            "messages": [
                {"role": "user", "content": [IMAGE_PART, ASK, IMAGE_PART]},
                {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
            ],
        },
        [("user", "<image>what?<image>"), ("assistant", "x")],
        [1, 2],
    ),
    "messages with pictures inside": (
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [ASK, {"type": "image_url", "image_url": {"url": "coco/b.png"}}]},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, ASK]},
                {"role": "assistant", "content": [{"type": "text", "text": "y"}]},
            ]
        },
        [
            ("system", "be brief"),
            ("user", "what?<image>"),
            ("assistant", "x"),
            ("user", "<image>what?"),
            ("assistant", "y"),
        ],
        [2, 3],
    ),
    "messages with a path as the picture": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, ASK]},
                {"role": "assistant", "content": "x"},
            ]
        },
        [("user", "<image>what?"), ("assistant", "x")],
        [1],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations_keep_their_turns_and_the_order_of_pictures(name: str, root: Path) -> None:
    row, turns, pictures = CHATS[name]
    record = chat(root, {**row, "source": "mine", "score": 0.5})
    assert isinstance(record, ReasoningRecord) and list(record.turns) == turns
    assert [image.data for image in record.pictures] == [png(i) for i in pictures]
    assert {"source": "mine", "score": 0.5, "row": 1}.items() <= record.metadata.items()
    assert not {"conversations", "messages", "image", "images"} & record.metadata.keys()


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no conversation": ({"image": "a.png"}, "bad_conversation", "expected conversations or messages, got the fields"),
    "empty": ({"conversations": []}, "bad_conversation", "a user's turn and an assistant's"),
    "no list": ({"conversations": "hi"}, "bad_conversation", "expected a list of turns"),
    "no assistant": ({"conversations": said("<image>?"), "image": "a.png"}, "bad_conversation", "an assistant's"),
    "no user": ({"messages": [{"role": "assistant", "content": "x"}]}, "bad_conversation", "a user's turn"),
    "unknown role": (
        {"conversations": said("a", "b", roles=("user", "tool"))},
        "bad_conversation",
        "'tool' is none of",
    ),
    "more marks than pictures": (
        {"image": "a.png", "conversations": said("<image><image>", "x")},
        "bad_conversation",
        "2 marks <image> for 1 pictures",
    ),
    "fewer marks than pictures": (
        {"image": ["a.png", "a.png"], "conversations": said("<image>", "x")},
        "bad_conversation",
        "1 marks <image> for 2 pictures",
    ),
    "marks without pictures": ({"conversations": said("<image>", "x")}, "bad_conversation", "for 0 pictures"),
    "pictures in both places": (
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
                {"role": "assistant", "content": "x"},
            ],
        },
        "bad_conversation",
        "both inside the turns and beside",
    ),
    "a part of another type": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}]},
        "bad_conversation",
        "'video' is neither",
    ),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "bad_conversation", "a text or a list of parts"),
    "a picture of a wrong type": (
        {"image": 5, "conversations": said("?", "x")},
        "bad_conversation",
        "a picture must be a path",
    ),
    "a picture that is gone": ({"image": "b.png", "conversations": said("?", "x")}, "missing_file", "'b.png'"),
    "a picture outside": ({"image": "../x.png", "conversations": said("?", "x")}, "path_outside_folder", "'../x.png'"),
    "a picture on the web": ({"image": "http://h/x.png", "conversations": said("?", "x")}, "missing_file", "http://h"),
    "an inline picture that is none": (
        {"image": "data:image/png;base64,AAAA", "conversations": said("?", "x")},
        "not_a_picture",
        "expected PNG, JPEG or WebP",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_conversation_that_does_not_fit_is_named(name: str, root: Path) -> None:
    row, reason, detail = FAULTS[name]
    found = chat(root, row)
    assert isinstance(found, Rejected) and found.reason == reason and found.key == "line-1"
    assert "t.json line 1: " in found.detail and detail in found.detail


def test_conversations_in_parquet_with_the_pictures_in_it(root: Path) -> None:
    rows = [
        {
            "images": [{"bytes": png(i), "path": None}, {"bytes": png(2), "path": "b.png"}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "image", "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"{i}"}]},
            ],
        }
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "t.parquet", row_group_size=1)
    found = read(Chat(str(root / "t.parquet")), 1)
    assert [[image.data for image in record.pictures] for record in found] == [[png(i), png(2)] for i in range(3)]
    assert [record.turns for record in found] == [(("user", "<image><image>"), ("assistant", f"{i}")) for i in range(3)]


def test_conversations_under_columns_of_ones_own_and_pictures_elsewhere(root: Path) -> None:
    (root / "text").mkdir()
    row = {"dialog": said("<image>?", "x"), "pic": "b.png"}
    (root / "text" / "t.jsonl").write_text(json.dumps(row))
    columns: dict[str, str | list[str]] = {"turns": "dialog", "sources": "pic"}
    source = Chat(str(root / "text" / "t.jsonl"), columns=columns, pictures=str(root / "coco"), origin="o", licence="l")
    (record,) = read(source)
    assert record.turns == (("user", "<image>?"), ("assistant", "x")) and record.pictures[0].data == png(2)
    assert (record.origin, record.licence) == ("o", "l")

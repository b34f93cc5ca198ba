"""WebDataset tars: ours read back as they were written, those of others as records or named rejections."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.index import load_index, sidecar
from data_pipeline.recipe import Recipe
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
from data_pipeline.select import Selection, select
from data_pipeline.shards import write_shard
from data_pipeline.sources import Scenes, WebDataset
from data_pipeline.sources.webdataset import selected_ids


def encoded(seed: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + seed, 9)).save(buffer, form)
    return buffer.getvalue()


A, B, C = (
    EncodedImage(encoded(i, form), name)
    for i, form, name in [(1, "PNG", "png"), (2, "JPEG", "jpg"), (3, "WEBP", "webp")]
)


def read(path: Path, *arguments: Any, **settings: Any) -> list[Any]:
    source = WebDataset(str(path), *arguments, **settings)
    return [item for unit in source.units(9) for item in source.read(unit)]


def tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            content = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


Text = st.text(st.characters(codec="utf-8"), max_size=20)
Picture = st.sampled_from([A, B, C])
Pictures = st.lists(Picture, max_size=12).map(tuple)
Facts: dict[str, Any] = {
    "origin": Text,
    "licence": Text,
    "split": st.sampled_from(["", "train", "val"]),
    "metadata": st.dictionaries(Text, Text | st.integers() | st.booleans() | st.lists(Text, max_size=2), max_size=3),
}
Turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), Text), max_size=4).map(tuple)
Key = st.from_regex(r"[0-9a-z_-]{1,60}", fullmatch=True)
Records = st.one_of(
    st.builds(TextImageRecord, Key, Picture, Text, **Facts),
    st.builds(EditRecord, Key, Pictures, Picture, Text, **Facts),
    st.builds(PromptRecord, Key, Text, Pictures, **Facts),
    st.builds(PreferenceRecord, Key, Text, Picture, Picture, Pictures, **Facts),
    st.builds(ReasoningRecord, Key, Pictures, Turns, **Facts),
)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(Records, min_size=1, max_size=8, unique_by=lambda record: record.key))
def test_every_kind_of_record_is_read_back_as_it_was_written(
    records: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shard = tmp_path_factory.mktemp("t") / "s.tar"
    write_shard(shard, [(record, {}) for record in records])
    assert read(shard) == records
    sidecar(shard).unlink()
    assert read(shard) == records


def test_shards_of_a_build_are_known_by_its_manifest_and_not_read(tmp_path: Path) -> None:
    manifest = Recipe(Scenes(1, 4, 0), records_per_shard=2).build(tmp_path / "in")
    for shard in (tmp_path / "in").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    units = list(WebDataset(str(tmp_path / "in")).units(9))
    assert [unit.content for unit in units] == [shard["sha256"] for shard in manifest["shards"]]
    with open(tmp_path / "in" / units[0].name, "ab") as file:
        file.write(bytes(512))
    assert next(WebDataset(str(tmp_path / "in")).units(9)).content != units[0].content
    (tmp_path / "in" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished build"):
        list(WebDataset(str(tmp_path / "in")).units(9))


def test_what_was_selected_is_what_a_second_build_reads(tmp_path: Path) -> None:
    Recipe(Scenes(1, 6, 0, 0), [], 3).build(tmp_path / "out")
    keys = [record.key for record in load_index(tmp_path / "out")]
    before = [unit.content for unit in WebDataset(str(tmp_path / "out")).units(9)]
    (tmp_path / "gone.txt").write_text("\n".join(keys[:2]))
    select(tmp_path / "out", Selection(takedown=[str(tmp_path / "gone.txt")]))
    assert [record.key for record in read(tmp_path / "out")] == keys[2:]
    source = WebDataset(str(tmp_path / "out"))
    units = list(source.units(9))
    assert [unit.content for unit in units] == before and all("selection" in unit.where for unit in units)
    select(tmp_path / "out", Selection(where=["text_length > 9999"]))
    selected_ids.cache_clear()
    with pytest.raises(InputError, match="changed while it was built from"):
        list(source.read(units[0]))


def test_a_tar_by_others_is_known_by_samples_wherever_it_lies(tmp_path: Path) -> None:
    def content(path: Path) -> str:
        (unit,) = WebDataset(str(path)).units(9)
        return unit.content

    small = tar(tmp_path / "a.tar", [("0.png", A.data), ("0.txt", "x")])
    shutil.copy(small, tmp_path / "b.tar")
    os.utime(tmp_path / "b.tar", (0, 0))
    assert content(small) == content(tmp_path / "b.tar")
    for at in (0, 700, small.stat().st_size - 1):  # of a small one every byte counts
        data = bytearray(small.read_bytes())
        data[at] ^= 1
        (tmp_path / "c.tar").write_bytes(data)
        assert content(tmp_path / "c.tar") != content(small)
    shutil.copy(small, tmp_path / "huge.tar")
    os.truncate(tmp_path / "huge.tar", 1 << 42)  # no disk has it, and nobody waits for its sha256
    assert content(tmp_path / "huge.tar") != content(small)


IMG2DATASET = {
    "caption": "a cat",
    "url": "http://h/x.jpg",
    "key": "000000001",
    "status": "success",
    "error_message": None,
}


def test_tars_of_img2dataset(tmp_path: Path) -> None:
    facts = {**IMG2DATASET, "width": 10, "similarity": 0.3, "exif": "{}"}
    members: list[tuple[str, bytes | str]] = []
    for i in range(3):
        members += [
            (f"00000000{i}.jpg", B.data),
            (f"00000000{i}.txt", f" cat {i}\n"),
            (f"00000000{i}.json", json.dumps(facts)),
        ]
    tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").write_bytes(b"")
    found = read(tmp_path, licence="unknown")
    assert [record.caption for record in found] == ["cat 0", "cat 1", "cat 2"]
    assert all(record.image == B and record.licence == "unknown" for record in found)
    assert found[0].origin == "00000.tar" and len({record.key for record in found}) == 3
    kept = {"url": "http://h/x.jpg", "similarity": 0.3, "width": 10, "sample": "000000000"}
    assert kept.items() <= found[0].metadata.items() and "error_message" not in found[0].metadata


FOREIGN: dict[str, tuple[list[tuple[str, bytes | str]], str | None, str]] = {
    "text member": ([("a.png", A.data), ("a.caption", "x")], None, "x"),
    "text in the JSON": ([("a.PNG", A.data), ("a.json", '{"text": "x"}')], None, "x"),
    "a byte order mark": ([("a.png", A.data), ("a.txt", b"\xef\xbb\xbfx")], None, "x"),
    "in a folder": ([("set/1/a.png", A.data), ("set/1/a.txt", "x")], None, "x"),
    "no text": ([("a.png", A.data)], "bad_sample", "expected caption or text"),
    "no text but a url": ([("a.png", A.data), ("a.json", '{"url": "http://h"}')], "bad_sample", "expected caption"),
    "no picture": ([("a.txt", "x")], "bad_sample", "its members are txt"),
    "no picture but a url": (
        [("a.txt", "x"), ("a.json", '{"url": "http://h"}')],
        "bad_sample",
        "members are json, txt",
    ),
    "two pictures": ([("a.png", A.data), ("a.jpg", B.data), ("a.txt", "x")], "bad_sample", "members are jpg, png, txt"),
    "a pair": ([("a.src.png", A.data), ("a.tgt.png", B.data), ("a.txt", "x")], "bad_sample", "expected a picture in"),
    "text of bytes": ([("a.png", A.data), ("a.txt", b"\xff")], "bad_sample", "utf-8"),
    "JSON that is none": ([("a.png", A.data), ("a.json", "{")], "bad_sample", "Expecting"),
    "JSON that is a list": ([("a.png", A.data), ("a.json", "[]")], "bad_sample", "expected an object"),
    "deep JSON": ([("a.png", A.data), ("a.json", "[" * 99_999)], "bad_sample", "recursion"),
    "half a character": ([("a.png", A.data), ("a.json", '{"text": "\\ud800"}')], "bad_sample", "surrogates"),
    "half a character in a fact": (
        [("a.png", A.data), ("a.txt", "x"), ("a.json", '{"tag": "\\ud800"}')],
        "bad_sample",
        "surrogates",
    ),
    "text that is a number": ([("a.png", A.data), ("a.json", '{"text": 5}')], "bad_sample", "got a int"),
    "a text too long": ([("a.png", A.data), ("a.txt", "x" * (1 << 20) + "x")], "bad_sample", "at most 1048576"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_samples_by_others(name: str, tmp_path: Path) -> None:
    members, reason, text = FOREIGN[name]
    found, behind = read(tar(tmp_path / "s.tar", [*members, ("z.png", C.data), ("z.txt", "z")]))
    assert isinstance(behind, TextImageRecord) and behind.image.data == C.data
    if reason is None:
        assert isinstance(found, TextImageRecord) and (found.caption, found.image.data) == (text, A.data)
        assert found.image.extension == "png"
    else:
        assert (
            isinstance(found, Rejected) and found.reason == reason and text in found.detail and "s.tar" in found.detail
        )


def test_pairs_in_tars_by_the_names_of_their_members(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = [
        ("a.src.png", A.data),
        ("a.ref.webp", C.data),
        ("a.tgt.jpg", B.data),
        ("a.prompt.txt", "paint it"),
        ("a.json", '{"score": 9}'),
        ("b.src.png", A.data),
        ("b.prompt.txt", "no target"),
    ]
    columns = {"sources": ["src.png", "ref.webp"], "target": ["tgt.png", "tgt.jpg"], "text": "prompt.txt"}
    record, rejected = read(tar(tmp_path / "s.tar", members), "edit", columns)
    assert isinstance(record, EditRecord) and record.sources == (A, C) and record.target == B
    assert (record.instruction, record.metadata) == ("paint it", {"score": 9, "sample": "a"})
    assert rejected.reason == "bad_sample" and "expected a picture in tgt.png or tgt.jpg" in rejected.detail


def test_conversations_in_tars(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    path = tar(
        tmp_path / "s.tar", [("a.jpg", B.data), ("a.json", json.dumps({"conversations": said, "image": "x.jpg"}))]
    )
    (record,) = read(path, "chat")
    assert isinstance(record, ReasoningRecord) and record.pictures == (B,)
    assert record.turns == (("user", "<image>?"), ("assistant", "x"))


def forged(**changes: Any) -> list[tuple[str, bytes | str]]:
    """A sample whose JSON claims to be ours."""
    facts = {
        "kind": "text_image",
        "caption": "x",
        "metadata": {},
        "sha256": {"image.png": hashlib.sha256(A.data).hexdigest()},
        **changes,
    }
    return [("a.image.png", A.data), ("a.json", json.dumps(facts))]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "poster"},
        {"kind": "edit", "instruction": "x"},
        {"kind": "reasoning", "turns": "abc"},
        {"kind": "reasoning", "turns": [["user", 5]]},
        {"kind": "prompt", "prompt": "x"},
        {"caption": 5},
        {"caption": "\ud800"},
        {"metadata": 5},
        {"metadata": {"a": "\ud800"}},
        {"origin": {}},
        {"split": None},
        {"sha256": {}},
        {"sha256": None},
        {"sha256": {"image.png": "00"}},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_json_that_claims_to_be_ours_is_checked(changes: dict[str, Any], tmp_path: Path) -> None:
    (good,) = read(tar(tmp_path / "good.tar", forged()))
    assert isinstance(good, TextImageRecord) and good.image == A
    (found,) = read(tar(tmp_path / "bad.tar", forged(**changes)))
    assert isinstance(found, Rejected) and found.reason in ("bad_sample", "damaged_sample")


def test_our_json_under_a_key_that_cannot_be_ours(tmp_path: Path) -> None:
    for key in ("A", "sub/a", "a b"):
        members = [(name.replace("a.", f"{key}.", 1), data) for name, data in forged()]
        (found,) = read(tar(tmp_path / "s.tar", members))
        assert isinstance(found, Rejected) and found.reason == "bad_sample", key


def test_two_pictures_of_one_name_in_our_own_sample(tmp_path: Path) -> None:
    hashes = {f"image.{image.extension}": hashlib.sha256(image.data).hexdigest() for image in (A, B)}
    (found,) = read(tar(tmp_path / "s.tar", [("a.image.jpg", B.data), *forged(sha256=hashes)]))
    assert isinstance(found, Rejected) and "image.jpg, image.png" in found.detail


def test_a_damaged_index_is_one_clear_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [(TextImageRecord("a", A, "x"), {})])
    sidecar(tmp_path / "s.tar").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"s\.index\.parquet is damaged.*remove it"):
        read(tmp_path)


def test_what_an_index_promises_and_the_tar_lacks_is_lost_by_name(tmp_path: Path) -> None:
    record = TextImageRecord("a", A, "x")
    write_shard(tmp_path / "s.tar", [(record, {}), (dataclasses.replace(record, key="b"), {})])
    index = sidecar(tmp_path / "s.tar").read_bytes()
    write_shard(tmp_path / "s.tar", [(record, {})])
    sidecar(tmp_path / "s.tar").write_bytes(index)
    first, lost = read(tmp_path)
    assert first == record and (lost.key, lost.reason) == ("b", "lost")

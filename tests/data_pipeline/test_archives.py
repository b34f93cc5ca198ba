"""Pictures inside archives of the field: found by name, whole or in parts, damaged or hostile, and never extracted."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.records import EditRecord, EncodedImage, Record, Rejected
from data_pipeline.sources import Manifest, archives
from data_pipeline.sources.archives import Archives, Parts, grouped


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 16), bytes((seed * 31 + i * i) % 256 for i in range(768))).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def split(data: bytes, count: int) -> list[bytes]:
    size = -(-len(data) // count)
    return [data[i * size : (i + 1) * size] for i in range(count)]


MEMBERS = {f"set/{i // 4}/img_{i}.png": png(i) for i in range(12)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where archives go, a folder of its own."""
    (tmp_path / "archives").mkdir()
    return tmp_path / "archives"


def picture(folder: Path, name: str) -> bytes:
    found = Archives(str(folder)).read(name)
    assert isinstance(found, EncodedImage), found
    return found.data


def fault(folder: Path, name: str) -> str:
    found = Archives(str(folder)).read(name)
    assert isinstance(found, tuple), found
    return found[0]


SUFFIXES = {
    "split": [f".tar.split.{i:03d}" for i in range(3)],
    "part": [f".tar.gz.part{i:03d}" for i in range(3)],
    "part from 1": [f".tar.gz.part{i:03d}" for i in range(1, 4)],
    "part letters": [f".tar.gz.parta{letter}" for letter in "abc"],
    "letters": [f".tar.gz.a{letter}" for letter in "abc"],
    "plain letters": [f".tar.a{letter}" for letter in "abc"],
    "three letters": [f".tgz.aa{letter}" for letter in "abc"],
    "digits": [f".tar.gz.{i:02d}" for i in range(3)],
    "unpadded": [f".tar.{i}" for i in range(12)],
    "many letters": [f".tar.{a}{b}" for a in "ab" for b in "abcdefghijklmnopqrstuvwxyz"],
    "whole": [".tar"],
    "whole gzipped": [".tar.gz"],
    "tgz": [".tgz"],
}


@pytest.mark.parametrize("kind", SUFFIXES)
def test_archives_whole_and_in_parts(kind: str, folder: Path) -> None:
    suffixes = SUFFIXES[kind]
    data = gzip.compress(tar_of(MEMBERS), 1) if "gz" in suffixes[0] else tar_of(MEMBERS)
    for suffix, part in zip(suffixes, split(data, len(suffixes)), strict=True):
        (folder / f"gen{suffix}").write_bytes(part)
    for other in ("gen.tar.gz.md5", "gen.tar.idx", "gen.json", "gen.tar.xz"):
        (folder / other).write_text("not a part")
    for name, expected in MEMBERS.items():
        assert picture(folder, name) == expected
    left = {path.suffix for path in folder.rglob("*") if path.is_file() and path.parent != folder}
    assert left == ({".plain", ".lock"} if "gz" in suffixes[0] else set())


@pytest.mark.parametrize(
    "names",
    [
        ["x.tar.split.000", "x.tar.split.002"],
        ["x.tar.gz.part002", "x.tar.gz.part003"],
        ["x.tar.gz.ab", "x.tar.gz.ac"],
        ["x.tar.gz.aa", "x.tar.gz.ac"],
        ["x.tar.gz.aa", "x.tar.gz.01"],
        ["x.tar.1", "x.tar.01"],
    ],
)
def test_a_missing_part_is_named_before_anything_is_read(names: list[str], folder: Path) -> None:
    for name in names:
        (folder / name).write_bytes(b"part")
    (folder.parent / "t.jsonl").write_text("{}")
    source = Manifest(str(folder.parent / "t.jsonl"), archives=str(folder))
    with pytest.raises(InputError, match=r"x\.tar.*only the parts x\.tar.* are there; fetch the others"):
        source.units(9)


def test_a_whole_archive_is_taken_instead_of_its_parts(folder: Path) -> None:
    data = tar_of(MEMBERS)
    (folder / "x.tar").write_bytes(data)
    (folder / "x.tar.ab").write_bytes(data[:99])
    assert list(grouped(folder)) == ["x.tar"] and picture(folder, "img_3.png") == MEMBERS["set/0/img_3.png"]


def test_names_by_path_or_by_its_end_where_that_is_unique(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "a.tar").write_bytes(tar_of({"./top/a/x.png": png(1), "top/b/x.png": png(2), "y.png": png(3)}))
    (folder / "deep" / "b.tar").write_bytes(tar_of({"other/y.png": png(4), "other/ax.png": png(5)}))
    assert picture(folder, "top/a/x.png") == picture(folder, "a/x.png") == picture(folder, "./a/x.png") == png(1)
    assert picture(folder, "b/x.png") == png(2) and picture(folder, "other/y.png") == png(4)
    assert picture(folder, "y.png") == png(3)  # the path itself comes before ends of paths
    assert picture(folder, "ax.png") == png(5)
    for name in ("x.png", "z.png", "p/x.png", "a/../a/x.png", "/top/a/x.png", "top/a", ""):
        assert fault(folder, name) in ("missing_file", "unknown_extension")
    assert "2 times" in Archives(str(folder)).read("x.png")[1]  # type: ignore[index]


def test_a_member_that_comes_twice_is_ambiguous(folder: Path) -> None:
    (folder / "a.tar").write_bytes(tar_of([("x.png", png(1)), ("x.png", png(2)), ("y.png", png(3))]))
    assert fault(folder, "x.png") == "missing_file" and picture(folder, "y.png") == png(3)


def test_only_plain_members_of_harmless_names_are_found(folder: Path) -> None:
    buffer = io.BytesIO(tar_of({"../up.png": png(1), "/etc/abs.png": png(2), "ok.png": png(3), "note.txt": b"x"}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (folder / "a.tar").write_bytes(buffer.getvalue())
    before = sorted(path.name for path in folder.parent.rglob("*"))
    for name in ("../up.png", "up.png", "/etc/abs.png", "abs.png", "link.png", "note.txt"):
        assert fault(folder, name) in ("missing_file", "unknown_extension")
    assert picture(folder, "ok.png") == png(3)
    assert sorted(path.name for path in folder.parent.rglob("*")) == before


@pytest.mark.parametrize("form", [".tar", ".tar.gz"])
def test_a_damaged_end_costs_only_what_lies_there(form: str, folder: Path) -> None:
    data = tar_of(MEMBERS)
    data = gzip.compress(data, 1) if form == ".tar.gz" else data
    (folder / f"x{form}").write_bytes(data[: len(data) // 2])
    rows = [{"source": name, "target": "img_0.png", "instruction": "x"} for name in MEMBERS]
    table = folder.parent / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    source = Manifest(str(table), archives=str(folder))

    def read() -> list[Record | Rejected]:
        return [item for unit in source.units(5) for item in source.read(unit)]

    found = read()
    kept = [item for item in found if isinstance(item, EditRecord)]
    assert len(found) == len(rows) and 3 <= len(kept) < len(rows)
    assert {item.reason for item in found if isinstance(item, Rejected)} == {"missing_file"}
    assert all(item.sources[0].data == MEMBERS[item.metadata["files"][0]] for item in kept)


def test_an_archive_that_is_fetched_again_is_read_anew(folder: Path) -> None:
    data = gzip.compress(tar_of(MEMBERS), 1)
    (folder / "x.tar.gz").write_bytes(data[: len(data) // 2])
    first = Archives(str(folder))
    assert isinstance(first.read("img_11.png"), tuple)
    (folder / "x.tar.gz").write_bytes(data)
    again = Archives(str(folder), str(folder / ".spool"))  # as another process would: nothing is remembered
    assert isinstance(again.read("img_11.png"), EncodedImage)


@pytest.mark.parametrize("data", [b"", b"no archive", b"<html>" * 500, bytes(5000), b"\x1f\x8b" + b"x" * 99])
@pytest.mark.parametrize("form", [".tar", ".tar.gz"])
def test_what_is_no_archive_holds_nothing(data: bytes, form: str, folder: Path) -> None:
    (folder / f"x{form}").write_bytes(data)
    assert fault(folder, "a.png") == "missing_file"
    assert f"nothing can be read of x{form}" in Archives(str(folder)).read("a.png")[1]


def test_a_small_archive_of_zeros_is_no_bomb(folder: Path) -> None:
    (folder / "x.tar.gz").write_bytes(gzip.compress(tar_of({"x.png": png(1)[:9]})))
    assert picture(folder, "x.png") == png(1)[:9]


def test_a_gzip_bomb_is_stopped(folder: Path) -> None:
    (folder / "x.tar.gz").write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(InputError, match=r"x\.tar\.gz.* grows to more than \d+ bytes: no archive of pictures"):
        Archives(str(folder)).read("a.png")
    assert not [path for path in (folder / ".spool").iterdir() if path.suffix != ".lock"]


def test_a_spool_that_cannot_be_written_is_one_clear_error(folder: Path) -> None:
    (folder / "x.tar.gz").write_bytes(gzip.compress(tar_of(MEMBERS)))
    (folder.parent / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot decompress x\.tar\.gz .*set source\.spool"):
        Archives(str(folder), str(folder.parent / "file")).read("img_1.png")
    spool = folder.parent / "elsewhere"
    assert isinstance(Archives(str(folder), str(spool)).read("img_1.png"), EncodedImage)
    assert len(list(spool.glob("*.plain"))) == 1 and not (folder / ".spool").exists()


def test_pictures_that_vanish_while_a_build_reads_are_named(folder: Path) -> None:
    (folder / "x.tar").write_bytes(tar_of(MEMBERS))
    assert picture(folder, "img_1.png") == MEMBERS["set/0/img_1.png"]
    os.truncate(folder / "x.tar", 2048)
    assert fault(folder, "img_11.png") == "unreadable_file"


def test_a_member_larger_than_any_picture_is_not_read(folder: Path) -> None:
    entry = tarfile.TarInfo("x.png")
    entry.size = 1 << 40
    with open(folder / "x.tar", "wb") as file:
        file.write(entry.tobuf())
        file.truncate((1 << 40) + 4096)
    assert fault(folder, "x.png") == "file_too_large"


# Pictures of GPT-Image-Edit lie in archives of sources and archives of outputs; the table joins them, not their order.
def test_sources_and_targets_in_archives_of_their_own(folder: Path) -> None:
    for name, members in {"input": [1, 2], "output": [12, 11]}.items():
        data = gzip.compress(tar_of({f"hq/{name}/{i % 10}.png": png(i) for i in members}))
        for number, part in enumerate(split(data, 2)):
            (folder / f"{name}.tar.gz.part{number:03d}").write_bytes(part)
    rows: list[dict[str, Any]] = [
        {"input": f"input/{i}.png", "output": f"output/{i}.png", "edit": str(i)} for i in (2, 1, 3)
    ]
    (folder.parent / "t.json").write_text(json.dumps(rows))
    columns: dict[str, str | list[str]] = {"text": "edit", "sources": "input", "target": "output"}
    source = Manifest(str(folder.parent / "t.json"), columns=columns, archives=str(folder))
    found = [item for unit in source.units(2) for item in source.read(unit)]
    pairs = [(item.sources[0].data, item.target.data) for item in found if isinstance(item, EditRecord)]
    assert pairs == [(png(2), png(12)), (png(1), png(11))]
    assert isinstance(found[2], Rejected) and "'input/3.png' is in no archive" in found[2].detail


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    reads=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 99)), max_size=12),
)
def test_parts_read_as_the_file_they_make(
    sizes: list[int], reads: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, data = tmp_path_factory.mktemp("parts"), bytes(i % 251 for i in range(sum(sizes)))
    paths, whole = [], io.BytesIO(data)
    for number, size in enumerate(sizes):
        paths.append(folder / str(number))
        paths[-1].write_bytes(data[sum(sizes[:number]) :][:size])
    with io.BufferedReader(Parts(paths), 16) as parts:
        assert parts.read() == data and parts.seek(0, os.SEEK_END) == len(data)
        for offset, count in reads:
            assert parts.seek(offset) == whole.seek(offset) and parts.read(count) == whole.read(count)


def test_a_folder_is_listed_once_however_many_archives_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(80):  # more than are kept open
        (folder / f"{i:03d}.tar").write_bytes(tar_of({f"{i}.png": png(i)}))
    listings: list[Path] = []
    monkeypatch.setattr(archives, "grouped", lambda path: listings.append(path) or grouped(path))
    assert [picture(folder, f"{i}.png") for i in range(80)] == [png(i) for i in range(80)]
    assert len(listings) == 1

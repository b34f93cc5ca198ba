"""Lint: silent on whole tars, ours or by others, and one named line for each defect."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.index import load_index, sidecar
from data_pipeline.recipe import Recipe
from data_pipeline.sources import Scenes


def jpeg(side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def lines(path: Path, capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    status = main(["lint", str(path)])
    return status, capsys.readouterr().out.splitlines()


def test_whole_tars_have_no_defect(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Recipe(Scenes(1, 6, 6, 0), records_per_shard=4).build(tmp_path / "ours")
    tar(tmp_path / "theirs" / "00000.tar", {"000.jpg": jpeg(), "000.txt": b"a", "000.json": b'{"url": "x"}'})
    for folder in ("ours", "theirs"):
        status, found = lines(tmp_path / folder, capsys)
        assert status == 0 and found[1:] == [f"{tmp_path / folder}: no defect"]


TRIPLET = {"0.src.jpg": jpeg(), "0.tgt.jpg": jpeg(24), "0.txt": b"make it larger"}
MEMBERS = '{"sources": "src.jpg", "target": "tgt.jpg", "text": "txt"}'


def test_edits_by_others_are_linted_by_their_members(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tar(tmp_path / "theirs" / "00000.tar", TRIPLET)
    options = ["lint", str(tmp_path / "theirs"), "--layout", "edit", "--columns"]
    assert main([*options, MEMBERS]) == 0 and "no defect" in capsys.readouterr().out
    assert main(options[:2]) == 1 and "bad_sample" in capsys.readouterr().out
    assert main([*options, '{"subject": "src.jpg"}']) == 2 and "names ['subject']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "src.jpg"])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"0.jpg": jpeg(), "0.txt": b"a", "1.jpg": jpeg()}, "1: bad_sample"),
        ({"0.jpg": jpeg(), "0.txt": b"  "}, "empty_text"),
        ({"0.jpg": b"<html>", "0.txt": b"a"}, "unreadable_image"),
        ({"0.jpg": jpeg()[:-200] + bytes(100), "0.txt": b"a"}, "unreadable_image"),
        ({"0.jpg": jpeg(), "1.txt": b"a", "0.txt": b"a"}, "scattered_sample"),
        ({"0.jpg": jpeg(), "0.txt": b"a", "../1.jpg": jpeg()}, "unsafe_name"),
        ({"0.jpg": jpeg(), "0.txt": b"a", "readme": b"hi"}, "no_extension"),
        ({"0.jpg": jpeg(), "0.txt": b"\xff\xfe"}, "bad_sample"),
        ({"0.jpg": jpeg(), "0.json": b"[1]"}, "bad_sample"),
        ({"0.v1.jpg": jpeg(), "0.v2.jpg": jpeg(), "0.txt": b"a"}, "bad_sample"),
    ],
)
def test_a_defect_is_named_with_its_place(
    members: dict[str, bytes], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status, found = lines(tar(tmp_path / "x.tar", members), capsys)
    assert status == 1 and any(line.startswith("x.tar: ") and expected in line for line in found)


def test_a_damaged_member_and_a_lost_sample_of_ours_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Recipe(Scenes(1, 4, 0, 0)).build(tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[600] ^= 1  # inside the first picture
    damaged = tmp_path / "damaged" / shard.name
    damaged.parent.mkdir()
    damaged.write_bytes(data[: load_index(tmp_path / "out")[-1].members["json"].offset])
    shutil.copy(sidecar(shard), sidecar(damaged))
    status, found = lines(damaged.parent, capsys)
    assert status == 1 and any(": lost: " in line for line in found)
    assert any("damaged_sample" in line and "sha256" in line for line in found)


@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("offset", lambda v: v + 512, "sha256, xxh3"),
        ("offset", lambda v: v + (1 << 40), "is said to lie at"),
        ("size", lambda v: v - 1, "sha256, xxh3"),
        ("width", lambda v: v + 32, "another pixels than stated"),
        ("xxh3", lambda v: v ^ 1, "another xxh3 than stated"),
        ("sample_id", lambda v: v ^ 1, "another sample_id than stated"),
    ],
)
def test_an_index_that_would_mislead_training_is_named(
    column: str, change: Callable, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Recipe(Scenes(1, 3, 0, 0)).build(tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.index.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[2][column] = change(rows[2][column])  # the second record's picture
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    status, found = lines(tmp_path / "out", capsys)
    (line,) = [line for line in found if "wrong_index: image" in line]
    assert status == 1 and expected in line and f": {rows[2]['key']}: " in line


def test_a_tar_without_its_index_or_its_manifest_s_mention_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Recipe(Scenes(1, 8, 0, 0), records_per_shard=2).build(tmp_path / "out")
    first, second, third, fourth = sorted((tmp_path / "out").glob("*.tar"))
    sidecar(first).unlink()
    second.rename(tmp_path / "out" / "other.tar")
    sidecar(third).write_bytes(b"no parquet")
    status, found = lines(tmp_path / "out", capsys)
    assert status == 1 and f"{second.name}: manifest.json: missing_tar: it is named there" in found
    assert any(line.startswith(f"{first.name}: ") and ": no_index: " in line for line in found)
    assert any(line.startswith("other.tar: ") and ": unknown_tar: " in line for line in found)
    assert any(line.startswith(f"{third.name}: ") and ": damaged_index: " in line for line in found)
    assert not any(line.startswith(fourth.name) for line in found)


def test_a_key_in_two_tars_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Recipe(Scenes(1, 3, 0, 0)).build(tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tar")
    shutil.copy(shard, tmp_path / "out" / "again.tar")
    status, found = lines(tmp_path / "out", capsys)
    assert status == 1 and sum("repeated_key" in line for line in found) == 3 + 1  # each, and their count


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["lint", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err

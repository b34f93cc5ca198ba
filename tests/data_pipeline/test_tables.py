"""Tables as they are found: every row is read or refused by name, in units of any size and order."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import read, write

from data_pipeline.errors import InputError
from data_pipeline.records import PromptRecord, Record, Rejected
from data_pipeline.sources import Manifest, Scenes
from data_pipeline.sources.lines import BOM, MAX_LINE, MAX_LINES, line_groups


def reasons(items: list[Record | Rejected]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Rejected)]


CSV_FAULTS: list[tuple[bytes, list[str | None]]] = [
    (b"prompt,n\r\na,1\r\nb,2\r\n", ["a", "b"]),
    (b'\xef\xbb\xbf"prompt",n\n"line\r\nend, ""q""",1\nb,2', ['line\r\nend, "q"', "b"]),
    (b'n,"pro\nmpt"\n1,a\n', [None]),
    (b"prompt,n\na\nb,2,3\n\nc,3\n", [None, None, "c"]),
    (b'prompt,n\n"a,1\nb,2\nc,3\n', [None, "b", "c"]),
    (b'prompt,n\na "b" c,1\n5" disk,2\n"x\ny",3\n', ['a "b" c', '5" disk', "x\ny"]),
    (b'prompt,n\n"a"b,1\nc,2\n', [None, "c"]),
    (b"prompt,n\ncaf\xe9,1\ncaf\xc3\xa9,2\n", [None, "café"]),
    (b"prompt,n\na\rb,1\nc,2\n", [None, "c"]),
    (b"other,n\na,1\n", [None]),
    (b"prompt,n\n" + b"x" * (MAX_LINE + 9) + b",1\nc,2\n", [None, "c"]),
    (b'prompt,n\n"' + b"x" * 200_000 + b"\n" + b"y,1\n" * 3, [None, "y", "y", "y"]),
]


@pytest.mark.parametrize(("data", "expected"), CSV_FAULTS, ids=range(len(CSV_FAULTS)))
def test_csv_as_it_is_found(data: bytes, expected: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    for records in (1, 2, 99):
        found = read(Manifest(str(tmp_path / "t.csv"), "prompts"), records)
        assert [None if isinstance(item, Rejected) else item.prompt for item in found] == expected
        assert set(reasons(found)) <= {"bad_csv", "missing_field"}
        assert b"b,2,3" not in data or "3 fields, the header has 2" in found[1].detail
    assert all(f"t.csv line {item.key.removeprefix('line-')}: " in item.detail for item in found if reasons([item]))


class Counted(io.BytesIO):
    """A file that counts the lines read from it."""

    lines = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        self.lines += 1
        return super().readline(size)


def test_quotes_that_never_end_cost_no_quadratic_time(tmp_path: Path) -> None:
    data = b'x","y\n' * 1000
    file = Counted(data)
    assert len(list(line_groups(file, len(data), ","))) == 1000
    assert file.lines <= 1000 * MAX_LINES < 1000 * 1000 / 2
    (tmp_path / "t.csv").write_bytes(b"prompt,n\n" + data)
    assert reasons(read(Manifest(str(tmp_path / "t.csv"), "prompts"), 300)) == ["bad_csv"] * 1000


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(InputError, match="a column twice: prompt, prompt"):
        read(Manifest(str(tmp_path / "t.csv"), "prompts"))


JSONL_FAULTS = [
    (b'{"prompt": "x", "t": "\\ud800"}', "bad_json"),
    (b'{"prompt": "\\ud83d\\ude00"}', None),
    (b'{"prompt": "x", "t": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "bad_json"),
    (b'{"prompt": "' + b"x" * (2 * MAX_LINE) + b'"}', "bad_json"),
    (b'{"prompt": "x"} {"prompt": "y"}', "bad_json"),
    (b'["prompt"]', "bad_json"),
    (b'{"prompt": NaN}', "missing_field"),
    (b'{"prompt": {"a": 1}}', "missing_field"),
    (b'{"prompt": []}', "missing_field"),
    (b'{"prompt": "a\x00"}', "bad_json"),
    (b'{"prompt": "x", "source": 5}', "missing_field"),
    (b'{"prompt": "x", "source": {"path": "a.png"}}', "missing_field"),
    (b'{"prompt": "x", "source": {"bytes": "a.png"}}', "missing_file"),
    (b'{"prompt": "x", "source": "data:image/png;base64,!!!"}', "not_a_picture"),
    (b'{"prompt": "x", "source": "data:audio/wav;base64,UklGRgAAAABXQVZFZm10IA=="}', "not_a_picture"),
    (b'{"prompt": "x", "source": "data:text/html,<html>"}', "not_a_picture"),
]


@pytest.mark.parametrize(("line", "reason"), JSONL_FAULTS, ids=range(len(JSONL_FAULTS)))
def test_a_json_line_is_read_or_refused_by_name(line: bytes, reason: str | None, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\n \r\n" + line + b'\r\n\n{"prompt": "next"}')
    for records in (1, 99):
        first, second = read(Manifest(str(tmp_path / "t.jsonl"), "prompts"), records)
        assert second.prompt == "next" and second.metadata["row"] == 5
        assert reasons([first]) == ([reason] if reason else [])
        assert not reason or ("t.jsonl line 3: " in first.detail and first.detail.isprintable())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "a"}', "expected a list"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "jsonl"),
        ("", "expected a list"),
        ('[{"prompt": "a"}', "comma or the list's end"),
        ('[{"prompt": "a"}] 1', "more behind"),
        ('[{"prompt": }]', "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "is empty"),
        (" \n[ ] ", "is empty"),
    ],
)
def test_json_that_is_no_list_is_one_clear_error(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match=expected):
        read(Manifest(str(tmp_path / "t.json"), "prompts"))


def test_a_bad_element_of_a_json_list_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('\ufeff [ {"prompt": "é"},\n 5 , {"prompt": "\\ud800"} ,{"prompt": "b"} ] \n')
    for records in (1, 3, 9):
        found = read(Manifest(str(tmp_path / "t.json"), "prompts"), records)
        assert [item.prompt for item in found if isinstance(item, PromptRecord)] == ["é", "b"]
        assert [item.key for item in found if isinstance(item, Rejected)] == ["line-2", "line-3"]


def test_parquet_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "t.parquet")
    first, second, third = read(Manifest(str(tmp_path / "t.parquet"), "prompts"))
    assert (first.prompt, third.prompt, second.reason) == ("a", "c", "damaged_rows")


def test_a_damaged_page_of_parquet_is_counted_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [{"prompt": f"prompt {i} " + random.Random(i).randbytes(90).hex()} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, write_page_checksum=True)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start + 2000] ^= 1
    path.write_bytes(data)
    found = read(Manifest(str(path), "prompts"), 100)
    assert len(found) == 300 and reasons(found) == ["damaged_rows"] * 100
    assert [item.prompt for item in found[200:]] == [row["prompt"] for row in rows[200:]]
    assert read(Manifest(str(path), "prompts")) == found and found[200].metadata["row"] == 201
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"t\.parquet is no whole Parquet file.*fetch it again"):
        read(Manifest(str(path), "prompts"))


def test_parquet_without_rows_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="is empty"):
        read(Manifest(str(tmp_path / "t.parquet"), "prompts"))


# Units

Cell = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(['"', ",", "\n", '\r\n"', '""', "a\rb"])


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(Cell, min_size=1, max_size=25),
    records=st.integers(1, 30),
    form=st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]),
)
def test_units_of_any_size_in_any_order_hold_every_row_once(
    cells: list[str], records: int, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("t") / f"t.{form}"
    source = Manifest(write(path, [{"prompt": cell, "number": str(i)} for i, cell in enumerate(cells)]), "prompts")
    whole = read(source, 10**9)
    assert [record.prompt for record in whole] == [cell.strip() for cell in cells]
    units = list(source.units(records))
    parts = {unit.name: list(source.read(unit)) for unit in random.Random(0).sample(units, len(units))}
    assert [item for unit in units for item in parts[unit.name]] == whole
    assert form == "parquet" or len(units) == -(-len(cells) // records)
    assert len({unit.content for unit in units}) == len({record.key for record in whole} and units)
    assert len({record.key for record in whole}) == len(cells)


Line = st.binary(max_size=20) | st.sampled_from([b'"', b'a,"b', b'"a\nb",c', b"a,b", b'{"text": "x"}', b"", b"\r"])


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(Line, max_size=25), records=st.integers(1, 30), form=st.sampled_from(["csv", "tsv", "jsonl", "txt"])
)
def test_lines_of_anything_are_records_or_rejections_whatever_the_units(
    lines: list[bytes], records: int, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("t") / f"t.{form}"
    data = b"\n".join(lines)
    text = data if form in ("csv", "tsv") else data.removeprefix(BOM)
    path.write_bytes((b"text,n\n" if form in ("csv", "tsv") else b"") + data)
    source = Manifest(str(path), "prompts")
    try:
        whole = read(source, 10**9)
    except InputError as error:
        assert "is empty" in str(error) and not text.strip(b"\n")
        return
    assert read(source, records) == whole
    count = sum(bool(line.strip()) for line in text.split(b"\n"))
    assert len(whole) == count if form in ("jsonl", "txt") else len(whole) <= count


def test_a_changed_row_makes_another_unit(tmp_path: Path) -> None:
    for form in ("jsonl", "csv", "json", "parquet"):
        rows = [{"prompt": f"{i}"} for i in range(6)]
        before = list(Manifest(write(tmp_path / f"t.{form}", rows), "prompts").units(2))
        rows[5] = {"prompt": "x"}
        after = list(Manifest(write(tmp_path / f"t.{form}", rows), "prompts").units(2))
        changed = [a.content != b.content for a, b in zip(before, after, strict=True)]
        assert changed[-1] and (form == "parquet" or changed == [False, False, True])


def test_scenes_are_the_same_in_units_of_any_size() -> None:
    source = Scenes(1, 5, 7, 3)
    whole = [item for unit in source.units(99) for item in source.read(unit)]
    parts = [list(source.read(unit)) for unit in list(source.units(2))[::-1]][::-1]
    assert [item for part in parts for item in part] == whole and len(whole) == 12
    assert len({record.key for record in whole}) == 12

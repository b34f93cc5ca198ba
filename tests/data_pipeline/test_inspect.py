"""The page of `inspect`: its numbers are the index's, its texts stay texts, and it works in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.charts import bin_edges, histogram, round_step
from data_pipeline.errors import InputError
from data_pipeline.index import load_index
from data_pipeline.inspect import evenly, inspect, read_index, spread, survey
from data_pipeline.records import (
    EditRecord,
    EncodedImage,
    PreferenceRecord,
    PromptRecord,
    ReasoningRecord,
    Record,
    TextImageRecord,
)
from data_pipeline.report import number, share, short
from data_pipeline.select import Selection, select
from data_pipeline.shards import write_shard
from data_pipeline.steps.columns import column

HOSTILE = "</script ></script><img src=http://evil.example/x onerror=alert(1)><!-- <script>alert(2)</script> ]]> \" ' &"
SCORES = [column("clip_text", pa.float32(), "openai/clip", "r1"), column("phash", pa.int64(), "phash", "1")]


def encoded(size: tuple[int, int] = (20, 12), shade: int = 90) -> EncodedImage:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 120, 30)).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue(), "png")


def captioned(key: str, caption: str = "a caption", size: tuple[int, int] = (20, 12), **facts: Any) -> TextImageRecord:
    return TextImageRecord(key, encoded(size), caption, **facts)


def one_of_each() -> list[Record]:
    """A record of every kind."""
    return [
        captioned("t-1", "a cat", origin="web", licence="CC0-1.0", split="train"),
        EditRecord("e-1", (encoded(), encoded((30, 30))), encoded(), "put a hat on it", metadata={"task": "add"}),
        PromptRecord("p-1", "a red circle"),
        PreferenceRecord("f-1", "two dogs", encoded(), encoded(shade=200)),
        ReasoningRecord("r-1", (encoded(),), (("user", "<image>How many?"), ("assistant", "Two."))),
    ]


def scored(count: int) -> list[tuple[Record, dict[str, Any]]]:
    """Captions s-0, s-1, ...; clip_text is i / 10, null for every fifth."""
    values = [None if i % 5 == 4 else i / 10 for i in range(count)]
    return [(captioned(f"s-{i}", f"number {i}"), {"clip_text": v, "phash": -(2**63) + i}) for i, v in enumerate(values)]


def nested(depth: int) -> dict[str, Any]:
    return {"deep": nested(depth - 1)} if depth else {}


class Elements(HTMLParser):
    """Tags with their attributes, and the shown records' keys, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.hidden = self.in_key = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "figure":
            self.hidden = "hidden" in dict(attributes)
        self.in_key = tag == "code" and "figure" in [name for name, _ in self.tags]

    def handle_data(self, data: str) -> None:
        if self.in_key and not self.hidden:
            self.shown.append(data)
        self.in_key = False


def page_of(folder: Path, limit: int = 48) -> str:
    inspect(folder, limit)
    return (folder / "inspect.html").read_text()


def test_counts_are_those_of_the_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(record, {}) for record in one_of_each()])
    write_shard(tmp_path / "b.tar", scored(12), SCORES)
    lines = dict(re.findall(r"^(.+?) +([\d,]+)$", inspect(tmp_path), re.MULTILINE))
    size = sum(member.size for record in load_index(tmp_path) for member in record.members.values())
    assert lines == {
        "text_image, unsplit": "12",
        "text_image, train": "1",
        **dict.fromkeys(("edit, unsplit", "prompt, unsplit", "preference, unsplit", "reasoning, unsplit"), "1"),
        "shards": "2",
        "bytes": f"{size:,}",
    }
    report = survey(tmp_path, 48)
    assert report.records == 17 and len(report.figures) == 17 and report.selected is report.rejected is None
    origins, licences = ({label: n for label, n, _ in found.counts} for found in report.categories[1:3])
    assert origins == {"not given": 16, "web": 1} and licences == {"not given": 16, "CC0-1.0": 1}


def test_every_kind_of_record_is_shown(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(record, {}) for record in one_of_each()])
    page = page_of(tmp_path)
    assert sorted(Elements(page).shown) == ["e-1", "f-1", "p-1", "r-1", "t-1"]
    figures = {key: text for text in page.split("<figure>")[1:] for key in re.findall(r"<code>(.*?)</code>", text)}
    assert re.findall(r'alt="(\w+)"|(&rarr;)', figures["e-1"]) == [
        ("source0", ""),
        ("source1", ""),
        ("", "&rarr;"),
        ("target", ""),
    ]
    assert re.findall(r'alt="(\w+)"', figures["f-1"]) == ["chosen", "rejected"]
    assert "<small>user</small>&lt;image&gt;How many?" in figures["r-1"] and "Two." in figures["r-1"]
    assert "<img" not in figures["p-1"] and "a red circle" in figures["p-1"]
    assert "CC0-1.0" in figures["t-1"] and "20 &times; 12" in figures["t-1"] and "&quot;task&quot;" in figures["e-1"]


def test_texts_stay_texts(tmp_path: Path) -> None:
    records: list[Record] = [
        captioned("a", HOSTILE, origin=HOSTILE, licence=HOSTILE, split=HOSTILE, metadata={HOSTILE: HOSTILE}),
        captioned("b", "plain", metadata={HOSTILE: "x", "nan": float("nan"), **nested(300)}),
        ReasoningRecord("c", (), ((HOSTILE, HOSTILE), ("user", HOSTILE))),
    ]
    columns = [column("judge_note", pa.string(), HOSTILE, "1"), column(HOSTILE, pa.float32(), "x", "1")]
    write_shard(tmp_path / "a.tar", [(record, {"judge_note": HOSTILE, HOSTILE: 0.5}) for record in records], columns)
    (tmp_path / "keep").mkdir()
    keep = pa.table({"sample_id": pa.array([], pa.int64())}).replace_schema_metadata(
        {"funnel": f'[["{HOSTILE[:9]}",3,0]]'}
    )
    pq.write_table(keep, tmp_path / "keep.parquet")
    found = Elements(page_of(tmp_path))
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert [script["type"] for script in scripts] == ["application/json", "module"]
    sources = [attributes["src"] or "" for _, attributes in found.tags if "src" in attributes]
    assert len(sources) == 2 and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on") or a in ("href", "action")]
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'; img-src data:;")


def numbers(kind: type) -> st.SearchStrategy[np.ndarray]:
    whole = st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 30)
    real = st.floats(-1e12, 1e12) | st.floats(0, 1) | st.sampled_from([np.nan, np.inf, 0.1, 0.3])
    return arrays(kind, st.integers(0, 300), elements=whole if kind is np.int64 else real)


@settings(deadline=None)
@given(st.data(), st.sampled_from([np.int64, np.float64]))
def test_a_histogram_counts_every_finite_value_once(data: st.DataObject, kind: type) -> None:
    values = data.draw(numbers(kind))
    kept = data.draw(arrays(bool, len(values)))
    found = histogram("x", "", values, kept, nulls=3)
    assert found.values == sum(found.counts) == int(np.isfinite(values).sum())
    assert found.values + found.strange == len(values) and found.nulls == 3
    assert sum(found.kept or []) == int(np.isfinite(values[kept]).sum())
    assert all(low < high for low, high in zip(found.edges, found.edges[1:], strict=False))
    assert len(found.counts) <= 60


def test_bins_are_round_and_outliers_stay_apart() -> None:
    assert bin_edges(np.array([3, 5, 4, 4])).tolist() == [2.5, 3.5, 4.5, 5.5]
    assert bin_edges(np.array([0.0, 2.0])).tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert bin_edges(np.array([0.5, 0.5])).tolist() == [0.25, 0.75]
    edges = bin_edges(np.append(np.linspace(0, 0.999, 1000), 1e6))
    assert edges[:3] == pytest.approx([0, 0.05, 0.1]) and edges[-2:].tolist() == [1.0, np.inf]
    assert [round_step(x) for x in (0.9, 1.0, 1.1, 3, 24, 0.03)] == [1, 1, 2, 5, 25, 0.05]


def test_numbers_read_well() -> None:
    assert [number(x) for x in (3.0, 1234567, 0.062237, 12345.6)] == ["3", "1,234,567", "0.06224", "12,346"]
    assert [short(x) for x in (0, 950, 1200, 34e6)] == ["0", "950", "1.2k", "34M"]
    assert [share(*x) for x in ((0, 9), (1, 9999), (9998, 9999), (9, 9))] == [
        "0 %",
        "&lt; 0.1 %",
        "&gt; 99.9 %",
        "100 %",
    ]


def test_scores_are_drawn_with_their_scorer_and_their_nulls(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(captioned("x"), {})])  # has no scores: null
    write_shard(tmp_path / "b.tar", scored(10), SCORES)
    other = [column("clip_text", pa.float32(), "openai/clip", "r2")]
    write_shard(tmp_path / "c.tar", [(captioned("y"), {"clip_text": float("nan")})], other)
    report = survey(tmp_path, 48)
    page = page_of(tmp_path)
    assert "openai/clip r1; openai/clip r2" in page and "8 values &middot; 3 null &middot; 1 not finite" in page
    assert "different values: 10" in page and 'data-column="phash"' not in page
    assert report.columns["clip_text"] == (0.0, pytest.approx(0.8)) and "phash" not in report.columns
    assert "<dt>phash</dt><dd>8000000000000003</dd>" in page


def test_pages_show_what_a_selection_kept_and_left_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", scored(40), SCORES)
    funnel = select(tmp_path, Selection(where=["clip_text >= 3.5"]))  # a null passes
    report = survey(tmp_path, 8)
    assert report.selected == funnel[0][2] == 12 and [(s.before, s.after) for s in report.rules] == [(40, 12)]
    assert sorted(figure.kept for figure in report.figures) == [False] * 4 + [True] * 4
    assert [row[2] for row in report.categories[0].counts] == [12]
    assert "selected                                   12" in inspect(tmp_path)
    (tmp_path / "keep.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="select again"):
        inspect(tmp_path)


@settings(deadline=None)
@given(st.lists(st.sampled_from("aab"), min_size=1, max_size=30), st.integers(0, 40))
def test_shown_records_are_spread_over_kinds(kinds: list[str], limit: int) -> None:
    table = pa.table({"kind": pa.chunked_array([pa.array(kinds).dictionary_encode()])})
    index = type("Index", (), {"table": table})
    chosen = spread(index, None, limit).tolist()  # type: ignore[arg-type]
    assert len(chosen) == len(set(chosen)) == min(limit, len(kinds))
    shown, there = (
        [[kinds[i] for i in range(len(kinds)) if i in own].count(k) for k in "ab"] for own in (chosen, range(99))
    )
    assert all(n >= min(total, limit // 2) for n, total in zip(shown, there, strict=True))


def test_evenly_is_spread_and_complete() -> None:
    assert evenly(3, 9).tolist() == [0, 3, 6] and evenly(4, 4).tolist() == [0, 1, 2, 3] and evenly(0, 5).size == 0


def test_the_page_is_the_same_every_time_and_as_small_as_asked(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", scored(9), SCORES)
    assert page_of(tmp_path, 4) == page_of(tmp_path, 4)
    assert page_of(tmp_path, 4).count("<figure>") == 4 and page_of(tmp_path, 0).count("<figure>") == 0
    with pytest.raises(InputError, match="limit is -1; expected 0"):
        inspect(tmp_path, -1)


def foreign_tar(path: Path) -> Path:
    """A tar as others write it: a caption in a text, one in a JSON, and a picture that breaks when it is decoded."""
    whole = encoded((40, 30)).data
    members = {
        "0001.PNG": whole,
        "0001.txt": b"a caption elsewhere",
        "0002.png": whole,
        "0002.json": json.dumps({"caption": HOSTILE, "task": "x"}).encode(),
        "0003.png": whole[:60],
        "0003.txt": b"cut short",
    }
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_tars_by_others_are_shown_where_they_lie(tmp_path: Path) -> None:
    assert main(["index", str(foreign_tar(tmp_path / "t.tar")), "--output", str(tmp_path / "indexes")]) == 0
    page = page_of(tmp_path / "indexes")
    assert Elements(page).shown == ["0001", "0002", "0003"]
    assert "a caption elsewhere" in page and "40 &times; 30" in page and "unreadable_image" in page
    assert len(read_index(sorted((tmp_path / "indexes").glob("*.index.parquet"))).width) == 3


def test_an_index_of_nothing_is_shown_and_no_index_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w"):
        pass
    assert main(["index", str(tmp_path / "t.tar"), "--output", str(tmp_path / "indexes")]) == 0
    page = page_of(tmp_path / "indexes")
    assert "0 of 0 records" in page and "<svg" not in page
    (index,) = (tmp_path / "indexes").glob("*.index.parquet")
    table = pq.read_table(index)
    pq.write_table(table.drop(["sample_id"]), index)
    with pytest.raises(InputError, match="is no index, it has no sample_id"):
        inspect(tmp_path / "indexes")


Browse = Callable[[Path, str], tuple[str, list[str], list[str]]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a page: its elements once its script ran, what the console says, and the URLs that it asked for."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"the page was not tried in a browser: none of {', '.join(names)} is in PATH (make browser)")

    def opened(page: Path, fragment: str) -> tuple[str, list[str], list[str]]:
        log = tmp_path / "net.json"
        headless = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        noting = ["--enable-logging=stderr", f"--log-net-log={log}", "--proxy-server=127.0.0.1:9"]  # nobody listens
        shown = ["--virtual-time-budget=2000", "--dump-dom", page.as_uri() + fragment]
        ran = subprocess.run([browser, *headless, *noting, *shown], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0 and "<html" in ran.stdout, ran.stderr
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        # What the browser asks for on its own account, such as the time, comes from no origin.
        asked = [e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"]
        return ran.stdout, re.findall(r"CONSOLE.*", ran.stderr), asked

    return opened


def test_a_browser_filters_and_sorts_without_errors_or_requests(tmp_path: Path, browse: Browse) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    records = [*scored(10), (captioned("hostile", HOSTILE), {"clip_text": 0.55, "phash": 0, HOSTILE: 1.5})]
    write_shard(folder / "a.tar", records, [*SCORES, column(HOSTILE, pa.float32(), HOSTILE, "1")])
    page = folder / "inspect.html"
    page_of(folder)

    def shown(fragment: str) -> list[str]:
        dom, console, requests = browse(page, fragment)
        assert console == [] and requests == []
        found = Elements(dom).shown
        assert re.search(r'<output id="count"[^>]*>(.*?)</output>', dom)[1] == f"{len(found)} of 11 shown"  # type: ignore[index]
        return found

    assert shown("#min=clip_text:0.3&max=clip_text:0.6&sort=clip_text:desc") == ["s-6", "hostile", "s-5", "s-3"]
    assert shown("#text=NUMBER 1&kind=text_image") == ["s-1"] and shown("#kind=edit") == []
    assert len(shown("#min=nothing:1&max=clip_text:x")) == 11  # what it does not know it ignores

    broken = tmp_path / "broken.html"  # what the test would see if the page did what it must not
    broken.write_text("<html><script>undefined.x</script><img src='http://evil.example/x'></html>")
    _, console, requests = browse(broken, "")
    assert "Uncaught TypeError" in console[0] and "http://evil.example/x" in requests

"""Selection on the index: thresholds, duplicates, lists and shares, without touching a shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.duplicates import first_of_near, near_any, near_pairs
from data_pipeline.errors import InputError
from data_pipeline.index import KEEP, LOCATION, SUFFIX, sample_id, with_scores
from data_pipeline.select import Selection, report, select
from data_pipeline.steps.columns import column
from data_pipeline.steps.fingerprints import Fingerprint

COLUMNS = [
    column("words", pa.int32(), "quality", "1"),
    column("rating", pa.float32(), "rater", "1"),
    *Fingerprint().columns(),
]


def rows(count: int, **changes: list) -> list[dict]:
    """Index rows of text-image records: the JSON member's of each."""
    listed = []
    for i in range(count):
        key, facts = f"k{i}", {name: values[i] for name, values in changes.items()}
        listed.append(
            {
                "key": key,
                "sample_id": sample_id(key),
                "kind": "text_image",
                "split": "",
                "origin": "here",
                "licence": "CC0-1.0",
                "text_length": 9,
                "text_sha256": hashlib.sha256(facts.pop("text", key).encode()).digest(),
                "pictures_sha256": hashlib.sha256(facts.pop("picture", key).encode()).digest(),
                "field": "json",
                "extension": "json",
                "offset": 0,
                "size": 1,
                "width": 0,
                "height": 0,
                "sha256": hashlib.sha256(facts.pop("member", key).encode()).digest(),
                "words": 5,
                "rating": None,
                "phash": None,
                "phash_others": [],
                **facts,
            }
        )
    return listed


@pytest.fixture
def folder(tmp_path: Path):
    """Makes a folder of one empty shard with these index rows."""

    def make(listed: list[dict]) -> Path:
        pq.write_table(pa.Table.from_pylist(listed, schema=with_scores(COLUMNS)), tmp_path / f"a{SUFFIX}")
        (tmp_path / "a.tar").touch()
        return tmp_path

    return make


def kept(path: Path, rules: Selection) -> list[int]:
    """Numbers of the records that a selection keeps."""
    select(path, rules)
    ids = set(pq.read_table(path / KEEP)["sample_id"].to_pylist())
    return [i for i in range(100) if sample_id(f"k{i}") in ids]


def test_thresholds_compare_columns_and_let_nulls_pass(folder) -> None:
    path = folder(rows(4, words=[1, 3, None, 9]))
    assert kept(path, Selection(where=["words >= 3"])) == [1, 2, 3]
    assert kept(path, Selection(where=["words >= 3", "words<9"])) == [1, 2]
    assert kept(path, Selection(where=["licence != CC0-1.0"])) == []
    assert kept(path, Selection()) == [0, 1, 2, 3]
    assert select(path, Selection(where=["words >= 3"])) == [("words >= 3 (1 have no value and pass)", 4, 3)]
    assert "4 ->            3  words >= 3" in report([("words >= 3", 4, 3)])


def test_of_equal_records_the_first_is_kept(folder) -> None:
    path = folder(rows(5, picture=["a", "b", "a", "a", "b"], text=["x", "x", "x", "y", "x"]))
    assert kept(path, Selection(duplicates="record")) == [0, 1, 3]
    assert kept(path, Selection(duplicates="picture")) == [0, 1]


def test_near_duplicates_are_within_the_bits_and_the_first_is_kept(folder) -> None:
    path = folder(rows(6, phash=[0b0, 0b111, 0b1111111, None, None, 0b0]))
    assert kept(path, Selection(near=3)) == [0, 2, 3, 4]
    assert kept(path, Selection(near=0)) == [0, 1, 2, 3, 4]
    assert kept(folder(rows(3, phash=[None, 0, 0])), Selection(near=0)) == [0, 1]


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_near_pairs_are_those_of_a_full_comparison(bits: int) -> None:
    rng = np.random.default_rng(bits)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, rng.integers(1, 12), replace=False)) for _ in range(240)]
    values = np.unique(np.concatenate([base, np.repeat(base, 4) ^ np.array(flips, np.uint64)]))
    rng.shuffle(values)
    apart = np.bitwise_count(values[:, None] ^ values[None, :])
    expected = {(i, j) for i, j in np.argwhere(apart <= bits).tolist() if i < j}
    assert expected and list(zip(*near_pairs(values, bits), strict=True)) == sorted(expected)


def test_a_chain_of_near_duplicates_keeps_what_is_far_from_all_that_is_kept() -> None:
    chain = pa.chunked_array([pa.array([0b0, 0b11, 0b1111, 0b111111], pa.int64())])
    assert first_of_near(chain, 2).tolist() == [True, False, True, False]


def test_lists_take_records_out_by_key_by_member_and_by_likeness(folder, tmp_path: Path) -> None:
    path = folder(rows(4, member=["a", "b", "c", "d"], phash=[0, -1, 12345, 7]))
    (tmp_path / "gone.txt").write_text(f"k0\n\n{hashlib.sha256(b'b').hexdigest()}\n")
    (tmp_path / "bench.txt").write_text(f"{hashlib.sha256(b'c').hexdigest()}\nffffffffffffffff\n")
    assert kept(path, Selection(takedown=[str(tmp_path / "gone.txt")])) == [2, 3]
    assert kept(path, Selection(decontaminate=[str(tmp_path / "bench.txt")])) == [0, 3]
    assert kept(path, Selection(decontaminate=[str(tmp_path / "bench.txt")], near=3)) == [0]


@pytest.mark.parametrize("form", ["{}", "{}  a.png", "{} *a.png", "sha256:{}", "\ufeff{}"])
def test_lists_are_read_as_tools_write_them(form: str, folder, tmp_path: Path) -> None:
    path = folder(rows(3, member=["a", "b", "c"]))
    (tmp_path / "list.txt").write_text(form.format(hashlib.sha256(b"a").hexdigest()))
    for rules in (Selection(takedown=[f"{tmp_path}/list.txt"]), Selection(decontaminate=[f"{tmp_path}/list.txt"])):
        assert kept(path, rules) == [1, 2]


def test_a_takedown_says_how_many_lines_it_found_even_of_records_that_a_rule_drops(folder, tmp_path: Path) -> None:
    path = folder(rows(3, words=[1, 9, None]))
    (tmp_path / "list.txt").write_text("\ufeffk0\nk0\nno_such_key\n")
    funnel = select(path, Selection(takedown=[f"{tmp_path}/list.txt"], where=["words > 5"]))
    assert funnel == [
        ("takedown (1 of 2 lines name a record or a member)", 3, 2),
        ("words > 5 (1 have no value and pass)", 2, 2),
    ]


def test_where_nothing_is_kept_the_report_says_which_rule_it_was(folder) -> None:
    found = report(select(folder(rows(3)), Selection(where=["words >= 1", "words >= 99"])))
    assert found.splitlines()[-1].startswith("nothing is kept: 'words >= 99' took the last")


def test_a_benchmark_s_picture_is_found_among_sources_too(folder, tmp_path: Path) -> None:
    path = folder(rows(4, phash=[0, None, 2**40, 2**50], phash_others=[[2**50, 2**60], [], [-1, 7], None]))
    (tmp_path / "bench.txt").write_text(f"{2**60:016x}\n{2**64 - 1:016x}\n")
    assert kept(path, Selection(decontaminate=[str(tmp_path / "bench.txt")])) == [1, 3]
    assert kept(path, Selection(decontaminate=[str(tmp_path / "bench.txt")], near=1)) == [1, 3]
    table = pq.read_table(path / f"a{SUFFIX}").drop(["phash_others"])
    pq.write_table(table, path / f"a{SUFFIX}")
    with pytest.raises(InputError, match="lacks one of phash and phash_others"):
        select(path, Selection(decontaminate=[str(tmp_path / "bench.txt")]))


def test_a_share_is_drawn_by_record_and_grows_with_itself(folder) -> None:
    path = folder(rows(100))
    half, most = (kept(path, Selection(share={"text_image": share})) for share in (0.5, 0.8))
    assert 35 <= len(half) <= 65 and set(half) < set(most)
    assert len(kept(path, Selection(share={"edit": 0.0}))) == 100


def test_a_share_may_be_of_an_origin_or_a_score_and_the_smallest_holds(folder) -> None:
    path = folder(rows(100, origin=["web"] * 50 + ["own"] * 50, words=[None if i % 2 else 5 for i in range(100)]))
    assert all(i >= 50 for i in kept(path, Selection(share={"origin == web": 0.0})))
    assert kept(path, Selection(share={"words >= 5": 0.0})) == list(range(1, 100, 2))  # a null is not drawn against
    both = kept(path, Selection(share={"text_image": 0.8, "origin == own": 0.0}))
    assert both == [i for i in kept(path, Selection(share={"text_image": 0.8})) if i < 50]
    with pytest.raises(InputError, match="has no column bogus"):
        select(path, Selection(share={"bogus == 3": 0.5}))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, of records 0 to 3 and 4 to 7; 4 shows what 1 shows, and the second has no column words."""
    listed = rows(8, picture=["a", "b", "c", "d", "b", "f", "g", "g"], words=[1, 9, 9, 9] + [None] * 4)
    listed = [{**row, "phash": 1 << 7 * i, "phash_others": []} for i, row in enumerate(listed)]
    for name, part, columns in (("one", listed[:4], COLUMNS), ("two", listed[4:], COLUMNS[1:])):
        (tmp_path / name).mkdir()
        table = pa.Table.from_pylist(part, schema=with_scores(columns))
        pq.write_table(table, tmp_path / name / f"a{SUFFIX}")
        (tmp_path / name / "a.tar").touch()
    return tmp_path / "one", tmp_path / "two"


def ids(folder: Path) -> list[int]:
    found = pq.read_table(folder / KEEP)["sample_id"].to_pylist()
    return [i for i in range(9) if sample_id(f"k{i}") in found]


def test_duplicates_are_found_across_folders_and_each_keeps_its_own(folders: tuple[Path, Path]) -> None:
    assert select(list(folders), Selection(duplicates="picture")) == [("duplicates: picture", 8, 6)]
    assert [ids(folder) for folder in folders] == [[0, 1, 2, 3], [5, 6]]
    funnels = [json.loads(pq.read_schema(folder / KEEP).metadata[b"funnel"]) for folder in folders]
    assert funnels == [[["duplicates: picture", 4, 4]], [["duplicates: picture", 4, 2]]]
    select(folders[::-1], Selection(duplicates="picture"))
    assert [ids(folder) for folder in folders] == [[0, 2, 3], [4, 5, 6]]
    with pytest.raises(InputError, match="named twice"):
        select([folders[0], folders[0]], Selection())


def test_a_folder_without_a_score_passes_whole_and_the_funnel_says_so(folders: tuple[Path, Path]) -> None:
    ((rule, before, after),) = select(list(folders), Selection(where=["words >= 3"], scorers={"words": "quality"}))
    assert rule == f"words >= 3 (4 have no value and pass; no such column in {folders[1]})" and (before, after) == (
        8,
        7,
    )
    with pytest.raises(InputError, match="has no column words"):
        select(folders[1], Selection(where=["words >= 3"]))


def test_a_takedown_reaches_every_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text(f"k5\n{hashlib.sha256(b'k2').hexdigest()}\n")
    select(list(folders), Selection(takedown=[str(tmp_path / "gone.txt")]))
    assert [ids(folder) for folder in folders] == [[0, 1, 3], [4, 6, 7]]


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_hashes_near_forbidden_ones_are_those_of_a_full_comparison(bits: int) -> None:
    rng = np.random.default_rng(bits)
    forbidden = rng.integers(0, 2**63, 40, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 12), replace=False)) for _ in range(400)]
    strangers = rng.integers(0, 2**63, 99, np.uint64)
    values = np.concatenate([np.repeat(forbidden, 10) ^ np.array(flips, np.uint64), strangers])
    column = pa.chunked_array([pa.array(values.view(np.int64)), pa.nulls(3, pa.int64())])
    expected = (np.bitwise_count(values[:, None] ^ forbidden[None, :]) <= bits).any(1).tolist() + [False] * 3
    assert near_any(column, forbidden, bits).tolist() == expected and sum(expected) > 20


def test_a_threshold_of_another_scorer_is_refused(folder) -> None:
    path = folder(rows(1))
    select(path, Selection(where=["words > 1"], scorers={"words": "quality"}))
    with pytest.raises(InputError, match="column words is from quality, the rules are for clip"):
        select(path, Selection(where=["words > 1"], scorers={"words": "clip"}))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"where": ["words"]}, "is no condition"),
        ({"where": ["words > three"]}, "which is int32, with 'three'"),
        ({"where": ["bogus > 3"]}, "has no column bogus; it has key"),
        ({"duplicates": "all"}, "expected record or picture"),
        ({"decontaminate": ["list.txt"]}, "list.txt line 2: 'hello' is no hash"),
        ({"share": {"edits": 0.5}}, "share names edits; expected one of text_image, edit"),
        ({"share": {"text_image": float("nan")}}, "shares from 0 to 1"),
        ({"where": ["rating <= nan"]}, "with no number"),
        ({"near": 65}, "0 to 8 bits"),
        ({"share": {"edit": 2.0}}, "shares from 0 to 1"),
        ({"takedown": ["nowhere.txt"]}, "cannot read the list nowhere.txt"),
    ],
)
def test_a_wrong_rule_is_one_clear_error(
    rules: dict, expected: str, folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(rows(2, rating=[0.5, None]))
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("0123456789abcdef\nhello\n")
    with pytest.raises(InputError, match=expected):
        select(path, Selection(**rules))
    assert not (path / KEEP).exists()


def test_pictures_that_were_not_read_cannot_be_compared(tmp_path: Path) -> None:
    schema = with_scores([]).with_metadata({LOCATION: "/elsewhere/a.tar"})
    pq.write_table(pa.Table.from_pylist(rows(2), schema=schema), tmp_path / "a.index.parquet")
    (tmp_path / "list.txt").write_text("ab" * 32)
    for rules in ({"duplicates": "picture"}, {"takedown": [str(tmp_path / "list.txt")]}):
        with pytest.raises(InputError, match="made from headers alone"):
            select(tmp_path, Selection(**rules))
    assert len(kept(tmp_path, Selection())) == 2

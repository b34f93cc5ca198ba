"""Scores added to shards that are there: the bytes of one build, tars untouched, runs that add up."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data_pipeline import foreign
from data_pipeline.__main__ import main
from data_pipeline.errors import InputError
from data_pipeline.executors.local import Local
from data_pipeline.index import SUFFIX, load_index
from data_pipeline.recipe import Recipe
from data_pipeline.score import score, unscored
from data_pipeline.select import Selection, select
from data_pipeline.sources import Scenes, WebDataset
from data_pipeline.steps import Decode
from data_pipeline.steps.fingerprints import Fingerprint
from data_pipeline.steps.quality import Change, Quality


def built(folder: Path, *steps: object) -> Path:
    Recipe(Scenes(1, 6, 6, 0), list(steps), records_per_shard=4).build(folder)
    return folder


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name[:6]: path.read_bytes() for path in sorted(folder.glob(pattern))}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.*") if path.name != ".lock"}


@pytest.mark.parametrize("workers", [1, 2])
def test_scores_added_later_are_those_of_one_build_byte_for_byte(workers: int, tmp_path: Path) -> None:
    whole = built(tmp_path / "whole", Decode(), Quality(), Change(), Fingerprint())
    parts = built(tmp_path / "parts", Decode(), Quality())
    tars = files(parts, "*.tar")
    for step in (Change(batch_size=3), Fingerprint()):  # in as many runs as one likes
        assert "12 records of 4 shards scored" in score(parts, [step], Local(workers))
    assert files(parts, f"*{SUFFIX}") == files(whole, f"*{SUFFIX}")
    assert files(parts, "*.tar") == tars == files(whole, "*.tar")


def test_scores_of_several_runs_are_selected_by_together(tmp_path: Path) -> None:
    folder = built(tmp_path / "out", Quality())
    score(folder, [Change()], Local())
    funnel = select(folder, Selection(where=["words >= 1", "changed >= 0.9"]))
    assert [rule for rule, _, _ in funnel] == ["words >= 1", "changed >= 0.9 (6 have no value and pass)"] and funnel[1][
        2
    ] < 12


def test_what_was_scored_before_is_kept_and_another_revision_replaces_it(tmp_path: Path) -> None:
    folder = built(tmp_path / "out", Quality(), Change())
    before = times(folder)
    assert "0 records of 0 shards scored; 4 had these columns before" in score(folder, [Quality(), Change()], Local())
    assert times(folder) == before
    score(folder, [Quality(), Change(threshold=90)], Local())
    for path in folder.glob(f"*{SUFFIX}"):
        schema = pq.read_schema(path)
        assert schema.names.count("changed") == 1 and b"threshold 90" in schema.field("changed").metadata[b"revision"]
    lost = sorted(folder.glob(f"*{SUFFIX}"))[1]
    pq.write_table(pq.read_table(lost).drop(["changed"]), lost)  # as of a run that was stopped before this shard
    before = times(folder)
    (folder / f".{lost.name}.123.tmp").touch()
    score(folder, [Change(threshold=90)], Local())
    assert not list(folder.glob(".*.tmp"))
    assert {name for name, time in times(folder).items() if time != before[name]} == {lost.name}


def test_a_build_from_scored_shards_begins_anew(tmp_path: Path) -> None:
    """Steps may change what was scored, so that no score outlives a rewriting."""
    folder = built(tmp_path / "out", Quality())
    Recipe(WebDataset(str(folder))).build(tmp_path / "again")
    assert "words" not in pq.read_schema(next((tmp_path / "again").glob(f"*{SUFFIX}"))).names


def test_tars_by_others_are_scored_where_they_lie_and_what_does_not_decode_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 50).save(buffer, "PNG")
    whole, cut = buffer.getvalue(), buffer.getvalue()[:400]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"0.png": whole, "0.txt": b"a", "1.png": cut, "1.json": b'{"caption": "b"}'}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    foreign.index([str(tmp_path / "a.tar")], tmp_path / "index")
    text = score(tmp_path / "index", [Quality(), Fingerprint()], Local())
    assert "1 records of 1 shards scored" in text and "1: unreadable_image" in text
    table = pq.read_table(next((tmp_path / "index").glob(f"*{SUFFIX}"))).to_pylist()
    assert [row["phash"] is None for row in table] == [False, False, True, True]
    assert [row["min_side"] for row in table] == [30, 30, None, None]
    assert [record.key for record in load_index(tmp_path / "index")] == ["0", "1"]


def test_a_picture_that_is_not_what_was_indexed_stops_it(tmp_path: Path) -> None:
    folder = built(tmp_path / "out")
    shard = next(iter(sorted(folder.glob("*.tar"))))
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="is not what was indexed"):
        score(folder, [Quality()], Local())


def test_the_command_takes_the_scoring_steps_of_any_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, recipe = built(tmp_path / "out"), tmp_path / "r.yaml"
    names = ("data_pipeline.steps.Decode", "data_pipeline.steps.quality.Quality")
    recipe.write_text(yaml.safe_dump({"steps": [{"class_path": name} for name in names]}))
    assert main(["score", str(folder), "-c", str(recipe), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "by Quality by Local" in out.splitlines()[0] and "12 records" in out
    assert main(["build", "-c", str(recipe), "--output", str(tmp_path / "x")]) == 2
    assert "data_pipeline score FOLDER -c" in capsys.readouterr().err
    recipe.write_text(json.dumps({"steps": [{"class_path": names[0]}]}))
    assert main(["score", str(folder), "-c", str(recipe)]) == 2
    assert "no step that scores" in capsys.readouterr().err


def test_a_judge_that_failed_on_records_is_told_with_its_commonest_reasons(tmp_path: Path) -> None:
    folder = built(tmp_path / "out")
    assert unscored(folder) == ""
    for path in folder.glob(f"*{SUFFIX}"):
        table = pq.read_table(path)
        pq.write_table(table.append_column("judge_note", pa.array(["HTTP 401"] * table.num_rows)), path)
    assert unscored(folder).splitlines() == [
        "12 of 12 records have no score, judge_note says why:",
        "  12 x HTTP 401",
    ]

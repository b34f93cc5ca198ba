"""The index that training reads: every record once, in its stream, of tars that are what was indexed."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from micro import micro_shards

from data_pipeline import serving
from data_pipeline.dataset import PlannedDataset
from data_pipeline.errors import InputError
from data_pipeline.foreign import index
from data_pipeline.index import MappedFile, load_index, read_member, read_prompt, sidecar
from data_pipeline.plan import Draw, PlannedBatch
from data_pipeline.recipe import Recipe
from data_pipeline.regroup import Rule
from data_pipeline.select import Selection, select
from data_pipeline.serving import ServingIndex, build
from data_pipeline.sources import Manifest
from data_pipeline.transforms import fit_size

RULE = Rule(64, 32, 0.02)


def served(tmp_path: Path, *folders: Path, rule: Rule = RULE) -> ServingIndex:
    return ServingIndex(build(tmp_path / "index", {"": [str(folder) for folder in folders]}, rule))


def everything(found: ServingIndex) -> list:
    return [
        (part, stream, found.record(part, stream, i))
        for part, streams in found.streams.items()
        for stream, count in streams.items()
        for i in range(count)
    ]


def pairs(folder: Path, sizes: list[tuple[int, int]], turns: int = 0) -> Path:
    """Edit records of several sizes and numbers of references, made by hand."""
    from PIL import Image

    folder.mkdir()
    rows = []
    for i, (width, height) in enumerate(sizes):
        for name in ("a", "b", "c"):
            Image.new("RGB", (width, height + 10 * (name == "b")), (i, 20, 30)).save(folder / f"{name}{i}.png")
        sources = [f"a{i}.png", f"b{i}.png"] if i % 2 else [f"a{i}.png"]
        rows.append({"input_images": sources, "output_image": f"c{i}.png", "instruction": f"edit {i}"})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "edits.jsonl"


def test_every_record_is_there_once_with_all_its_members(tmp_path: Path) -> None:
    folders = [micro_shards(tmp_path / "a", 50, 50), micro_shards(tmp_path / "b", 30, 0, level=2)]
    expected = {(r.shard, r.key): r for folder in folders for r in load_index(folder)}
    found = everything(served(tmp_path, *folders))
    assert len(found) == len(expected) == 130
    for part, (name, bucket), record in found:
        other = expected[record.shard, record.key]
        assert record.sample_id == other.sample_id and part == (other.split or part)
        assert name == ("edit" if other.kind == "edit" else "text_to_image")
        assert {n: m for n, m in record.members.items()} == other.members
        assert read_prompt(record, verify=True) == read_prompt(other)
        assert all(read_member(record, n, verify=True) == read_member(other, n) for n in record.members)
        assert len(bucket) == len(record.members) - 1


def test_buckets_are_the_released_rule_s(tmp_path: Path) -> None:
    sizes = [(100, 100), (100, 60), (64, 200), (333, 77), (90, 100), (31, 30)]
    manifest = pairs(tmp_path / "pairs", sizes)
    Recipe(Manifest(str(manifest), "omnigen2")).build(tmp_path / "out")
    found = everything(served(tmp_path, tmp_path / "out", rule=Rule(96, 16, 0.0)))
    assert len(found) == len(sizes)
    for _, (name, bucket), record in found:
        i = int(read_prompt(record).split()[1])
        width, height = sizes[i]
        target = fit_size(height, width, 96, 16)
        several = (target, target, fit_size(height + 10, width, 96, 16))
        assert (name, bucket) == (("multi_reference", several) if i % 2 else ("edit", (target, target)))
        assert list(record.members) == ["target", *(f"source{j}" for j in range(len(bucket) - 1)), "json"]


def test_a_selection_is_honoured_and_a_new_one_too(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 40, 0)
    assert len(everything(served(tmp_path, folder))) == 40
    select(folder, Selection(share={"text_image": 0.5}))
    kept = {record.key for record in load_index(folder)}
    assert {record.key for *_, record in everything(served(tmp_path, folder))} == kept and 0 < len(kept) < 40


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    edits = [str(micro_shards(tmp_path / name, 0, 9)) for name in ("a", "b")]
    with pytest.raises(InputError, match=r"two sets of .* are called edit"):
        ServingIndex(build(tmp_path / "index", {"edit": edits[:1], "": edits[1:]}, RULE))


@pytest.mark.parametrize("name", ["index.json", "rows.npy", "shards.npy"])
@pytest.mark.parametrize("left", [None, 0, 0.5])
def test_a_sorted_index_that_was_damaged_is_made_again(name: str, left: float | None, tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 9, 0)
    before = everything(served(tmp_path, folder))
    (path,) = (tmp_path / "index").glob(f"*/{name}")
    data = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(data[: int(left * len(data))])
    assert everything(served(tmp_path, folder)) == before


def test_nothing_is_sorted_twice(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 60, 60)
    served(tmp_path, folder)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.*") if path.name != ".lock"}
    served(tmp_path, folder)
    assert len(before) == 3
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.*") if path.name != ".lock"
    }


def test_indexes_that_were_not_used_for_long_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "KEPT", 2)
    folder = micro_shards(tmp_path / "a", 10, 0)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "notes").write_text("not ours")
    (tmp_path / "index" / f"{'a' * 20}.npy").write_bytes(b"of an earlier version")
    first, second = served(tmp_path, folder), served(tmp_path, folder, rule=Rule(32, 32, 0.02))
    served(tmp_path, folder)
    served(tmp_path, folder, rule=Rule(32, 32, 0.5))
    assert first.folder.is_dir() and not second.folder.exists()
    assert len(list((tmp_path / "index").iterdir())) == 4  # two, the lock and what is not ours
    assert len(everything(second)) == 10  # who has mapped one keeps it
    assert len(pickle.dumps(first)) < 1000


def test_many_shards_are_one_map(tmp_path: Path) -> None:
    """A record of a shard that was never read before costs no file of its own."""
    folder = tmp_path / "many"
    micro_shards(folder, 40, 0)
    (tar,) = folder.glob("*.tar")
    for i in range(300):
        os.link(tar, folder / f"copy-{i:05d}.tar")
        shutil.copy(sidecar(tar), sidecar(folder / f"copy-{i:05d}.tar"))
    for name in ("recipe.json", "manifest.json"):
        (folder / name).unlink()
    found = served(tmp_path, folder)
    ((stream, count),) = found.streams["train"].items()
    before = len(os.listdir("/proc/self/fd"))
    assert len({found.record("train", stream, i).shard for i in range(count)}) == 301
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_content_is_the_same_wherever_the_shards_lie(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 30, 30)
    shutil.copytree(folder, tmp_path / "elsewhere")
    contents = [served(tmp_path, path).content for path in (folder, tmp_path / "elsewhere")]
    assert contents[0] == contents[1] != served(tmp_path, folder, rule=Rule(32, 32, 0.02)).content


def test_a_tar_that_is_not_what_was_indexed_is_named_before_training(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 30, 0)
    tar = next(folder.glob("*.tar"))
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(InputError, match=r"has \d+ bytes, its index is of a tar of \d+: it was replaced or cut"):
        served(tmp_path, folder)


def test_a_tar_replaced_under_a_running_job_is_named_at_the_sample(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 30, 0)
    found = served(tmp_path, folder)
    ((stream, _),) = found.streams["train"].items()
    record = found.record("train", stream, 0)
    read_member(record, "image", verify=True)
    data = bytearray(record.shard.read_bytes())
    member = record.members["image"]
    data[member.offset + member.size // 2] ^= 1
    record.shard.write_bytes(data)
    with pytest.raises(InputError, match="was replaced or changed after this run had begun"):
        read_member(record, "image")


def test_a_flipped_bit_is_found_in_the_first_epoch_and_always_if_asked(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 30, 0)
    ((stream, _),) = served(tmp_path, folder).streams["train"].items()
    record = served(tmp_path, folder).record("train", stream, 0)
    member = record.members["json"]
    data = bytearray(record.shard.read_bytes())
    at = data.index(b"origin", member.offset)
    data[at] ^= 1
    record.shard.write_bytes(data)
    found = served(tmp_path, folder)  # sees another time of change, and the same size
    for verify, epoch, wrong in (
        ("first_epoch", 0, True),
        ("first_epoch", 1, False),
        ("always", 1, True),
        ("never", 0, False),
    ):
        dataset = PlannedDataset([found], "train", verify=verify)
        planned = PlannedBatch((Draw(stream, 0, epoch),))
        if wrong:
            with pytest.raises(InputError, match="is not what was indexed"):
                dataset[planned]
        else:
            assert len(dataset[planned]) == 1


def test_tars_by_others_are_served_where_they_lie(tmp_path: Path) -> None:
    folder = micro_shards(tmp_path / "a", 30, 30)
    index([str(folder)], tmp_path / "foreign")
    found = everything(served(tmp_path, tmp_path / "foreign"))
    assert len(found) == 60
    assert {read_prompt(r) for *_, r in found} == {read_prompt(r) for r in load_index(folder)}
    assert all(
        record.members[name].sha256.startswith("at-")
        for *_, record in found
        for name in record.members
        if name != "json"
    )


def test_two_threads_may_map_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"whole")
    inside, go_on = threading.Event(), threading.Event()
    plain = mmap.mmap

    def slow(*args, **options) -> mmap.mmap:
        inside.set()
        assert go_on.wait(10)
        return plain(*args, **options)

    monkeypatch.setattr(mmap, "mmap", slow)
    file = MappedFile(str(tmp_path / "a.tar"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(file.current)
        assert inside.wait(10)
        second = pool.submit(file.current)
        with pytest.raises(TimeoutError):
            second.result(0.1)  # it waits or maps the file too, and never takes what is not there yet
        go_on.set()
        assert bytes(first.result()[1]) == bytes(second.result()[1]) == b"whole"


def test_a_tar_by_others_that_changed_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    """Of the same size, with regrouped indexes and without; to index it again helps."""
    folder = micro_shards(tmp_path / "a", 30, 30)
    tars = sorted(folder.glob("*.tar"))
    index([str(folder)], tmp_path / "foreign")
    served(tmp_path, tmp_path / "foreign")
    os.utime(tars[0], ns=(1, 1))
    for root in (tmp_path, tmp_path / "fresh"):
        with pytest.raises(InputError, match=r"was changed after it was indexed, .*; index it again"):
            served(root, tmp_path / "foreign")
    index([str(folder)], tmp_path / "foreign")
    assert len(everything(served(tmp_path, tmp_path / "foreign"))) == 60


def test_a_selection_of_other_indexes_is_refused(tmp_path: Path) -> None:
    """Indexed, selected, and more indexed into the same folder: the later records would never be trained on."""
    first, second = micro_shards(tmp_path / "a", 20, 0), micro_shards(tmp_path / "b", 20, 0, level=2)
    folder = tmp_path / "foreign"
    index([str(first)], folder)
    select(folder, Selection(share={"text_image": 0.5}))
    half = len(everything(served(tmp_path, folder)))
    index([str(second)], folder)
    for read in (load_index, lambda path: served(tmp_path, path)):
        with pytest.raises(InputError, match=r"keep\.parquet was decided on other indexes .*; select again"):
            read(folder)
    select(folder, Selection(share={"text_image": 0.5}))
    assert half < len(everything(served(tmp_path, folder))) < 40

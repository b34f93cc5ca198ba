"""Tars by others, indexed where they lie and read by offset: on disk, and through a real HTTP server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import Server
from torch.utils.data import DataLoader

from data_pipeline import remote
from data_pipeline.errors import InputError
from data_pipeline.foreign import expanded, index
from data_pipeline.index import KEEP, SUFFIX, IndexedRecord, Member, load_index, read_member, read_prompt
from data_pipeline.records import EditRecord, EncodedImage, PromptRecord, ReasoningRecord, TextImageRecord
from data_pipeline.select import Selection, select
from data_pipeline.shards import write_shard


def encoded(size: tuple[int, int] = (40, 24), form: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def img2dataset(count: int, size: tuple[int, int] = (40, 24), quality: int = 75) -> dict[str, bytes]:
    """Members as img2dataset names them."""
    members = {}
    for i in range(count):
        facts = {"caption": f"picture number {i}", "url": f"http://x/{i}", "key": f"{i:09}", "status": "success"}
        members[f"{i:09}.jpg"] = encoded(size, seed=i, quality=quality)
        members[f"{i:09}.json"] = json.dumps(facts).encode()
        members[f"{i:09}.txt"] = f"picture number {i}".encode()
    return members


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def put(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(tar_of(members))
    return folder / name


def ledger(folder: Path) -> list[dict[str, str]]:
    """All entries of all ledgers."""
    return [entry for path in sorted(folder.glob("*.ledger.json")) for entry in json.loads(path.read_text())["ledger"]]


def test_headers_of_a_remote_tar_cost_less_than_a_twentieth_of_it_and_its_bytes_come_by_offset(
    server: Server, tmp_path: Path
) -> None:
    members = img2dataset(70, (640, 480), quality=92)
    size = put(server.folder, "00000.tar", members).stat().st_size
    assert size > 20_000_000
    text = index([server.url("00000.tar")], tmp_path / "out")
    assert server.served < size / 20 and "70 text_image records" in text and "rejected" not in text
    records = load_index(tmp_path / "out")
    assert [record.key for record in records] == [f"{i:09}" for i in range(70)]
    assert {record.shard for record in records} == {server.url("00000.tar")}
    server.served = 0
    for record in (records[41], records[7]):
        assert read_member(record, "image") == members[f"{record.key}.jpg"]
        assert read_prompt(record) == members[f"{record.key}.txt"].decode()
        assert (record.members["image"].width, record.members["image"].height) == (640, 480)
    assert server.served == sum(member.size for i in (41, 7) for member in records[i].members.values())


def test_stock_reading_finds_the_keys_and_bytes_that_the_index_states(tmp_path: Path) -> None:
    tars = [put(tmp_path / "in", f"{i:05}.tar", img2dataset(5 + i)) for i in range(3)]
    index([f"{tmp_path}/in/{{00000..00002}}.tar"], tmp_path / "out")
    stock = wds.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)
    expected = [(Path(s["__url__"]).name, s["__key__"], s["jpg"], s["txt"].decode()) for s in stock]
    records = load_index(tmp_path / "out")
    found = [(Path(r.shard).name, r.key, read_member(r, "image"), read_prompt(r)) for r in records]
    assert found == expected and len(found) == 18
    assert len({record.sample_id for record in records}) == 18  # keys repeat across tars, ids do not


def test_edits_by_others_are_indexed_by_their_members(tmp_path: Path) -> None:
    pictures = {name: encoded((30 + i, 20)) for i, name in enumerate(("src.jpg", "ref.jpg", "tgt.jpg"))}
    texts = {"a.txt": b" make it blue\n", "b.instruction.txt": b"remove it", "c.json": b'{"instruction": "add it"}'}
    members = {f"{key}.{name}": data for key in "abc" for name, data in pictures.items()}
    put(tmp_path / "in", "t.tar", dict(sorted({**members, **texts}.items())))
    roles = {"sources": ["src.jpg", "ref.jpg"], "target": "tgt.jpg", "text": ["txt", "instruction.txt", "instruction"]}
    index([str(tmp_path / "in")], tmp_path / "out", "edit", roles)
    records = load_index(tmp_path / "out")
    assert [(record.key, record.kind) for record in records] == [(key, "edit") for key in "abc"]
    assert [read_prompt(record) for record in records] == ["make it blue", "remove it", "add it"]
    for record in records:
        read = [read_member(record, name) for name in ("source0", "source1", "target")]
        assert read == list(pictures.values())
        assert [record.members[name].width for name in ("source0", "source1", "target")] == [30, 31, 32]
    assert "1 of them indexed before" in index([str(tmp_path / "in")], tmp_path / "out", "edit", roles)
    assert "0 of them indexed before" in index([str(tmp_path / "in")], tmp_path / "out")  # another layout
    assert load_index(tmp_path / "out") == []


def test_a_text_that_readers_would_not_find_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "in", "t.tar", {"a.jpg": encoded(), "a.json": b'{"alt": "a cat", "license": "CC0-1.0"}'})
    index([str(tmp_path / "in")], tmp_path / "out", columns={"text": "alt"})
    assert load_index(tmp_path / "out") == [] and "build shards" in ledger(tmp_path / "out")[0]["detail"]
    put(tmp_path / "in", "t.tar", {"a.jpg": encoded(), "a.json": b'{"text": "a cat", "license": "CC0-1.0"}'})
    index([str(tmp_path / "in")], tmp_path / "out")
    (path,) = (tmp_path / "out").glob(f"*{SUFFIX}")
    assert set(pq.read_table(path)["licence"].to_pylist()) == {"CC0-1.0"}


def test_what_is_unread_is_null_and_never_stands_for_another_picture(tmp_path: Path) -> None:
    tars = [put(tmp_path / "in", name, img2dataset(2)) for name in ("a.tar", "b.tar")]
    index([str(tmp_path / "in")], tmp_path / "out")
    for path in (tmp_path / "out").glob(f"*{SUFFIX}"):
        table = pq.read_table(path)
        pictures, texts = (
            table.filter([field == name for field in table["field"].to_pylist()]) for name in ("image", "txt")
        )
        assert pictures["sha256"].to_pylist() == [None, None] and pictures["pictures_sha256"].to_pylist() == [
            None,
            None,
        ]
        digests = [hashlib.sha256(f"picture number {i}".encode()).digest() for i in range(2)]
        assert texts["sha256"].to_pylist() == texts["text_sha256"].to_pylist() == digests
        assert Path(table.schema.metadata[b"location"].decode()) in tars
    members = [record.members["image"] for record in load_index(tmp_path / "out")]
    assert len({member.sha256 for member in members}) == 4 and not any(member.hashed for member in members)
    assert load_index(tmp_path / "out")[0].members["txt"].hashed


def test_thresholds_select_on_such_an_index(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.tar", img2dataset(4))
    put(tmp_path / "in", "b.tar", {"x.png": encoded((90, 30), "PNG"), "x.json": b'{"caption": "one two three four"}'})
    index([str(tmp_path / "in")], tmp_path / "out")
    rules = Selection(where=["words >= 4", "aspect > 2", "min_side == 30"], scorers={"words": "quality"})
    assert select(tmp_path / "out", rules) == [("words >= 4", 5, 1), ("aspect > 2", 1, 1), ("min_side == 30", 1, 1)]
    assert [record.key for record in load_index(tmp_path / "out")] == ["x"]
    with pytest.raises(InputError, match="made from headers alone"):
        select(tmp_path / "out", Selection(duplicates="record"))
    assert (tmp_path / "out" / KEEP).is_file()


def test_our_own_tars_keep_their_kinds_fields_and_facts(tmp_path: Path) -> None:
    a, b, c = (EncodedImage(encoded((30 + i, 20), "PNG"), "png") for i in range(3))
    turns = (("user", "<image>How many?"), ("assistant", "Two."))
    records = [
        TextImageRecord("t", a, "a caption", "zip", "CC0-1.0", "val"),
        EditRecord("e", (a, b), c, "mix"),
        PromptRecord("p", "a prompt"),
        ReasoningRecord("r", (a, b), turns),
    ]
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "s.tar", [(record, {}) for record in records])
    built = load_index(tmp_path / "in")
    index([str(tmp_path / "in" / "s.tar")], tmp_path / "out")
    found = load_index(tmp_path / "out")
    assert not ledger(tmp_path / "out")
    for ours, theirs in zip(built, found, strict=True):
        assert (ours.key, ours.kind, ours.split, list(ours.members)) == (
            theirs.key,
            theirs.kind,
            theirs.split,
            list(theirs.members),
        )
        for name, member in ours.members.items():
            other = theirs.members[name]
            assert [getattr(member, n) for n in ("offset", "size", "width", "height", "extension")] == [
                getattr(other, n) for n in ("offset", "size", "width", "height", "extension")
            ]
    assert [read_prompt(record) for record in found[:3]] == ["a caption", "mix", "a prompt"]
    (row, *_) = pq.read_table(next((tmp_path / "out").glob(f"*{SUFFIX}"))).to_pylist()
    assert (row["origin"], row["licence"]) == ("zip", "CC0-1.0")


def test_a_tar_that_has_not_changed_is_not_read_again(server: Server, tmp_path: Path) -> None:
    put(server.folder, "a.tar", img2dataset(3))
    local = put(tmp_path / "in", "b.tar", img2dataset(3))
    run = partial(index, [server.url("a.tar"), str(local)], tmp_path / "out")
    run()
    before, server.served = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}, 0
    assert "2 tars, 2 of them indexed before" in run() and server.served <= 1  # the byte that shows ranges work
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    server.tag = '"2"'
    assert "1 of them indexed before" in run() and server.served > 1000
    put(tmp_path / "in", "b.tar", img2dataset(4))
    assert "1 of them indexed before" in run() and len(load_index(tmp_path / "out")) == 7
    for path in (tmp_path / "out").glob("*.ledger.json"):
        path.write_text("{")  # as a crash of another program might leave it
    assert "0 of them indexed before" in run()


def test_a_transient_failure_is_tried_again_and_a_lasting_one_named(server: Server, tmp_path: Path) -> None:
    members = img2dataset(3)
    put(server.folder, "a.tar", members)
    server.failures = 3
    index([server.url("a.tar")], tmp_path / "out")
    record = load_index(tmp_path / "out")[1]
    server.failures = remote.ATTEMPTS - 1
    assert read_member(record, "image") == members["000000001.jpg"]
    server.failures = remote.ATTEMPTS
    with pytest.raises(InputError, match=r"a\.tar .*503"):
        read_member(record, "image")
    cut = (server.folder / "a.tar").read_bytes()[: record.members["image"].offset + 9]
    (server.folder / "a.tar").write_bytes(cut)
    with pytest.raises(
        InputError, match=r"a\.tar .*only 9 of the \d+ bytes at \d+; if the file was replaced, index it"
    ):
        read_member(record, "image")
    (server.folder / "a.tar").unlink()
    server.requests = 0
    for call in (partial(read_member, record, "image"), partial(index, [server.url("a.tar")], tmp_path / "again")):
        with pytest.raises(InputError, match=r"cannot read http://127.*a\.tar .*FileNotFoundError"):
            call()
    assert server.requests == 3  # a read, and fsspec's two ways to ask for a size: none is tried again


def test_a_server_that_ignores_ranges_is_named_and_no_tar_fetched(server: Server, tmp_path: Path) -> None:
    put(server.folder, "a.tar", {f"{i}.jpg": os.urandom(1 << 20) for i in range(20)})
    server.ranges = False
    with pytest.raises(InputError, match=r"server of http://127.*a\.tar ignores byte ranges"):
        index([server.url("a.tar")], tmp_path / "out")
    assert server.hung_up.wait(20) and server.requests == 2 and not list((tmp_path / "out").iterdir())
    server.ranges = True
    put(server.folder, "b.tar", img2dataset(3))
    index([server.url("b.tar")], tmp_path / "out")
    server.ranges = False
    with pytest.raises(InputError, match="ignores byte ranges"):
        read_member(load_index(tmp_path / "out")[0], "image")


def test_forked_workers_read_urls_that_their_parent_has_read(server: Server, tmp_path: Path) -> None:
    put(server.folder, "a.tar", img2dataset(6))
    index([server.url("a.tar")], tmp_path / "out")
    records = load_index(tmp_path / "out")
    here = [read_prompt(record) for record in records]
    loader = DataLoader(records, batch_size=None, num_workers=2, collate_fn=read_prompt, multiprocessing_context="fork")
    assert list(loader) == here == [f"picture number {i}" for i in range(6)]


def test_more_tars_than_descriptors_are_read_without_leaving_them_open(tmp_path: Path) -> None:
    records = []
    for i in range(300):
        (tmp_path / f"{i}.tar").write_bytes(b"%3d" % i)
        record = IndexedRecord(tmp_path / f"{i}.tar", "k", "text_image", "", i, {"txt": Member(0, 3, 0, 0, "txt", "")})
        records.append(record)
    held = []
    for _ in range(2):
        assert [int(read_prompt(record)) for record in records] == list(range(300))
        held.append(len(os.listdir("/proc/self/fd")))
    assert held[0] == held[1]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1))
def test_of_a_truncated_tar_every_sample_is_in_the_index_or_the_ledger(share: float) -> None:
    whole = tar_of(TRUNCATED)
    data = whole[: int(share * len(whole))]
    kept, named = read_all(data)
    for i in range(6):
        key = f"{i:09}"
        begins = whole.index(f"{key}.jpg".encode())
        assert key in kept or key in named or begins + 512 > len(data), key
    for key, prompt in kept.items():
        assert prompt == TRUNCATED[f"{key}.txt"].decode()
    assert len(kept) == 6 or named


TRUNCATED = img2dataset(6)


def read_all(data: bytes) -> tuple[dict[str, str], str]:
    """Prompts by key and the whole ledger as text, of a tar's bytes."""
    with TemporaryDirectory() as folder:
        tar = Path(folder) / "t.tar"
        tar.write_bytes(data)
        index([str(tar)], Path(folder) / "out")
        kept = {record.key: read_prompt(record) for record in load_index(Path(folder) / "out")}
        return kept, " ".join(f"{e['reason']} {e['detail']}" for e in ledger(Path(folder) / "out"))


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")  # Pillow warns of it
    return buffer.getvalue()


JPG = encoded()
BAD_SAMPLES = {
    "no text": ({"k.jpg": JPG}, "bad_sample"),
    "no picture": ({"k.txt": b"words"}, "bad_sample"),
    "two pictures": ({"k.jpg": JPG, "k.png": JPG, "k.txt": b"words"}, "bad_sample"),
    "no caption in its JSON": ({"k.jpg": JPG, "k.json": b'{"url": "x"}'}, "bad_sample"),
    "a caption that is no text": ({"k.jpg": JPG, "k.json": b'{"caption": 5}'}, "bad_sample"),
    "half a surrogate pair": ({"k.jpg": JPG, "k.json": b'{"caption": "\\ud800"}'}, "bad_sample"),
    "JSON that is a list": ({"k.jpg": JPG, "k.txt": b"words", "k.json": b"[1]"}, "bad_sample"),
    "JSON that is none": ({"k.jpg": JPG, "k.txt": b"words", "k.json": b"{"}, "bad_sample"),
    "JSON too deep": ({"k.jpg": JPG, "k.txt": b"words", "k.json": b"[" * 100_000}, "bad_sample"),
    "text that is not UTF-8": ({"k.jpg": JPG, "k.txt": b"\xff\xfe"}, "bad_sample"),
    "an empty text": ({"k.jpg": JPG, "k.txt": b" \n"}, "empty_text"),
    "a long text": ({"k.jpg": JPG, "k.txt": b"a" * 10_001}, "text_too_long"),
    "a text beyond all measure": ({"k.jpg": JPG, "k.txt": b"a" * (1 + (1 << 20))}, "text_too_long"),
    "HTML for a picture": ({"k.jpg": b"<html>404</html>", "k.txt": b"words"}, "unreadable_image"),
    "an empty picture": ({"k.jpg": b"", "k.txt": b"words"}, "unreadable_image"),
    "a format not allowed": ({"k.jpg": encoded(form="TIFF"), "k.txt": b"words"}, "unreadable_image"),
    "a bomb": ({"k.png": bomb(), "k.txt": b"words"}, "too_many_pixels"),
    "a tiny picture": ({"k.jpg": encoded((7, 20)), "k.txt": b"words"}, "too_small"),
    "an unknown kind": ({"k.image.jpg": JPG, "k.json": b'{"kind": "song", "metadata": {}}'}, "bad_sample"),
    "an edit without target": (
        {"k.source0.jpg": JPG, "k.json": b'{"kind": "edit", "metadata": {}, "instruction": "x"}'},
        "bad_sample",
    ),
    "a picture too many": (
        {"k.image.jpg": JPG, "k.more.jpg": JPG, "k.json": b'{"kind": "text_image", "metadata": {}, "caption": "x"}'},
        "bad_sample",
    ),
    "facts of a wrong type": (
        {"k.image.jpg": JPG, "k.json": b'{"kind": "text_image", "metadata": {}, "caption": "x", "split": 3}'},
        "bad_sample",
    ),
    "a name that leads out": ({"../k.jpg": JPG, "../k.txt": b"words"}, "unsafe_name"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_sample_that_is_no_record_is_named_and_its_neighbours_are_kept(name: str, tmp_path: Path) -> None:
    members, reason = BAD_SAMPLES[name]
    good = {"z.JPEG": encoded((31, 17)), "z.json": b'{"caption": " good ", "license": "CC0"}'}
    tar = put(tmp_path, "t.tar", {**members, **good})
    assert f"rejected 1: {reason}" in index([str(tar)], tmp_path / "out") or reason == "unsafe_name"
    assert [record.key for record in load_index(tmp_path / "out")] == ["z"]
    assert {entry["reason"] for entry in ledger(tmp_path / "out")} == {reason}
    assert all(entry["key"] == "k" for entry in ledger(tmp_path / "out")) or reason == "unsafe_name"


def test_ranges_of_names_are_numbered_with_their_zeros(tmp_path: Path) -> None:
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b{1..2}.tar"):
        put(tmp_path, name, img2dataset(1))
    assert [Path(p).name for p in expanded([f"{tmp_path}/a-{{008..010}}.tar"])] == [
        "a-008.tar",
        "a-009.tar",
        "a-010.tar",
    ]
    assert expanded([f"{tmp_path}/b{{1..2}}.tar"]) == [f"{tmp_path}/b{{1..2}}.tar"]  # a file may be called so
    assert expanded(["https://h/{0..1}/{08..09}.tar"]) == [f"https://h/{i}/0{j}.tar" for i in (0, 1) for j in (8, 9)]
    assert len(expanded([str(tmp_path), str(tmp_path / "a-008.tar")])) == 4


@pytest.mark.parametrize(
    ("tars", "expected"),
    [
        ([], "no tar was given"),
        (["nowhere.tar"], "there is no tar or folder at 'nowhere.tar'"),
        (["{0..2}.tar"], "there is no tar or folder at '0.tar'"),
        (["{2..0}.tar"], "range {2..0} is empty or too long"),
        (["{0..99999999999}.tar"], "empty or too long"),
        (["{0..9999}{0..9999}.tar"], "empty or too long"),
        (["/dev/null"], "there is no tar or folder"),
        (["EMPTY"], "holds no *.tar"),
        (["file:///etc/passwd"], "expected a path or a URL of http"),
        (["pipe://cat"], "expected a path or a URL of http"),
        (["zip://a::http://h/a.zip"], "expected a path or a URL of http"),
        (["http://h/a::file:///etc/passwd"], "expected a path or a URL of http"),
        (["gs://bucket/a.tar"], "install"),
        (["\udcff.tar"], "there is no tar or folder"),
    ],
)
def test_a_wrong_tar_is_one_clear_line(tars: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as raised:
        index([str(tmp_path / "empty") if tar == "EMPTY" else tar for tar in tars], tmp_path / "out")
    assert expected in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_for_indexes_is_refused(tmp_path: Path) -> None:
    tar = put(tmp_path / "in", "a.tar", img2dataset(1))
    (tmp_path / "file").touch()
    for output in (tmp_path / "in", tmp_path / "file"):
        with pytest.raises(InputError, match="choose a new folder"):
            index([str(tar)], output)


def test_no_tar_at_all_gives_an_empty_index_and_a_ledger(tmp_path: Path) -> None:
    for name, data in {"html.tar": b"<html>404</html>" * 99, "empty.tar": b""}.items():
        (tmp_path / name).write_bytes(data)
    assert "no record" in index([str(tmp_path)], tmp_path / "out") and load_index(tmp_path / "out") == []
    assert {entry["reason"] for entry in ledger(tmp_path / "out")} == {"bad_header", "no_end"}


def test_an_index_whose_tar_is_gone_or_whose_text_changed_says_so(tmp_path: Path) -> None:
    tar = put(tmp_path / "in", "a.tar", {"k.jpg": JPG, "k.json": b'{"caption": "x"}'})
    index([str(tar)], tmp_path / "out")
    (record,) = load_index(tmp_path / "out")
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(InputError, match=r"a\.tar: the text of k has changed"):
        read_prompt(record)
    tar.rename(tmp_path / "in" / "b.tar")
    gone = IndexedRecord(
        tmp_path / "in" / "c.tar", *(getattr(record, n) for n in ("key", "kind", "split", "sample_id", "members"))
    )
    with pytest.raises(InputError, match=r"cannot read .*c\.tar: No such file"):
        read_member(gone, "image")
    next((tmp_path / "out").glob(f"*{SUFFIX}")).write_bytes(b"no parquet")
    with pytest.raises(InputError, match="is damaged"):
        load_index(tmp_path / "out")

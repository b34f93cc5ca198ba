"""Files as they come from phones, other systems and strangers: each is read, or refused with a name, never a crash."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tables import read

from data_pipeline.__main__ import main
from data_pipeline.errors import InputError
from data_pipeline.headers import Ranges, size_by_ranges
from data_pipeline.index import load_index, read_member
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.records import EditRecord, EncodedImage, Record, Rejected, TextImageRecord
from data_pipeline.shards import upright_size, write_shard
from data_pipeline.sources import Folder, Manifest
from data_pipeline.sources.drafts import draft
from data_pipeline.sources.layouts import LAYOUTS
from data_pipeline.sources.protocol import Unit
from data_pipeline.steps import Decode
from data_pipeline.steps.metadata import number
from data_pipeline.steps.pixels import pixels
from data_pipeline.steps.resize import Resize
from data_pipeline.transforms import decode


def encoded(size: tuple[int, int] = (20, 12), form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def add(root: Path, name: str, data: bytes, caption: bytes = b"words") -> None:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    (root / name).with_suffix(".txt").write_bytes(caption)


def turned(form: str, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded((40, 20), form, exif=exif)


# Sizes in the index are those of the picture that training sees; a bucket of the wrong shape would squash it.
@pytest.mark.parametrize("data", [turned("JPEG"), turned("PNG"), turned("WEBP"), turned("JPEG", 3), encoded((40, 20))])
def test_indexed_sizes_are_those_of_the_decoded_picture(data: bytes) -> None:
    assert upright_size(data) == decode(data).size
    assert sorted(upright_size(data)) == [20, 40]


def test_a_phones_picture_of_several_frames_is_read_and_an_animation_refused() -> None:
    frame, buffer = Image.new("RGB", (32, 24), "red"), io.BytesIO()
    frame.save(buffer, "MPO", save_all=True, append_images=[frame])
    kept = Decode().check(EncodedImage(buffer.getvalue(), "jpg"))
    assert isinstance(kept, EncodedImage) and kept.extension == "jpg" and decode(kept.data).size == (32, 24)
    animation = encoded((20, 12), "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 12))])
    assert Decode().check(EncodedImage(animation, "webp")) == ("animated", "2 frames")


def test_grey_of_16_bits_keeps_its_brightness() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 20), 32768, np.uint16)).save(buffer, "PNG")
    assert decode(buffer.getvalue()).getpixel((3, 3)) == (128, 128, 128)
    assert pixels(EncodedImage(buffer.getvalue(), "png"))[3, 3].tolist() == [128, 128, 128]


def test_grey_of_16_bits_is_looked_at_however_large() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((2048, 2048), 32768, np.uint16)).save(buffer, "PNG")
    assert pixels(EncodedImage(buffer.getvalue(), "png"))[3, 3].tolist() == [128, 128, 128]


# Each is a way in which EXIF is broken that Pillow's parser or writer raises another exception at.
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0not a tiff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",  # cut off
        b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x0e\0\x03\0\0\0\x02\0\1\0\2\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_every_reader_takes_malformed_exif_alike(form: str, exif: bytes, tmp_path: Path) -> None:
    data = encoded((40, 20), form, exif=exif)
    record = TextImageRecord("a", EncodedImage(data, {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[form]), "words")
    assert Decode()(record) == record
    assert write_shard(tmp_path / "a.tar", [(record, {})]) is not None
    size = size_by_ranges(Ranges(lambda start, end: data[start:end], len(data)), 0, len(data))
    assert upright_size(data) == decode(data).size == size == pixels(record.image).shape[1::-1]
    assert max(Image.open(io.BytesIO(Resize(longer_side=16).check(record.image).data)).size) == 16


def test_formats_outside_the_list_are_refused_whatever_their_name() -> None:
    reason, _ = Decode().check(EncodedImage(encoded(form="TIFF"), "png"))
    assert reason == "unreadable_image"
    assert Decode().check(EncodedImage(encoded(form="JPEG"), "png")).extension == "jpg"


def test_a_bomb_beyond_pillows_own_limit_is_named_as_one() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    reason, detail = Decode().check(EncodedImage(buffer.getvalue(), "png"))
    assert reason == "too_many_pixels" and "200000000" in detail


def test_a_file_that_cannot_be_read_does_not_end_the_build(tmp_path: Path) -> None:
    root = tmp_path / "in"
    add(root, "good.png", encoded(), b"\xef\xbb\xbfwith a byte order mark")
    add(root, "broken.png", b"")
    source = Folder(str(root))
    (unit,) = source.units(9)
    (root / "broken.png").unlink()  # gone since it was listed
    good, broken = sorted(source.read(unit), key=lambda item: isinstance(item, Rejected))
    assert isinstance(broken, Rejected) and broken.reason == "unreadable_file"
    assert isinstance(good, TextImageRecord) and good.caption == "with a byte order mark"


@pytest.mark.parametrize("suffix", [".png", ".txt"])
def test_a_link_out_of_the_folder_is_not_followed(suffix: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    add(root, "a.png", encoded())
    add(root, "b.png", encoded())
    linked = (root / "a.png").with_suffix(suffix)
    linked.rename(tmp_path / "secret")
    linked.symlink_to(tmp_path / "secret")
    (root / "b.png").rename(root / "c.png")
    (root / "b.png").symlink_to("c.png")  # within the folder links are as good as files
    (root / "c.txt").symlink_to("b.txt")
    found = {item.reason if isinstance(item, Rejected) else item.caption for item in read(Folder(str(root)))}
    assert found == {"path_outside_folder", "words"}


def test_a_file_too_large_for_memory_is_not_read(tmp_path: Path) -> None:
    add(tmp_path / "in", "huge.png", b"")
    os.truncate(tmp_path / "in" / "huge.png", 1 << 40)
    assert [item.reason for item in read(Folder(str(tmp_path / "in")))] == ["file_too_large"]


def test_a_file_name_that_is_not_utf8_is_stored_readably(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    name = os.fsencode(root) + b"/caf\xe9"
    try:
        for suffix, data in ((b".png", encoded()), (b".txt", b"words")):
            with open(name + suffix, "wb") as file:
                file.write(data)
    except OSError:
        pytest.skip("this file system stores UTF-8 names only")
    Recipe(Folder(str(root)), [Decode()]).build(tmp_path / "out")
    (record,) = load_index(tmp_path / "out")
    assert json.loads(read_member(record, "json"))["metadata"]["file"] == "caf\N{REPLACEMENT CHARACTER}.png"


GOOD = b'{"source": "s.png", "target": "t.png", "instruction": "caf\xc3\xa9"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xef\xbb\xbf" + GOOD, None),
        (GOOD.replace(b"caf", b"\\ud800"), "bad_json"),
        (GOOD.replace(b"s.png", b"\\ud800.png"), "bad_json"),
        (GOOD.replace(b"\xc3\xa9", b"\xe9"), "bad_json"),
        (GOOD.replace(b'"s.png"', b"9" * 5000), "bad_json"),
        (b'{"a": "' + b"a" * (1 << 20) + b'"}', "bad_json"),
        (GOOD.replace(b'"s.png"', b"null"), "missing_field"),
        (GOOD.replace(b"s.png", b"s" * 5000), "missing_file"),
        (GOOD.replace(b"s.png", b"loop.png"), "missing_file"),
        (GOOD.replace(b"s.png", b"link.png"), "path_outside_folder"),
        (GOOD.replace(b"s.png", b"/etc/hostname"), "path_outside_folder"),
        (GOOD.replace(b"s.png", b"e.jsonl"), "unknown_extension"),
    ],
)
def test_a_manifest_line_is_read_or_refused_by_name(line: bytes, reason: str | None, tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    for name in ("s.png", "t.png"):
        add(root, name, encoded())
    add(tmp_path, "outside.png", encoded())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "e.jsonl").write_bytes(line + b"\n" + GOOD.replace(b"caf", b"tea") + b"\n")
    first, second = read(Manifest(str(root / "e.jsonl")))
    assert isinstance(second, EditRecord) and second.instruction == "teaé"
    if reason is None:
        assert isinstance(first, EditRecord) and first.instruction == "café"
    else:
        assert isinstance(first, Rejected) and first.reason == reason and "e.jsonl line 1" in first.detail
        assert first.detail.isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: [{class_path: data_pipeline.steps.Decode, init_arg: {max_pixels: 1}}]", "init_arg"),
        ("steps: 3", "expected a list"),
        ("steps: [{class_path: data_pipeline.sources.Scenes}]", "is no step"),
        ("records_per_shard: true", "whole number"),
        ("source: {class_path: data_pipeline.steps.Decode}", "is no source"),
        ("source: {class_path: data_pipeline.sources.folder.Path}", "no class of this package"),
        ("source: {class_path: data_pipeline.recipe.import_module}", "no class of this package"),
        ("source: {class_path: data_pipeline.sources.Scenes, init_args: {level: one}}", "source.level"),
        ("source: {class_path: data_pipeline.sources.Scenes, init_args: {level: 9}}", "levels [1, 2"),
    ],
)
def test_a_recipe_builds_only_what_it_may_and_says_what_is_wrong(text: str, expected: str, tmp_path: Path) -> None:
    source = "source: {class_path: data_pipeline.sources.Scenes}\n"
    (tmp_path / "r.yaml").write_text(text if text.startswith("source") else source + text)
    with pytest.raises(InputError) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def text_image(key: str, data: bytes) -> TextImageRecord:
    return TextImageRecord(key, EncodedImage(data, "png"), "words")


def test_offsets_agree_with_the_tar_and_headers_hold_nothing_of_the_machine(tmp_path: Path) -> None:
    images = tuple(EncodedImage(encoded((20 + i, 12)), "png") for i in range(12))
    records = [text_image("a", encoded()), EditRecord("b", images[:11], images[11], "mix them")]
    write_shard(tmp_path / "s.tar", [(record, {}) for record in records])
    members = [f"b.source{i}.png" for i in range(11)]
    with tarfile.open(tmp_path / "s.tar") as tar:
        entries = tar.getmembers()
        assert [e.name for e in entries] == ["a.image.png", "a.json", *members, "b.target.png", "b.json"]
        assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {(0, 0, 0, "", "", 0o644)}
        offsets = {entry.name: entry.offset_data for entry in entries}
    for record in load_index(tmp_path):
        for name, member in record.members.items():
            suffix = "json" if name == "json" else f"{name}.{member.extension}"
            assert member.offset == offsets[f"{record.key}.{suffix}"]


@dataclass
class Failing:
    """Three units, the second of which fails."""

    def units(self, records: int) -> Iterator[Unit]:
        yield from (Unit(f"part {i}", {"i": i}, str(i)) for i in range(3))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        yield text_image(f"k{unit.where['i']}", encoded())
        if unit.where["i"] == 1:
            raise RuntimeError("stop")


def test_a_task_that_fails_keeps_finished_shards_and_leaves_no_part(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        Recipe(Failing()).build(tmp_path / "out")
    names = sorted(re.sub(r"-[0-9a-f]{12}", "", path.name) for path in (tmp_path / "out").iterdir())
    assert names == [".lock", "000000.index.parquet", "000000.tar", "000000.task.json", "recipe.json"]
    with pytest.raises(InputError, match="unfinished build"):
        load_index(tmp_path / "out")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "manifest cut": (lambda out: (out / "manifest.json").write_text("{"), "not the manifest", "not the manifest"),
    "manifest of another": (
        lambda out: (out / "manifest.json").write_text("[]"),
        "not the manifest",
        "is not the manifest of a build",
    ),
    "shard gone": (lambda out: only(out, "*.tar").unlink(), "is missing", "holds no shards"),
    "shard cut": (lambda out: os.truncate(only(out, "*.tar"), 99), "has 99 bytes", "truncated"),
    "index gone": (lambda out: only(out, "*.index.parquet").unlink(), "index is missing", "has no index"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_build_is_named_and_never_overwritten(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damage, when_built, when_inspected = DAMAGES[name]
    add(tmp_path / "in", "a.png", encoded())
    out = tmp_path / "out"
    recipe = Path(__file__).parents[2] / "configs" / "data" / "text_image.yaml"
    command = ["build", "-c", str(recipe), "--source.path", str(tmp_path / "in"), "--output", str(out)]
    assert main(command) == 0
    damage(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    for arguments, expected in ((command, when_built), (["inspect", str(out)], when_inspected)):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_inspect_refuses_bytes_that_changed_and_an_index_that_is_none(tmp_path: Path, capsys) -> None:
    shard = tmp_path / "s.tar"
    write_shard(shard, [(text_image("a", encoded()), {})])
    shard.write_bytes(b"a" * shard.stat().st_size)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "differs from its index" in capsys.readouterr().err
    (tmp_path / "s.index.parquet").write_bytes(b"not parquet")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is damaged or of an older version" in capsys.readouterr().err


def test_an_impossible_output_is_one_line(tmp_path: Path, capsys) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "data" / "scenes.yaml"
    small = ["build", "-c", str(recipe), "--source.count_edit", "1", "--source.count_text_image=1", "--output"]
    (tmp_path / "file").write_text("")
    assert main([*small, str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_page_shows_sources_in_order_and_examples_of_what_was_lost(tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    names = [f"s{i}.png" for i in range(11)]
    for i, name in enumerate(names):
        add(root, name, encoded((20 + i, 12)))
    line = {"source": names, "target": "s0.png", "instruction": "mix <b>them</b>"}
    (root / "e.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "target": "<i>.png"}))
    recipe = Path(__file__).parents[2] / "configs" / "data" / "edit.yaml"
    load_recipe(recipe, ["--source.path", str(root / "e.jsonl")]).build(tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "inspect.html").read_text()
    places = [page.index(f'alt="source{i}"') for i in range(11)] + [page.index('alt="target"')]
    assert places == sorted(places)
    assert "missing_file" in page and "&lt;i&gt;.png" in page and "<i>" not in page and "<b>" not in page


def test_a_record_of_more_pictures_than_training_reads_is_rejected() -> None:
    image = EncodedImage(encoded(), "png")
    assert isinstance(Decode()(EditRecord("k", (image,) * 64, image, "words")), EditRecord)
    assert Decode()(EditRecord("k", (image,) * 65, image, "words")).reason == "too_many_pictures"


def test_a_number_beyond_any_float_is_carried_along_and_no_column() -> None:
    found = draft({"caption": "words", "image": "a.png", "id": 10**400}, LAYOUTS["text_image"])
    assert found.metadata == {"id": 10**400} and number(10**400) is None

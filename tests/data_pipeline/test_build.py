"""Sources to shards: counted rejections, deterministic atomic tars, one clear line for a user's mistake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.errors import InputError
from data_pipeline.index import load_index, read_member, sample_id, sidecar
from data_pipeline.manifest import MANIFEST
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.records import EncodedImage, TextImageRecord
from data_pipeline.shards import write_shard
from data_pipeline.sources import Folder, Scenes

RECIPES = Path(__file__).parents[2] / "configs" / "data"


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three good records and one of each kind of bad one."""
    root = tmp_path / "in"
    for i, name in enumerate(["a.png", "sub/b.jpg", "c.d.webp"]):
        picture(root / name, i).with_suffix(".txt").write_text(f"caption {i} é")
    picture(root / "lonely.png")
    (root / "orphan.txt").write_text("no picture")
    picture(root / "empty.png").with_suffix(".txt").write_text("  ")
    truncated = picture(root / "cut.png", 9)
    truncated.write_bytes(truncated.read_bytes()[:100])
    truncated.with_suffix(".txt").write_text("cut")
    (root / "fake.png").write_text("<html>not a picture</html>")
    (root / "fake.txt").write_text("fake")
    return root


def build(recipe: str, source: Path, output: Path) -> dict:
    return load_recipe(RECIPES / f"{recipe}.yaml", ["--source.path", str(source)]).build(output)


def only_shard(folder: Path) -> Path:
    (shard,) = folder.glob("*.tar")
    return shard


def test_a_folder_becomes_shards_and_every_loss_is_counted(pictures: Path, tmp_path: Path) -> None:
    manifest = build("text_image", pictures, tmp_path / "out")
    assert manifest["kept"] == {"text_image/unsplit": 3}
    assert manifest["rejected"] == {
        "Decode 1: empty_text": 1,
        "Decode 1: unreadable_image": 2,
        "source: caption_without_image": 1,
        "source: image_without_caption": 1,
    }
    assert manifest["seen"] == 8
    assert any("lonely.png" in line for line in manifest["examples"]["source: image_without_caption"])


def test_names_forge_no_lines_and_links_to_folders_are_counted(pictures: Path, tmp_path: Path, capsys) -> None:
    (pictures / "x\nrecords seen 9, kept 9\x1b[2J.txt").write_text("words")
    (pictures / "linked").symlink_to(pictures / "sub")
    command = ["build", "-c", str(RECIPES / "text_image.yaml"), "--source.path", str(pictures)]
    assert main([*command, "--output", str(tmp_path / "out"), "--max_rejected", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("records seen 9") or "\x1b" in line for line in lines)
    assert any(
        "x\\x0arecords seen 9, kept 9\\x1b[2J.txt has no picture of the same name (.png" in line for line in lines
    )
    assert any("rejected 1: linked_folder" in line for line in lines)


def test_stock_webdataset_reads_the_tars(pictures: Path, tmp_path: Path) -> None:
    build("text_image", pictures, tmp_path / "out")
    samples = list(webdataset.WebDataset(str(only_shard(tmp_path / "out")), shardshuffle=False))
    assert len(samples) == 3
    for sample in samples:
        names = {name for name in sample if not name.startswith("__")}
        assert len(names) == 2 and "json" in names and any(name.startswith("image.") for name in names)
    captions = {json.loads(sample["json"])["caption"] for sample in samples}
    assert captions == {"caption 0 é", "caption 1 é", "caption 2 é"}


def test_the_index_finds_every_byte(pictures: Path, tmp_path: Path) -> None:
    build("text_image", pictures, tmp_path / "out")
    for record in load_index(tmp_path / "out"):
        assert record.sample_id == sample_id(record.key) >= 0
        for name, member in record.members.items():
            assert hashlib.sha256(read_member(record, name)).hexdigest() == member.sha256
        assert (record.members["image"].width, record.members["image"].height) == (20, 12)


def test_equal_input_gives_equal_bytes(pictures: Path, tmp_path: Path) -> None:
    first, second = (build("text_image", pictures, tmp_path / name) for name in ("one", "two"))
    assert first["shards"] == second["shards"]
    for name in (path.name for path in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_building_again_does_nothing_and_overwrites_nothing(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build("text_image", pictures, out)
    before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    assert build("text_image", pictures, out)["reused"]
    assert before == {f: f.stat().st_mtime_ns for f in out.iterdir()}
    manifest = tmp_path / "edits.jsonl"
    manifest.write_text("{}")
    with pytest.raises(InputError, match="another recipe"):
        build("edit", manifest, out)
    with pytest.raises(InputError, match="no build"):
        build("text_image", pictures, pictures)
    assert before == {f: f.stat().st_mtime_ns for f in out.iterdir()}


def test_a_build_that_nothing_survives_leaves_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("alone")
    with pytest.raises(InputError, match=r"no record survived(.|\n)*caption_without_image"):
        build("text_image", tmp_path / "in", tmp_path / "out")
    (ledger,) = (tmp_path / "out").glob("*.task.json")
    assert "caption_without_image" in ledger.read_text() and not list((tmp_path / "out").glob("*.tar"))
    picture(tmp_path / "in" / "a.png")  # mended, the same command goes on
    assert build("text_image", tmp_path / "in", tmp_path / "out")["kept"] == {"text_image/unsplit": 1}


@pytest.fixture
def triplets(tmp_path: Path) -> Path:
    """A manifest with good lines and one of each kind of bad one."""
    root = tmp_path / "pairs"
    for i, name in enumerate(["s.png", "t.png", "u.png"]):
        picture(root / name, i)
    picture(tmp_path / "outside.png")
    lines = [
        {"source": "s.png", "target": "t.png", "instruction": "make it blue"},
        {"source": "s.png", "target": "t.png", "instruction": "make it bluer"},
        {"source": ["s.png", "u.png"], "target": "t.png", "instruction": "mix them"},
        {"source": "s.png", "target": "t.png", "instruction": "make it blue"},
        {"source": "s.png", "target": "missing.png", "instruction": "x"},
        {"source": "../outside.png", "target": "t.png", "instruction": "x"},
        {"source": str(tmp_path / "outside.png"), "target": "t.png", "instruction": "x"},
        {"source": "s.png", "instruction": "x"},
        {"source": [], "target": "t.png", "instruction": "x"},
        {"source": "s.png\0", "target": "t.png", "instruction": "x"},
    ]
    manifest = root / "edits.jsonl"
    manifest.write_text("\n".join([*map(json.dumps, lines), "not json", "[1, 2]", "", "[" * 5000]))
    return manifest


def test_a_manifest_becomes_edits_and_bad_lines_are_named(triplets: Path, tmp_path: Path) -> None:
    manifest = build("edit", triplets, tmp_path / "out")
    assert manifest["kept"] == {"edit/unsplit": 4}  # equal records are dropped by selection, over all shards at once
    assert manifest["rejected"] == {
        "source: bad_json": 3,
        "source: missing_field": 2,
        "source: missing_file": 2,
        "source: path_outside_folder": 2,
    }
    assert any("line 11" in line for line in manifest["examples"]["source: bad_json"])
    records = load_index(tmp_path / "out")
    assert sorted(len(r.members) for r in records) == [3, 3, 3, 4]
    assert list(records[0].members) == ["source0", "target", "json"]


def test_a_picture_larger_than_the_limit_is_refused_from_its_header(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    Image.new("1", (9000, 9000)).save(root / "bomb.png")
    picture(root / "good.png").with_suffix(".txt").write_text("good")
    (root / "bomb.txt").write_text("bomb")
    assert build("text_image", root, tmp_path / "out")["rejected"] == {"Decode 1: too_many_pixels": 1}


def test_shards_are_cut_by_count(tmp_path: Path) -> None:
    manifest = Recipe(Scenes(1, 5, 0), records_per_shard=2).build(tmp_path / "out")
    assert [shard["records"] for shard in manifest["shards"]] == [2, 2, 1]
    found = [read_member(record, "json") for record in load_index(tmp_path / "out")]
    Recipe(Scenes(1, 5, 0), records_per_shard=9).build(tmp_path / "whole")
    assert found == [read_member(record, "json") for record in load_index(tmp_path / "whole")]


@pytest.mark.parametrize(("keys", "message"), [(["k0", "k0"], "unique"), (["../k"], r"\[0-9a-z_-\]")])
def test_keys_are_checked_and_a_failed_shard_leaves_nothing(keys: list[str], message: str, tmp_path: Path) -> None:
    image = EncodedImage(picture(tmp_path / "in" / "x.png").read_bytes(), "png")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "out" / "a.tar", [(TextImageRecord(key, image, "c"), {}) for key in keys])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "-c", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["build", "-c", "{recipe}", "--source.path", "nowhere"], "nowhere does not exist"),
        (["build", "-c", "{recipe}"], "source.path is not set"),
        (["build", "-c", "{recipe}", "--source.path", "{empty}"], "holds no pictures"),
        (["build", "-c", "{recipe}", "--source.pth", "{empty}"], "source.pth"),
        (["build", "-c", "{unknown}", "--source.path", "{empty}"], "bogus"),
        (["build", "-c", "{forbidden}"], "must start with data_pipeline."),
        (["build", "-c", "{binary}"], "is not YAML"),
        (["build", "-c", "{recipe}", "--source.path", "-1"], "source.path -1 does not exist"),
        (["build", "-c", "{list}"], "got list"),
        (["build", "-c", "{arguments}"], "source: expected settings by their names, got [1]"),
        (["select", "{empty}", "-c", "{list}"], "rules: expected settings by their names, got [1]"),
        (["inspect", "nowhere"], "there is no folder of shards at nowhere"),
        (["inspect", "{empty}"], "holds no shards"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    recipe = RECIPES / "text_image.yaml"
    (tmp_path / "unknown.yaml").write_text(recipe.read_text().replace('{path: ""', '{bogus: 1, path: ""'))
    (tmp_path / "forbidden.yaml").write_text("source: {class_path: subprocess.Popen, init_args: {args: [id]}}")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "arguments.yaml").write_text("source: {class_path: data_pipeline.sources.Folder, init_args: [1]}")
    files = ("unknown", "forbidden", "binary", "list", "arguments")
    names = {name: tmp_path / f"{name}.yaml" for name in files}
    filled = [a.format(recipe=recipe, empty=tmp_path / "empty", **names) for a in arguments]
    filled += ["--output", str(tmp_path / "out")] if filled[0] == "build" else []
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and expected in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_build_and_inspect_from_the_command_line(triplets: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    command = ["build", "-c", str(RECIPES / "edit.yaml"), "--source.path", str(triplets), "--output", out]
    assert main(command) == 0
    assert "kept 4 edit/unsplit" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "edit, unsplit" in capsys.readouterr().out
    assert "make it bluer" in Path(out, "inspect.html").read_text()


def test_captions_cannot_inject_html(tmp_path: Path) -> None:
    root = tmp_path / "in"
    picture(root / "a.png").with_suffix(".txt").write_text("<script>alert(1)</script>")
    build("text_image", root, tmp_path / "out")
    main(["inspect", str(tmp_path / "out")])
    assert "<script>" not in (tmp_path / "out" / "inspect.html").read_text()


def test_a_truncated_shard_is_named(pictures: Path, tmp_path: Path) -> None:
    build("text_image", pictures, tmp_path / "out")
    shard = only_shard(tmp_path / "out")
    record = load_index(tmp_path / "out")[-1]
    os.truncate(shard, record.members["json"].offset + 3)
    with pytest.raises(InputError, match="truncated, build it again"):
        read_member(record, "json")
    assert (tmp_path / "out" / MANIFEST).is_file()


def test_a_resumed_build_that_nothing_survives_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png").with_suffix(".txt").write_text("words")
    out = tmp_path / "out"
    build("text_image", tmp_path / "in", out)
    (out / MANIFEST).unlink()
    (out / "my_notes.txt").write_text("precious")
    (tmp_path / "in" / "a.txt").write_text(" ")
    with pytest.raises(InputError, match="no record survived"):
        build("text_image", tmp_path / "in", out)
    assert (out / "my_notes.txt").read_text() == "precious" and not list(out.glob("*.tar"))


def test_input_that_changed_before_a_build_was_finished_leaves_no_shard_behind(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / "in" / f"{i}.png", i).with_suffix(".txt").write_text(f"caption {i}")
    recipe = Recipe(Folder(str(tmp_path / "in")), records_per_shard=4)
    recipe.build(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()  # as if it had been stopped before its last moment
    (tmp_path / "out" / "notes.tar.txt").write_text("mine")
    picture(tmp_path / "in" / "0a.png", 10).with_suffix(".txt").write_text("one more")
    manifest = recipe.build(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [s["name"] for s in manifest["shards"]]
    assert len(list((tmp_path / "out").glob("*.task.json"))) == len(list((tmp_path / "out").glob("*.parquet"))) == 3
    assert len(load_index(tmp_path / "out")) == sum(manifest["kept"].values()) == 11
    assert (tmp_path / "out" / "notes.tar.txt").is_file()


def test_a_tar_that_the_manifest_does_not_name_is_not_trained_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Recipe(Scenes(1, 4, 0), records_per_shard=2).build(out)
    first, second = sorted(out.glob("*.tar"))
    shutil.copy(first, out / "000009-left.tar")
    shutil.copy(sidecar(first), out / "000009-left.index.parquet")
    with pytest.raises(InputError, match=r"000009-left.tar is none of the 2 shards in"):
        load_index(out)
    (out / "000009-left.tar").unlink()
    second.unlink()
    with pytest.raises(InputError, match=rf"{second.name} is missing"):
        load_index(out)

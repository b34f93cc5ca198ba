"""Indexes, selections and manifests that were damaged: named in one line by whatever reads them, or made again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from micro import micro_shards

from data_pipeline import parquet
from data_pipeline.__main__ import main
from data_pipeline.errors import InputError
from data_pipeline.index import KEEP, SUFFIX, load_index
from data_pipeline.lint import lint
from data_pipeline.manifest import MANIFEST, read_manifest


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return micro_shards(tmp_path / "shards", 20, 0)


def only_index(folder: Path) -> Path:
    (path,) = folder.glob(f"*{SUFFIX}")
    return path


# Without checksums of pages four in five flips in their bytes read back as other numbers.
def test_no_flipped_bit_of_an_index_reads_as_another_value(shards: Path, tmp_path: Path) -> None:
    path = only_index(shards)
    whole, data, draw = parquet.read(path), path.read_bytes(), random.Random(0)
    for _ in range(100):
        changed = bytearray(data)
        changed[draw.randrange(4, len(data) // 2)] ^= 1 << draw.randrange(8)  # where the pages lie
        (tmp_path / "changed").write_bytes(changed)
        try:
            assert parquet.read(tmp_path / "changed").equals(whole)
        except InputError:
            continue


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "half": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:300] + bytes([data[300] ^ 255]) + data[301:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", [["select"], ["select", "--rules.where", "[text_length >= 1]"], ["inspect"]])
def test_a_damaged_index_is_one_line(command: list[str], damage: str, shards: Path, capsys) -> None:
    path = only_index(shards)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert main([command[0], str(shards), *command[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is damaged")


@pytest.mark.parametrize("ids", [["a", "b"], [1, None]])
def test_a_selection_that_holds_no_ids_is_refused(ids: list, shards: Path) -> None:
    main(["select", str(shards)])
    facts = pq.read_schema(shards / KEEP).metadata
    pq.write_table(pa.table({"sample_id": ids}).replace_schema_metadata(facts), shards / KEEP)
    with pytest.raises(InputError, match="select again"):
        load_index(shards)


@pytest.mark.parametrize(
    ("name", "value"),
    [("shards", 5), ("shards", [5]), ("shards", [{"name": 1}]), ("kept", {"edit": "9"}), ("rejected", [])],
)
def test_a_manifest_of_wrong_types_is_refused(name: str, value: object, shards: Path) -> None:
    found = json.loads((shards / MANIFEST).read_text())
    (shards / MANIFEST).write_text(json.dumps({**found, name: value}))
    with pytest.raises(InputError, match="is not the manifest of a build"):
        read_manifest(shards)


def test_lint_names_an_unfinished_build(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    (line,) = lint(shards)
    assert "no_manifest" in line and "unfinished" in line

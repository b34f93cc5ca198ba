"""WebDataset tars written atomically and deterministically, each with its sidecar index."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipeline.index import SCHEMA, sample_id, sidecar
from data_pipeline.records import KEY_PATTERN, Record

MANIFEST = "manifest.json"


def atomic_write(path: Path, data: bytes) -> None:
    """Writes beside the target, syncs, then renames: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(record: Record) -> bytes:
    """The record's JSON member: everything but the pictures, with sorted keys."""
    facts: dict[str, Any] = {
        "kind": record.kind,
        "caption" if record.kind == "text_image" else "instruction": record.prompt,
        "origin": record.origin,
        "licence": record.licence,
        "split": record.split,
        "metadata": dict(record.metadata),
    }
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


class ShardWriter:
    """Writes records into OUT/shard-000000.tar, ...; a shard appears, with its index, when it is complete.

    The bytes depend on the records alone. Members: KEY.image.EXT, or KEY.source0.EXT ... and KEY.target.EXT; KEY.json.
    """

    def __init__(self, folder: Path, records_per_shard: int = 4096) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records_per_shard = records_per_shard
        self.shards: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []
        self._count = 0

    def write(self, record: Record) -> None:
        """Adds a record; its key must be new in this folder."""
        if not KEY_PATTERN.fullmatch(record.key) or record.key in self._keys:
            raise ValueError(f"record key {record.key!r} must match [0-9a-z_-]+ and be unique in {self.folder}")
        self._keys.add(record.key)
        for name, image in record.images.items():
            with Image.open(io.BytesIO(image.data)) as header:
                width, height = header.size
            self._add(record, name, image.extension, image.data, width, height)
        self._add(record, "json", "json", describe(record), 0, 0)
        self._count += 1
        if self._count == self.records_per_shard:
            self._commit()

    def _add(self, record: Record, name: str, extension: str, data: bytes, width: int, height: int) -> None:
        suffix = extension if name == "json" else f"{name}.{extension}"
        entry = tarfile.TarInfo(f"{record.key}.{suffix}")
        entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
        offset = self._buffer.tell() + tarfile.BLOCKSIZE  # a USTAR header is one block
        self._tar.addfile(entry, io.BytesIO(data))
        self._rows.append(
            {
                "key": record.key,
                "sample_id": sample_id(record.key),
                "kind": record.kind,
                "split": record.split,
                "field": name,
                "extension": extension,
                "offset": offset,
                "size": len(data),
                "width": width,
                "height": height,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )

    def _commit(self) -> None:
        self._tar.close()
        path = self.folder / f"shard-{len(self.shards):06d}.tar"
        data, table = self._buffer.getvalue(), io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), table)
        atomic_write(sidecar(path), table.getvalue())  # before the tar: a tar that is there always has its index
        atomic_write(path, data)
        digest = hashlib.sha256(data).hexdigest()
        self.shards.append({"name": path.name, "sha256": digest, "bytes": len(data), "records": self._count})
        self._begin()

    def close(self) -> None:
        """Writes the last, shorter shard."""
        if self._count:
            self._commit()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

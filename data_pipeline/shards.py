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
from PIL import ExifTags, Image

from data_pipeline.errors import InputError
from data_pipeline.index import SCHEMA, sample_id, sidecar
from data_pipeline.records import KEY_PATTERN, Record

MANIFEST = "manifest.json"
READABLE = ["PNG", "JPEG", "WEBP"]
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        absent = sorted({"recipe", "kept", "rejected", "examples", "shards"} - set(found))
        if absent:
            raise ValueError(f"it has no {', '.join(absent)}")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not the manifest of a build: {error}; choose another folder") from error
    return found


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an encoded picture turned upright by its EXIF orientation; reads the header."""
    with Image.open(io.BytesIO(data), formats=READABLE) as header:
        width, height = header.size
        # To look for orientation, Pillow decodes the whole of a PNG; nearly none carries any of its three carriers.
        plain = header.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"exif", b"XML:com.adobe.xmp"))
        orientation = 1 if plain else header.getexif().get(ExifTags.Base.Orientation, 1)
    return (height, width) if orientation in SIDEWAYS else (width, height)


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

    Records go to a temporary file at once, so memory holds one record and the index of one shard. The bytes depend on
    the records alone. Members: KEY.image.EXT, or KEY.source0.EXT ... and KEY.target.EXT; KEY.json.
    """

    def __init__(self, folder: Path, records_per_shard: int = 4096) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records_per_shard = records_per_shard
        self.shards: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._file: io.BufferedRandom | None = None

    def _begin(self) -> io.BufferedRandom:
        self._path = self.folder / f"shard-{len(self.shards):06d}.tar"
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        file = open(self._temporary, "w+b")  # noqa: SIM115 - closed by _commit or _discard
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []
        self._count = 0
        return file

    def write(self, record: Record) -> None:
        """Adds a record; its key must be new in this folder."""
        if not KEY_PATTERN.fullmatch(record.key) or record.key in self._keys:
            raise ValueError(f"record key {record.key!r} must match [0-9a-z_-]+ and be unique in {self.folder}")
        sizes = [upright_size(image.data) for image in record.images.values()]
        self._keys.add(record.key)
        self._file = self._file or self._begin()
        for (name, image), (width, height) in zip(record.images.items(), sizes, strict=True):
            self._add(record, name, image.extension, image.data, width, height)
        self._add(record, "json", "json", describe(record), 0, 0)
        self._count += 1
        if self._count == self.records_per_shard:
            self._commit()

    def _add(self, record: Record, name: str, extension: str, data: bytes, width: int, height: int) -> None:
        suffix = extension if name == "json" else f"{name}.{extension}"
        entry = tarfile.TarInfo(f"{record.key}.{suffix}")
        entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
        offset = self._tar.offset + tarfile.BLOCKSIZE  # a USTAR header is one block
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
        assert self._file is not None
        self._tar.close()
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), table)
        atomic_write(sidecar(self._path), table.getvalue())  # before the tar: a tar that is there always has its index
        os.replace(self._temporary, self._path)
        self.shards.append({"name": self._path.name, "sha256": digest, "bytes": size, "records": self._count})
        self._file = None

    def close(self) -> None:
        """Writes the last, shorter shard."""
        if self._file is not None:
            self._commit()

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

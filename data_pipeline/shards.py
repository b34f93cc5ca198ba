"""WebDataset tars written atomically and deterministically, each with its sidecar index."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from xxhash import xxh3_64_intdigest

from data_pipeline import parquet
from data_pipeline.index import sample_id, sidecar, with_scores
from data_pipeline.pictures import SIDEWAYS, orientation
from data_pipeline.records import KEY_PATTERN, Record, facts

READABLE = ["PNG", "JPEG", "WEBP"]

Scored = tuple[Record, Mapping[str, Any]]  # a record and its scores by column


def atomic_write(path: Path, data: bytes) -> None:
    """Writes beside the target, syncs, then renames: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # threads and other machines write too
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_save(path: Path, array: np.ndarray) -> None:
    """An array as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an encoded picture turned upright by its EXIF orientation; reads the header."""
    with Image.open(io.BytesIO(data), formats=READABLE) as header:
        width, height = header.size
        # To look for orientation, Pillow decodes the whole of a PNG; nearly none carries any of its three carriers.
        plain = header.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"exif", b"XML:com.adobe.xmp"))
        turned = 1 if plain else orientation(header)
    return (height, width) if turned in SIDEWAYS else (width, height)


def describe(record: Record, hashes: Mapping[str, bytes]) -> bytes:
    """The record's JSON member: everything but the pictures, and their sha256 by the rest of their members' names, so
    that a sample alone, without any index, shows whether it is whole."""
    pictures = {f"{name}.{record.images[name].extension}": digest.hex() for name, digest in hashes.items()}
    content = {**facts(record), "sha256": pictures}
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: Path, records: Iterable[Scored], columns: Sequence[pa.Field] = ()) -> dict[str, Any] | None:
    """Writes one tar and its sidecar index; returns its name, sha256, bytes and records, or None if nothing came.

    Records go to a temporary file at once, so memory holds one record and the index. The bytes depend on the records
    and scores alone. Members: KEY.image.EXT, or KEY.source0.EXT ... and KEY.target.EXT; KEY.json comes last, so that
    a record whose JSON is there is whole.

    Args:
        path: the tar to write, by way of a file beside it.
        records: records with unique keys, and a value for each score column.
        columns: the score columns, with their scorer's id and revision as field metadata.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows: list[dict[str, Any]] = []
    keys: set[str] = set()
    try:
        with open(temporary, "w+b") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for record, scores in records:
                    if not KEY_PATTERN.fullmatch(record.key) or record.key in keys:
                        raise ValueError(f"record key {record.key!r} must match [0-9a-z_-]+ and be unique in {path}")
                    keys.add(record.key)
                    rows += add_record(tar, record, scores)
            if not rows:
                return None
            file.flush()
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        table = pa.Table.from_pylist(rows, schema=with_scores(columns))
        atomic_write(sidecar(path), parquet.encoded(table))  # before the tar: a tar that is there always has its index
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": path.name, "sha256": digest, "bytes": size, "records": len(keys)}


def about(record: Record) -> dict[str, Any]:
    """What every row of an index says of its record, but for what follows from the pictures' bytes."""
    return {
        "key": record.key,
        "kind": record.kind,
        "split": record.split,
        "origin": record.origin,
        "licence": record.licence,
        "turn": turn if isinstance(turn := record.metadata.get("turn"), int) and 0 <= turn < 1 << 15 else None,
        "text_length": len(record.prompt),
        "text_sha256": hashlib.sha256(record.prompt.encode()).digest(),
    }


def add_record(tar: tarfile.TarFile, record: Record, scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Adds a record's members to the tar and yields their rows of the index."""
    pictures = {name: (image.extension, image.data, upright_size(image.data)) for name, image in record.images.items()}
    hashes = {name: hashlib.sha256(image.data).digest() for name, image in record.images.items()}
    members = {**pictures, "json": ("json", describe(record, hashes), (0, 0))}
    common = {
        **about(record),
        "sample_id": sample_id(record.key),
        "pictures_sha256": hashlib.sha256(b"".join(hashes.values())).digest() if hashes else None,
        **scores,
    }
    for name, (extension, data, (width, height)) in members.items():
        entry = tarfile.TarInfo(f"{record.key}.{extension if name == 'json' else f'{name}.{extension}'}")
        entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
        offset = tar.offset + tarfile.BLOCKSIZE  # a USTAR header is one block
        tar.addfile(entry, io.BytesIO(data))
        yield {
            **common,
            "field": name,
            "extension": extension,
            "offset": offset,
            "size": len(data),
            "width": width,
            "height": height,
            "sha256": hashes.get(name) or hashlib.sha256(data).digest(),
            "xxh3": xxh3_64_intdigest(data),
        }

"""Files and folders that are either the old one or the new one, never half of it, whenever the process dies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """The hidden name beside `path` that it is written under: the same filesystem, so that renaming is atomic."""
    return path.with_name(f".{path.name}{PARTIAL}")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file, makes it durable and renames it to `path`; `path` is intact on any error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it takes the place of `path`, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = partial_path(path), partial_path(path.with_name(path.name + ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            sync_folder(file)
        if path.exists():
            # A folder cannot be renamed onto a full one, so for an instant only the two hidden names exist.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def remove_partials(folder: Path) -> None:
    """Removes what killed runs left half written in `folder`, which belongs to one run."""
    for leftover in folder.glob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """fsync of a file or a folder by name; for a folder it makes the renames in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

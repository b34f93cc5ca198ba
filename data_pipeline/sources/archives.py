"""Pictures inside tars, whole or in parts, plain or gzipped: found by name, read in place, never extracted."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from filelock import FileLock

from data_pipeline.errors import InputError
from data_pipeline.records import EncodedImage
from data_pipeline.sources.folder import EXTENSIONS, MAX_BYTES
from data_pipeline.sources.protocol import digest
from data_pipeline.tars import TarMember, safe_name, scan

# x.tar, x.tar.gz, x.tgz; in parts x.tar.split.000, x.tar.gz.part001, x.tar.gz.partaa, x.tar.gz.aa, x.tar.gz.00
NAME = re.compile(r"(?P<stem>.+?\.(?:tar\.gz|tar|tgz))(?:\.(?:split|part)?\.?(?P<part>[0-9]+|[a-z]{2,3}))?")
OTHERS = ("xz", "zst", "bz", "lz", "idx", "old", "bak", "tmp")  # endings that are not the letters of a part
MAX_RATIO = 50  # of decompressed to compressed bytes; pictures hardly shrink
PADDING = 1 << 20  # bytes that any tar may hold beyond: its zeros shrink to nothing


class Parts(io.RawIOBase):
    """Files one behind the other, read as one; one of them is open at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.ends = list(accumulate(path.stat().st_size for path in paths))
        self.position = 0
        self.file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.ends[-1]}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number = bisect_right(self.ends, self.position)
        if number == len(self.paths):
            return 0
        if self.file is None or self.file.name != str(self.paths[number]):
            self._release()
            self.file = open(self.paths[number], "rb", buffering=0)  # noqa: SIM115 - closed with this
        self.file.seek(self.position - (self.ends[number - 1] if number else 0))
        count = self.file.readinto(memoryview(buffer)[: self.ends[number] - self.position])  # type: ignore[attr-defined]
        self.position += count
        return count

    def close(self) -> None:
        self._release()
        super().close()

    def _release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def grouped(folder: Path) -> dict[str, list[Path]]:
    """The archives below a folder by name, each with its parts in order; a missing part is an InputError."""
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        match = NAME.fullmatch(path.name)
        if match and match["part"] not in OTHERS and path.is_file():
            found[(path.parent / match["stem"]).relative_to(folder).as_posix()].append((match["part"] or "", path))
    if not found:
        raise InputError(f"source.archives {folder} is no folder with *.tar, *.tar.gz or parts of such")
    return {name: in_order(folder / name, parts) for name, parts in found.items()}


def in_order(name: Path, parts: list[tuple[str, Path]]) -> list[Path]:
    """The parts of an archive, numbered from 0 or 1 or lettered from aa; the whole archive where it is there."""
    if parts[0][0] == "":
        return [parts[0][1]]
    numbers = sorted((int(part) if part.isdigit() else letters(part), path) for part, path in parts)
    first = 1 if parts[0][0].isdigit() and numbers[0][0] == 1 else 0
    alike = len({part.isdigit() for part, _ in parts}) == 1
    if not alike or [number for number, _ in numbers] != list(range(first, first + len(numbers))):
        there = ", ".join(path.name for _, path in parts)
        raise InputError(f"{name}: only the parts {there} are there; fetch the others again")
    return [path for _, path in numbers]


def letters(part: str) -> int:
    """aa is 0, ab is 1, ba is 26."""
    number = 0
    for letter in part:
        number = 26 * number + ord(letter) - ord("a")
    return number


@dataclass(frozen=True)
class Archives:
    """The members of all archives below a folder, by name.

    Args:
        folder: where the archives are.
        spool: where gzipped ones are decompressed to plain tars, once; by default `.spool` in the folder.
    """

    folder: str
    spool: str = ""

    def read(self, name: str) -> EncodedImage | tuple[str, str]:
        """A picture by its path in an archive, or by the end of that path where it is unique; or (reason, detail)."""
        shown = repr(name[:200])
        extension = EXTENSIONS.get(PurePosixPath(name).suffix.lower())
        if extension is None:
            return "unknown_extension", f"{shown}; expected {', '.join(EXTENSIONS)}"
        found = located(self).find(name)
        if len(found) != 1:
            times = f"{len(found)} times in the archives" if found else "in no archive"
            hollow = located(self).hollow
            note = f"; nothing can be read of {', '.join(hollow)}" if hollow and not found else ""
            return "missing_file", f"{shown} is {times} of {Path(self.folder).name}{note}"
        archive, offset, size = found[0]
        if size > MAX_BYTES:
            return "file_too_large", f"{shown}: {size} bytes, at most {MAX_BYTES}"
        try:
            file = opened(self, archive, located(self).parts[archive], os.getpid())
            file.seek(offset)
            data = file.read(size)
        except OSError as error:
            return "unreadable_file", f"{shown}: {error.strerror}"
        if len(data) != size:
            return "unreadable_file", f"{shown}: {len(data)} of {size} bytes could be read"
        return EncodedImage(data, extension)


Place = tuple[str, int, int]  # archive, offset, size


@dataclass(frozen=True)
class Directory:
    """Members by their paths from the end ("c.png/b/a/"), sorted: those with the same end of a path are neighbours; the
    parts of each archive; and the archives without any member, which are none or damaged."""

    paths: list[str]
    places: list[Place]
    parts: dict[str, tuple[Path, ...]]
    hollow: list[str]

    def find(self, name: str) -> list[Place]:
        """The members of a path; if there are none, those whose path ends in it."""
        wanted = backwards(name)
        start = bisect_left(self.paths, wanted)
        exact = self.places[start : bisect_right(self.paths, wanted)]
        return exact or self.places[start : bisect_left(self.paths, wanted + chr(0x10FFFF))]


def backwards(name: str) -> str:
    """a/b.png as b.png/a/."""
    return "".join(f"{part}/" for part in reversed(PurePosixPath(name).parts))


@lru_cache(maxsize=4)
def located(archives: Archives) -> Directory:
    """The members of all archives, by their headers alone."""
    found: list[tuple[str, Place]] = []
    parts = {name: tuple(paths) for name, paths in grouped(Path(archives.folder)).items()}
    for archive, paths in parts.items():
        file = opened(archives, archive, paths, os.getpid())
        for member in scan(file, file.seek(0, os.SEEK_END)):
            if isinstance(member, TarMember) and safe_name(member.name):  # what is lost is named where it is asked for
                found.append((backwards(member.name), (archive, member.offset, member.size)))
    found.sort()
    hollow = sorted(parts.keys() - {place[0] for _, place in found})
    return Directory([path for path, _ in found], [place for _, place in found], parts, hollow)


@lru_cache(maxsize=64)
def opened(archives: Archives, archive: str, parts: tuple[Path, ...], process: int) -> BinaryIO:
    """An archive as one seekable file; `process` keeps a forked worker from sharing a position."""
    file: BinaryIO = io.BufferedReader(Parts(parts))
    if not archive.endswith("gz"):
        return file
    spool = Path(archives.spool or Path(archives.folder) / ".spool")
    stamp = digest([[part.stat().st_size, part.stat().st_mtime_ns] for part in parts])[
        :12
    ]  # fetched again: a new spool
    plain = spool / f"{archive.replace('/', '--')}-{stamp}.plain"
    try:
        spool.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{plain}.lock"):
            if not plain.exists():
                decompress(file, plain, PADDING + MAX_RATIO * sum(part.stat().st_size for part in parts))
    except OSError as error:
        raise InputError(f"cannot decompress {archive} to {spool}: {error}; free space or set source.spool") from error
    return open(plain, "rb")


def decompress(file: BinaryIO, plain: Path, limit: int) -> None:
    """Writes the decompressed bytes; a damaged end is left out, more than `limit` bytes are an InputError."""
    temporary, written = plain.with_suffix(".tmp"), 0
    try:
        with gzip.open(file) as source, open(temporary, "wb") as target:
            try:
                while chunk := source.read1(1 << 16):  # little is lost of a chunk that is damaged
                    written += len(chunk)
                    if written > limit:
                        raise InputError(f"{plain.stem} grows to more than {limit} bytes: no archive of pictures")
                    target.write(chunk)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                pass  # what is missing is rejected where a row asks for it
        os.replace(temporary, plain)
    finally:
        temporary.unlink(missing_ok=True)

"""Tar files read with suspicion: headers only, every defect named, and the way found again behind a damaged part.

The standard library ends silently at a header it cannot read and at zeros in the middle, which loses samples unnoticed;
and it reads long names and extended headers of any size into memory.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENDED = 1 << 20  # bytes of a long name or an extended header
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass(frozen=True)
class TarMember:
    """A regular file inside a tar: its name as stored and the byte range of its content."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Defect:
    """What is wrong at a byte offset. `breaks`: members may be missing here, so no sample may reach across."""

    offset: int
    reason: str
    detail: str
    breaks: bool = True


def scan(file: BinaryIO, size: int) -> Iterator[TarMember | Defect]:
    """Members and defects of a tar of `size` bytes in stored order, by its headers alone."""
    ended = False  # by zeros, as a whole tar does
    position, name, stated = 0, "", -1  # name and stated: from a long-name or extended header, for the next member
    while position < size:
        block = _block(file, position)
        ended = not block.strip(b"\0")
        if ended:
            following = _resync(file, position, size)
            if following < size:
                yield Defect(position, "zeros_inside", f"zeros from byte {position} to {following}, then more members")
            position, name, stated = following, "", -1
            continue
        header = _header(block)
        if header is None:
            following = _resync(file, position + BLOCK, size)
            yield Defect(position, "bad_header", f"no tar header at byte {position}; went on at byte {following}")
            position, name, stated = following, "", -1
            continue
        start = position + BLOCK
        length = stated if stated >= 0 and header.type in REGULAR else header.size
        if start + length > size:
            yield Defect(
                position, "truncated", f"{header.name!r} should end at byte {start + length}, the file at {size}"
            )
            position, name, stated = _resync(file, start, size), "", -1
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if length > MAX_EXTENDED:
                yield Defect(position, "bad_header", f"an extended header of {length} bytes, at most {MAX_EXTENDED}")
            else:
                file.seek(start)
                content = file.read(length)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                else:
                    name, stated = _pax(content, name)
        elif header.type in REGULAR:
            yield TarMember(name or header.name, start, length)
            name, stated = "", -1
        else:
            if header.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
                yield Defect(position, "not_a_file", f"{name or header.name!r} is a link, device or sparse file")
            name, stated = "", -1
            length = 0 if header.type == tarfile.DIRTYPE else length
        position = start + -(-length // BLOCK) * BLOCK
    if not ended:
        yield Defect(size, "no_end", "the end mark is missing: members may be, too", False)


def _block(file: BinaryIO, position: int) -> bytes:
    file.seek(position)
    return file.read(BLOCK)


def _header(block: bytes) -> tarfile.TarInfo | None:
    """A header whose checksum is right, or None."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return found if found.size >= 0 else None


def _resync(file: BinaryIO, position: int, size: int) -> int:
    """The next byte offset at which a header with a right checksum stands, or the end."""
    while position < size:
        file.seek(position)
        chunk = file.read(BLOCK * 2048)
        for start in range(0, len(chunk), BLOCK):
            block = chunk[start : start + BLOCK]
            if block[257:262] == b"ustar" and _header(block) is not None:
                return position + start
        position += len(chunk)
    return size


def _pax(content: bytes, name: str) -> tuple[str, int]:
    """Name and size from an extended header's records ("LENGTH KEY=VALUE\\n"); the given name and -1 where absent."""
    stated, position = -1, 0
    while found := PAX_RECORD.match(content, position):
        end = position + int(found[1])
        value = content[found.end() : end - 1]
        if end <= found.end() or end > len(content):
            break
        if found[2] == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif found[2] == b"size" and value.isdigit() and len(value) < 16:
            stated = int(value)
        position = end
    return name, stated


def safe_name(name: str) -> bool:
    """Whether a member's name is a relative path that stays where it is, of printable text."""
    path = PurePosixPath(name)
    return bool(name) and name.isprintable() and not path.is_absolute() and ".." not in path.parts and "\\" not in name


@dataclass(frozen=True)
class Sample:
    """Adjacent members that share a key, by the rest of their names ("jpg", "source0.png")."""

    key: str
    members: dict[str, TarMember]


def samples(found: Iterable[TarMember | Defect]) -> Iterator[Sample | Defect]:
    """WebDataset's grouping: the key is the path up to the first dot of the last part.

    Stricter than the stock reader: a sample that a defect cuts short, that repeats a member, or whose key comes again
    later, is a defect and never a sample.
    """
    runs: list[tuple[str, dict[str, TarMember], str]] = []  # key, members, what is wrong
    broken = False
    for item in found:
        if isinstance(item, Defect):
            yield item
            if item.breaks:  # the sample before may lack its end, the one behind its beginning
                if runs:
                    runs[-1] = (*runs[-1][:2], "damaged_sample")
                broken = True
            continue
        if not safe_name(item.name):
            yield Defect(item.offset, "unsafe_name", f"{item.name!r} is no plain relative path", False)
            continue
        folder, _, last = item.name.rpartition("/")
        stem, dot, rest = last.partition(".")
        if not dot or not stem:
            yield Defect(item.offset, "no_extension", f"{item.name!r} has no extension", False)
            continue
        key = f"{folder}/{stem}" if folder else stem
        if not runs or runs[-1][0] != key or broken:
            runs.append((key, {}, "damaged_sample" if broken else ""))
            broken = False
        elif rest in runs[-1][1]:
            runs[-1] = (key, runs[-1][1], "repeated_member")
        runs[-1][1].setdefault(rest, item)
    times: dict[str, int] = {}
    for key, _, _ in runs:
        times[key] = times.get(key, 0) + 1
    for key, members, wrong in runs:
        wrong = "scattered_sample" if times[key] > 1 else wrong
        if wrong:
            at = next(iter(members.values())).offset
            yield Defect(at, wrong, f"sample {key!r} with {', '.join(sorted(members))}", False)
        else:
            yield Sample(key, members)

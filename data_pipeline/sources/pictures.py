"""Pictures as rows have them: names of files, bytes in the table itself, or data: URLs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.records import EncodedImage
from data_pipeline.sources.folder import EXTENSIONS, MAX_BYTES, leaves, read_file

MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"RIFF", "webp"))

Fault = tuple[str, str]  # (reason, detail)
ByName = Callable[[str], EncodedImage | Fault]  # reads a file, a member of an archive or a URL


def read_picture(picture: Any, by_name: ByName) -> EncodedImage | Fault:
    """A picture of a row, or why not."""
    data = picture.get("bytes") if isinstance(picture, Mapping) else picture
    if isinstance(data, bytes):
        return sniffed(data)
    if isinstance(data, str) and data.startswith("data:"):
        return from_data_url(data)
    name = picture_name(picture)
    return by_name(name) if name else ("missing_file", "a picture has neither bytes nor a path")


def picture_name(picture: Any) -> str:
    """The path of a picture, as far as its row gives one."""
    name = picture.get("path") if isinstance(picture, Mapping) else picture
    return name if isinstance(name, str) and not name.startswith("data:") else ""


def sniffed(data: bytes) -> EncodedImage | Fault:
    """Bytes as the picture that their beginning says they are."""
    if not data:
        return "missing_file", "a picture has no bytes"
    if len(data) > MAX_BYTES:
        return "file_too_large", f"a picture of {len(data)} bytes, at most {MAX_BYTES}"
    extension = next((extension for magic, extension in MAGIC if data.startswith(magic)), None)
    if extension is None or (extension == "webp" and data[8:12] != b"WEBP"):
        return "not_a_picture", f"expected PNG, JPEG or WebP, got bytes that begin with {data[:16]!r}"
    return EncodedImage(data, extension)


def from_data_url(url: str) -> EncodedImage | Fault:
    """The picture inside data:image/png;base64,..."""
    header, _, content = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise binascii.Error("it is not base64")
        return sniffed(base64.b64decode(content, validate=True))
    except binascii.Error as error:
        return "not_a_picture", f"{url[:40]!r}: {error}"


def read_image(root: Path, name: str) -> EncodedImage | Fault:
    """A picture inside the given folder, which is resolved, or why not."""
    shown = repr(name[:200])
    try:
        path = (root / name).resolve()
        if leaves(path, root):
            return "path_outside_folder", f"{shown} leaves the folder of pictures"
        if not path.is_file():
            return "missing_file", f"{shown} is not in {root.name}"
    except (OSError, ValueError, RuntimeError):  # a null byte, a name too long, a loop of links
        return "missing_file", f"{shown} is no file name"
    extension = EXTENSIONS.get(path.suffix.lower())
    if extension is None:
        return "unknown_extension", f"{shown}; expected {', '.join(EXTENSIONS)}"
    data = read_file(path)
    return data if isinstance(data, tuple) else EncodedImage(data, extension)

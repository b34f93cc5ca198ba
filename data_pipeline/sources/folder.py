"""A folder of pictures, each with its caption in a text file of the same name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.records import SPELT, EncodedImage, Record, Rejected, TextImageRecord, slug
from data_pipeline.sources.protocol import Unit, digest

EXTENSIONS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
MAX_BYTES = 1 << 28  # of a file: no picture of an allowed size needs more, and a larger one would fill the memory


def extension_of(name: str) -> str:
    """The extension that a picture of this name is stored with, "" for anything else; the name may be all extension.

    >>> extension_of("target.JPEG"), extension_of("png"), extension_of("json")
    ('jpg', 'png', '')
    """
    return EXTENSIONS.get("." + name.rpartition(".")[2].lower(), "")


def existing_path(path: str, expected: str) -> Path:
    """The path a source was given, or one clear error."""
    if not path:
        raise InputError(f"source.path is not set; pass --source.path PATH, {expected}")
    if not Path(path).exists():
        raise InputError(f"source.path {path} does not exist; expected {expected}")
    return Path(path)


def file_key(relative: str) -> str:
    """A readable key, unique by a hash of the whole relative path."""
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{slug(Path(relative).stem)[:40]}-{digest}".lstrip("-")


def printable(name: str) -> str:
    """A file name as text that can be stored and shown: bytes that are not UTF-8 are replaced, control characters
    spelt out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").translate(SPELT)


def leaves(path: Path, root: Path) -> bool:
    """Whether a path, or a link that it is, leads out of a folder, which is resolved: whoever made the folder must not
    choose what is read of this machine."""
    return not path.resolve().is_relative_to(root)


def read_file(path: Path) -> bytes | tuple[str, str]:
    """A file's bytes, or (reason, detail) why not: one unreadable file must not end a build."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return "file_too_large", f"{printable(path.name)}: {size} bytes, at most {MAX_BYTES}"
        return path.read_bytes()
    except OSError as error:
        return "unreadable_file", f"{printable(path.name)}: {error.strerror}"


@dataclass
class Folder:
    """Pictures (.png, .jpg, .jpeg, .webp) anywhere below `path`, each with NAME.txt beside it; links stay inside."""

    path: str = ""
    origin: str = ""
    licence: str = ""

    def units(self, records: int) -> Iterator[Unit]:
        """Ranges of the sorted files; a unit's content is their names and sizes."""
        root = existing_path(self.path, "a folder of pictures with captions in .txt files beside them")
        if not root.is_dir():
            raise InputError(f"source.path {root} is a file; expected a folder of pictures with .txt files beside them")
        files = sorted(f for f in root.rglob("*") if f.is_file())
        pictures = {f.with_suffix("") for f in files if f.suffix.lower() in EXTENSIONS}
        listed = [
            f
            for f in files
            if f.suffix.lower() in EXTENSIONS or (f.suffix.lower() == ".txt" and f.with_suffix("") not in pictures)
        ]
        listed = sorted([*listed, *(f for f in root.rglob("*") if f.is_symlink() and f.is_dir())])
        if not listed:
            raise InputError(
                f"source.path {root} holds no pictures; expected {', '.join(EXTENSIONS)}, each with a .txt caption"
            )
        for start in range(0, len(listed), records):
            part = listed[start : start + records]
            names = [os.fsencode(f.relative_to(root)).decode("latin-1") for f in part]  # any bytes survive as text
            sizes = [[f.stat().st_size, caption_size(f)] for f in part]
            name = f"files {start + 1}-{start + len(part)} of {printable(root.name)}"
            yield Unit(name, {"files": names}, digest(names, sizes))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The records of a range of files."""
        root = Path(self.path)
        for encoded in unit.where["files"]:
            path = root / os.fsdecode(encoded.encode("latin-1"))
            if path.is_dir():
                name = path.relative_to(root).as_posix()
                detail = f"{printable(name)} is a link to a folder, which is not followed; build from it apart"
                yield Rejected(file_key(name), "linked_folder", detail)
            elif path.suffix.lower() == ".txt":
                name = path.relative_to(root).as_posix()
                detail = f"{printable(name)} has no picture of the same name ({', '.join(EXTENSIONS)})"
                yield Rejected(file_key(name), "caption_without_image", detail)
            else:
                yield self._record(root, path)

    def _record(self, root: Path, image: Path) -> Record | Rejected:
        path = image.relative_to(root).as_posix()
        name, key, caption = printable(path), file_key(path), image.with_suffix(".txt")
        if not caption.is_file():
            return Rejected(key, "image_without_caption", f"{name} has no {printable(caption.name)} beside it")
        if leaves(caption, root.resolve()) or leaves(image, root.resolve()):
            return Rejected(key, "path_outside_folder", f"{name} or its caption is a link out of the folder")
        words, data = read_file(caption), read_file(image)
        if isinstance(words, tuple) or isinstance(data, tuple):
            return Rejected(key, *(words if isinstance(words, tuple) else data))
        try:
            text = words.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return Rejected(key, "caption_not_utf8", f"the caption of {name}: {error}")
        origin = self.origin or printable(root.resolve().name)
        encoded = EncodedImage(data, EXTENSIONS[image.suffix.lower()])
        return TextImageRecord(key, encoded, text, origin, self.licence, metadata={"file": name})


def caption_size(image: Path) -> int:
    """Bytes of the caption beside a picture, -1 where there is none."""
    caption = image.with_suffix(".txt")
    return caption.stat().st_size if caption.is_file() else -1

"""A folder of pictures, each with its caption in a text file of the same name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.records import EncodedImage, Record, Rejected, TextImageRecord, slug

EXTENSIONS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


def existing_path(path: str, expected: str) -> Path:
    """The path a source was given, or one clear error."""
    if not path:
        raise InputError(f"source.path is not set; pass --source.path PATH, {expected}")
    if not Path(path).exists():
        raise InputError(f"source.path {path} does not exist; expected {expected}")
    return Path(path)


def file_key(relative: str) -> str:
    """A readable key, unique by a hash of the whole relative path."""
    return f"{slug(Path(relative).stem)[:40]}-{hashlib.sha256(relative.encode()).hexdigest()[:10]}".lstrip("-")


@dataclass
class Folder:
    """Pictures (.png, .jpg, .jpeg, .webp) anywhere below `path`, each with NAME.txt beside it."""

    path: str = ""
    origin: str = ""
    licence: str = ""

    def __iter__(self) -> Iterator[Record | Rejected]:
        root = existing_path(self.path, "a folder of pictures with captions in .txt files beside them")
        if not root.is_dir():
            raise InputError(f"source.path {root} is a file; expected a folder of pictures with .txt files beside them")
        files = sorted(f for f in root.rglob("*") if f.is_file())
        images = [f for f in files if f.suffix.lower() in EXTENSIONS]
        captions = [f for f in files if f.suffix.lower() == ".txt"]
        if not images and not captions:
            raise InputError(
                f"source.path {root} holds no pictures; expected {', '.join(EXTENSIONS)}, each with a .txt caption"
            )
        stems = {f.with_suffix("") for f in images}
        for caption in captions:
            if caption.with_suffix("") not in stems:
                name = str(caption.relative_to(root))
                yield Rejected(file_key(name), "caption_without_image", f"{name} has no picture of the same name")
        for image in images:
            yield self._record(root, image)

    def _record(self, root: Path, image: Path) -> Record | Rejected:
        name = str(image.relative_to(root))
        key, caption = file_key(name), image.with_suffix(".txt")
        if not caption.is_file():
            return Rejected(key, "image_without_caption", f"{name} has no {caption.name} beside it")
        try:
            text = caption.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            return Rejected(key, "caption_not_utf8", f"{caption.relative_to(root)}: {error}")
        encoded = EncodedImage(image.read_bytes(), EXTENSIONS[image.suffix.lower()])
        return TextImageRecord(key, encoded, text, self.origin or root.name, self.licence, metadata={"file": name})

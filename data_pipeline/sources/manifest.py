"""A JSONL manifest of edit triplets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from data_pipeline.errors import InputError
from data_pipeline.records import EditRecord, EncodedImage, Record, Rejected, slug
from data_pipeline.sources.folder import EXTENSIONS, existing_path, read_file

MAX_LINE = 1 << 20  # bytes; a longer line is no triplet of names and an instruction


@dataclass
class Manifest:
    """Lines of {"source": NAME or [NAME, ...], "target": NAME, "instruction": TEXT}; names relative to the manifest."""

    path: str = ""
    origin: str = ""
    licence: str = ""

    def __iter__(self) -> Iterator[Record | Rejected]:
        path = existing_path(self.path, 'a .jsonl file of {"source", "target", "instruction"} lines')
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            hint = f"; did you mean {found[0]}?" if found else ""
            raise InputError(f"source.path {path} is a folder; expected a .jsonl file{hint}")
        root, lines = path.parent.resolve(), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    lines += 1
                    yield self._record(root, path.name, number, line)
        if not lines:
            raise InputError(f"source.path {path} is empty; expected one JSON object a line")

    def _record(self, root: Path, name: str, number: int, line: bytes) -> Record | Rejected:
        place = f"{name} line {number}"
        key = f"line-{number}"
        try:
            if len(line) > MAX_LINE:
                raise ValueError(f"a line of {len(line)} bytes, at most {MAX_LINE}")
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and is no text
        except (ValueError, RecursionError) as error:
            return Rejected(key, "bad_json", f"{place}: {error}")
        if not isinstance(row, dict):
            return Rejected(key, "bad_json", f"{place}: expected a JSON object, got {json.dumps(row)[:60]}")
        sources = row.get("source")
        sources = [sources] if isinstance(sources, str) else sources
        target, instruction = row.get("target"), row.get("instruction")
        if not (isinstance(target, str) and isinstance(instruction, str) and is_names(sources)):
            expected = "source (text or a list of texts), target and instruction (texts)"
            return Rejected(key, "missing_field", f"{place}: expected {expected}, got fields {sorted(row)}")
        images = []
        for file in (*sources, target):
            found = read_image(root, file)
            if isinstance(found, tuple):
                return Rejected(key, found[0], f"{place}: {found[1]}")
            images.append(found)
        content = "\n".join([*sources, target, instruction])
        key = f"{slug(Path(target).stem)[:40]}-{hashlib.sha256(content.encode()).hexdigest()[:10]}".lstrip("-")
        facts = {"source": sources, "target": target}
        origin = self.origin or name
        return EditRecord(key, tuple(images[:-1]), images[-1], instruction.strip(), origin, self.licence, "", facts)


def is_names(value: Any) -> TypeGuard[list[str]]:
    """Whether a field is a list of at least one text."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def read_image(root: Path, name: str) -> EncodedImage | tuple[str, str]:
    """A picture inside the manifest's folder, or (reason, detail) why not."""
    shown = repr(name[:200])
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            return "path_outside_folder", f"{shown} leaves the manifest's folder"
        if not path.is_file():
            return "missing_file", f"{shown} is not in the manifest's folder"
    except (OSError, ValueError, RuntimeError):  # a null byte, a name too long, a loop of links
        return "missing_file", f"{shown} is no file name"
    extension = EXTENSIONS.get(path.suffix.lower())
    if extension is None:
        return "unknown_extension", f"{shown}; expected {', '.join(EXTENSIONS)}"
    data = read_file(path)
    return data if isinstance(data, tuple) else EncodedImage(data, extension)

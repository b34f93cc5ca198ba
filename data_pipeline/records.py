"""Typed records: what a source yields, a step maps and a shard stores. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEY_PATTERN = re.compile(r"[0-9a-z_-]+")


@dataclass(frozen=True)
class EncodedImage:
    """A picture as encoded bytes, exactly as found, and its file extension: "png", "jpg" or "webp"."""

    data: bytes
    extension: str


@dataclass(frozen=True)
class TextImageRecord:
    """A picture and its caption.

    `key` matches [0-9a-z_-]+ and is unique in a set; `split` is "train", "val" or "" (the reader decides by the key).

    >>> TextImageRecord("cat-1", EncodedImage(b"...", "png"), "a cat", origin="holiday.zip", licence="CC0-1.0").kind
    'text_image'
    """

    key: str
    image: EncodedImage
    caption: str
    origin: str = ""
    licence: str = ""
    split: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    kind = "text_image"

    @property
    def prompt(self) -> str:
        """The text that conditions generation."""
        return self.caption

    @property
    def images(self) -> dict[str, EncodedImage]:
        """Pictures by member name."""
        return {"image": self.image}


@dataclass(frozen=True)
class EditRecord:
    """One or several source pictures, an instruction and the target picture.

    >>> cat, hat = EncodedImage(b"...", "png"), EncodedImage(b"...", "png")
    >>> sorted(EditRecord("cat-2", (cat,), hat, "put a hat on it").images)
    ['source0', 'target']
    """

    key: str
    sources: tuple[EncodedImage, ...]
    target: EncodedImage
    instruction: str
    origin: str = ""
    licence: str = ""
    split: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    kind = "edit"

    @property
    def prompt(self) -> str:
        """The text that conditions generation."""
        return self.instruction

    @property
    def images(self) -> dict[str, EncodedImage]:
        """Pictures by member name: source0, source1, ..., target."""
        return {**{f"source{i}": image for i, image in enumerate(self.sources)}, "target": self.target}


Record = TextImageRecord | EditRecord


@dataclass(frozen=True)
class Rejected:
    """A record that goes no further: `reason` is a short name that is counted, `detail` says what was found."""

    key: str
    reason: str
    detail: str


def slug(text: str) -> str:
    """The part of a text that a key may hold.

    >>> slug("Photos/Été 2024.JPG")
    'photos-t-2024-jpg'
    """
    return "-".join(re.findall(r"[0-9a-z]+", text.lower()))

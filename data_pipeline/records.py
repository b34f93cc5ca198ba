"""Typed records: what a source yields, a step maps and a shard stores. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPELT = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}  # control characters, line ends too
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


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to sample from, with the pictures to edit where it is an instruction (none for text-to-image).

    >>> PromptRecord("p-1", "a red circle", metadata={"tag": "colors"}).images
    {}
    """

    key: str
    prompt: str
    sources: tuple[EncodedImage, ...] = ()
    origin: str = ""
    licence: str = ""
    split: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    kind = "prompt"

    @property
    def images(self) -> dict[str, EncodedImage]:
        """Pictures by member name: source0, source1, ..."""
        return {f"source{i}": image for i, image in enumerate(self.sources)}


@dataclass(frozen=True)
class PreferenceRecord:
    """Two pictures made from one prompt (and its sources), the better and the worse.

    >>> good, bad = EncodedImage(b"...", "png"), EncodedImage(b"...", "png")
    >>> sorted(PreferenceRecord("p-2", "a cat", good, bad).images)
    ['chosen', 'rejected']
    """

    key: str
    prompt: str
    chosen: EncodedImage
    rejected: EncodedImage
    sources: tuple[EncodedImage, ...] = ()
    origin: str = ""
    licence: str = ""
    split: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    kind = "preference"

    @property
    def images(self) -> dict[str, EncodedImage]:
        """Pictures by member name: source0, ..., chosen, rejected."""
        sources = {f"source{i}": image for i, image in enumerate(self.sources)}
        return {**sources, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class ReasoningRecord:
    """A conversation about pictures: turns of (role, text), roles "system", "user" and "assistant".

    A picture stands where a text has `<image>`, in order. `metadata` may hold "answer", what a verifier compares with.

    >>> turns = (("user", "<image>How many cats?"), ("assistant", "Two."))
    >>> ReasoningRecord("r-1", (EncodedImage(b"...", "png"),), turns).prompt
    '<image>How many cats?'
    """

    key: str
    pictures: tuple[EncodedImage, ...]
    turns: tuple[tuple[str, str], ...]
    origin: str = ""
    licence: str = ""
    split: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    kind = "reasoning"

    @property
    def prompt(self) -> str:
        """The user's first text."""
        return next((text for role, text in self.turns if role == "user"), "")

    @property
    def images(self) -> dict[str, EncodedImage]:
        """Pictures by member name: image, image1, image2, ..."""
        return {f"image{i or ''}": image for i, image in enumerate(self.pictures)}


Record = TextImageRecord | EditRecord | PromptRecord | PreferenceRecord | ReasoningRecord
KINDS = ("text_image", "edit", "prompt", "preference", "reasoning")


def facts(record: Record) -> dict[str, Any]:
    """Everything but the key and the pictures, as plain data: what a record's JSON member holds."""
    common = {
        "kind": record.kind,
        "origin": record.origin,
        "licence": record.licence,
        "split": record.split,
        "metadata": dict(record.metadata),
    }
    match record:
        case TextImageRecord():
            return {**common, "caption": record.caption}
        case EditRecord():
            return {**common, "instruction": record.instruction}
        case ReasoningRecord():
            return {**common, "turns": [list(turn) for turn in record.turns]}
    return {**common, "prompt": record.prompt}


def record_from(key: str, found: Mapping[str, Any], images: Mapping[str, EncodedImage]) -> Record:
    """The inverse of `facts`. A missing field or picture is a KeyError that names it, an unknown kind a ValueError."""
    names = ("origin", "licence", "split", "metadata")
    common: dict[str, Any] = {name: found[name] for name in names if name in found}
    sources = tuple(images[f"source{i}"] for i in range(sum(name.startswith("source") for name in images)))
    match found["kind"]:
        case "text_image":
            return TextImageRecord(key, images["image"], found["caption"], **common)
        case "edit":
            return EditRecord(key, sources, images["target"], found["instruction"], **common)
        case "prompt":
            return PromptRecord(key, found["prompt"], sources, **common)
        case "preference":
            return PreferenceRecord(key, found["prompt"], images["chosen"], images["rejected"], sources, **common)
        case "reasoning":
            pictures = tuple(images[f"image{i or ''}"] for i in range(len(images)))
            return ReasoningRecord(key, pictures, tuple((role, text) for role, text in found["turns"]), **common)
    raise ValueError(f"record {key} is of the unknown kind {found['kind']!r}")


@dataclass(frozen=True)
class Rejected:
    """A record that goes no further: `reason` is a short name that is counted, `detail` says what was found.

    Both are shown in terminals and one a line, so what names of files might do there is spelt out.
    """

    key: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        for name in ("key", "detail"):
            object.__setattr__(self, name, getattr(self, name).translate(SPELT))


def slug(text: str) -> str:
    """The part of a text that a key may hold.

    >>> slug("Photos/Été 2024.JPG")
    'photos-t-2024-jpg'
    """
    return "-".join(re.findall(r"[0-9a-z]+", text.lower()))

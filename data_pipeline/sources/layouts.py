"""The field's manifest layouts: which columns of a row are pictures, text and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from data_pipeline.errors import InputError


@dataclass(frozen=True)
class Columns:
    """Columns by what they hold; whatever else a row has goes along as metadata.

    Args:
        kind: of the records; "mixed" is an edit where a row has sources, else a captioned picture, and "chat" a
            reasoning record whose turns are given one by one.
        text: the caption, instruction, prompt or question; the first of these columns that a row has. Of a list the
            first is taken, and all are kept as metadata.
        target: the picture to learn, or the better one of two; the first of these columns that a row has.
        sources: further pictures in order, of all these columns; one holds a picture or a list.
        rejected: the worse picture of two.
        answer: what a verifier compares with.
        turns: a list of rows, each an edit of one session; of a chat the list of what was said.
        licence: of the row's pictures; goes before the source's.
        origin: where the row comes from; goes before the source's.
        split: "train" or "val".
    """

    kind: str
    text: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    licence: tuple[str, ...] = ("licence", "license")
    origin: tuple[str, ...] = ()
    split: tuple[str, ...] = ()

    @cached_property
    def named(self) -> dict[str, tuple[str, ...]]:
        """Columns by role, of the roles that this layout has."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind" and getattr(self, f.name)}


PROVENANCE = ("licence", "origin", "split")  # roles that every layout may have

LAYOUTS = {
    "edit": Columns("edit", ("instruction",), ("target",), ("source",)),
    "text_image": Columns("text_image", ("caption", "text"), ("image", "file_name", "url")),
    "omniedit": Columns("edit", ("edited_prompt_list",), ("edited_img",), ("src_img",)),
    "ultraedit": Columns("edit", ("edit_prompt",), ("edited_image",), ("source_image",)),
    "imgedit": Columns("edit", ("prompt",), ("output_images",), ("input_images",), turns=("data",)),
    "anyedit": Columns("edit", ("edit", "edit_instruction"), ("edited_file",), ("image_file", "visual_input")),
    "omnigen2": Columns("mixed", ("instruction",), ("output_image",), ("input_images",)),
    "opengpt4o": Columns("mixed", ("input_prompt",), ("output_image",), ("input_image",)),
    "seed_edit": Columns("edit", ("instruction",), ("target_image",), ("source_image",)),
    "prompts": Columns("prompt", ("prompt", "text"), sources=("source", "image")),
    "preference": Columns("preference", ("prompt",), ("chosen",), ("source",), ("rejected",)),
    "reasoning": Columns("reasoning", ("question", "problem"), (), ("images", "image"), (), ("answer", "solution")),
    "chat": Columns("chat", sources=("images", "image"), turns=("conversations", "messages")),
}


def columns_of(layout: str, changes: Mapping[str, str | list[str]]) -> Columns:
    """A layout's columns, some under names of the user's own."""
    if layout not in LAYOUTS:
        raise InputError(f"source.layout is {layout}; expected one of {', '.join(LAYOUTS)}")
    columns = LAYOUTS[layout]
    roles = list(dict.fromkeys([*columns.named, *PROVENANCE]))
    unknown = sorted(changes.keys() - set(roles))
    if unknown:
        raise InputError(f"source.columns names {unknown}; the layout {layout} has {', '.join(roles)}")
    named: dict[str, Any] = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in changes.items()}
    if empty := sorted(name for name, value in named.items() if not value or "" in value):
        raise InputError(f"source.columns gives no column for {', '.join(empty)}; leave it out to keep the layout's")
    return replace(columns, **named)

"""Conversations and pictures to tokens and tiles: chat template, tiles of a picture, packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightning_modules.networks.r1v import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    TILING,
    R1VModel,
    tile_side,
    tile_tokens,
    token_id,
)

MARK = "<image>"
THINK = "<think>\n"
IGNORED = -100  # label of a token that is not learned
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as InternViT was trained with

Turns = Sequence[tuple[str, str]]


class LayoutError(ValueError):
    """A conversation that cannot be trained on; `reason` is a short name that is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One conversation: tokens, what is learned of them (else IGNORED), and the tiles of its pictures in order."""

    input_ids: list[int]
    labels: list[int]
    tiles: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Rows:
    """Samples in rows, as `R1VModel` takes them.

    Attributes:
        input_ids: (B, L).
        attention_mask: (B, L), 0 where padded, else the sample's number in its row, from 1.
        labels: (B, L), IGNORED where nothing is learned.
        tiles: (N, 3, S, S), in the order of their tokens.
        samples: how many conversations these are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tiles: Tensor
    samples: int

    def to(self, device: torch.device | str) -> Rows:
        """The rows on a device."""
        moved = [t.to(device) for t in (self.input_ids, self.attention_mask, self.labels, self.tiles)]
        return Rows(moved[0], moved[1], moved[2], moved[3], self.samples)


@dataclass(frozen=True)
class Layout:
    """How a model's conversations are laid out.

    Attributes:
        tokenizer: with a chat template; an answer ends with its end-of-sequence token.
        tokens_per_tile: of a tile.
        image_size: side of a tile in pixels.
        min_tiles, max_tiles: of a picture.
        thumbnail: whether a picture of several tiles is followed by itself at the size of one.
        context: tokens of a sample, at most.
    """

    tokenizer: Any
    tokens_per_tile: int
    image_size: int
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    context: int = 16384

    def __post_init__(self) -> None:
        for token in (IMAGE, IMAGE_START, IMAGE_END):
            token_id(self.tokenizer, token)
        if not self.tokenizer.chat_template:
            raise LayoutError(
                "no chat template", f"the tokenizer {self.tokenizer.name_or_path} has none; add one to it"
            )

    @classmethod
    def of(cls, model: R1VModel, context: int = 16384) -> Layout:
        """That of a model."""
        return cls.planned(model.config, model.tokenizer, context)

    @classmethod
    def planned(cls, config: Mapping[str, Any], tokenizer: Any, context: int = 16384) -> Layout:
        """That of a model of this config, without it."""
        given = {**TILING, **config}
        tiling = given["min_dynamic_patch"], given["max_dynamic_patch"], given["use_thumbnail"]
        return cls(tokenizer, tile_tokens(config), tile_side(config), *tiling, context)

    def sample(self, turns: Turns, pictures: Sequence[UInt8[Tensor, "3 _ _"]] = ()) -> Sample:
        """A conversation to learn from: the answers and the ends of their turns are learned, nothing else.

        Where a template drops earlier chains of thought, as R1's does, an answer is learned as it will be asked for:
        what was laid out before it by other words is begun anew.

        Raises:
            LayoutError: a picture is missing or stands in an answer, a reserved token stands in a text, or it is longer
                than the context.
        """
        turns, tiles, counts = self._with_pictures(turns, pictures)
        ids, labels, used = self._learned(turns, counts)
        # Pictures after the last answer have no tokens.
        return self._checked(Sample(ids, labels, tiles[: sum(counts[:used])]))

    def length(self, turns: Turns, sizes: Sequence[tuple[int, int]], asked: bool = False) -> int:
        """Tokens that `sample`, or `prompt` where it is `asked`, gives a conversation, found without its pictures: from
        their (height, width) alone.

        A size of 0 is not known, and counts as the most tiles. LayoutError as of these, but for the context.
        """
        turns = turns[:-1] if asked and turns and turns[-1][0] == "assistant" else turns
        self._check(turns, len(sizes))
        counts, none = [self._tiles_of(*size) for size in sizes], [0] * len(sizes)
        if asked:
            ids, used = self._ids(self._template(turns), none), len(sizes)
        else:
            ids, _, used = self._learned(turns, none)
        return len(ids) + self.tokens_per_tile * sum(counts[:used])

    def refused(self, turns: Turns, sizes: Sequence[tuple[int, int]], asked: bool = False) -> tuple[str, str] | None:
        """Why a conversation would be left out, reason and detail, found without its pictures; None where it is not."""
        try:
            found = self.length(turns, sizes, asked)
        except LayoutError as error:
            return error.reason, str(error).removeprefix(f"{error.reason}: ")
        return ("too long", f"{found} tokens for a context of {self.context}") if found > self.context else None

    def _tiles_of(self, height: int, width: int) -> int:
        """Tiles of a picture, its thumbnail included."""
        if not height or not width:
            found = self.max_tiles
        else:
            columns, rows = best_grid(width, height, self.image_size, self.min_tiles, self.max_tiles)
            found = columns * rows
        return found + (self.thumbnail and found > 1)

    def _learned(self, turns: Turns, counts: Sequence[int]) -> tuple[list[int], list[int], int]:
        """Tokens and labels of a conversation whose pictures have so many tiles, and how many pictures have tokens."""
        ids: list[int] = []
        labels: list[int] = []
        text, used = "", 0
        for number, (role, answer) in enumerate(turns):
            if role != "assistant":
                continue
            asked = self._template(turns[:number])
            if not asked.startswith(text) or not text:
                ids, labels, text, used = [], [], "", 0
            own_pictures = asked[len(text) :].count(MARK)
            new = self._ids(asked[len(text) :], counts[used : used + own_pictures])
            used += own_pictures
            learned = answer.removeprefix(THINK) if asked.endswith(THINK) else answer
            own = self._ids(learned, []) + [self.tokenizer.eos_token_id]
            ids, labels = ids + new + own, labels + [IGNORED] * len(new) + own
            text = asked + learned + self.tokenizer.eos_token
        if not ids:
            raise LayoutError("no answer", "the conversation has no turn of an assistant")
        return ids, labels, used

    def prompt(self, turns: Turns, pictures: Sequence[UInt8[Tensor, "3 _ _"]] = ()) -> Sample:
        """A conversation up to where the assistant's last answer begins; its own last answer, if any, is left out."""
        turns = turns[:-1] if turns and turns[-1][0] == "assistant" else turns
        turns, tiles, counts = self._with_pictures(turns, pictures)
        ids = self._ids(self._template(turns), counts)
        return self._checked(Sample(ids, [IGNORED] * len(ids), tiles))

    def _with_pictures(
        self, turns: Turns, pictures: Sequence[Tensor]
    ) -> tuple[list[tuple[str, str]], Tensor, list[int]]:
        """Turns that are clean, the tiles of all pictures, and how many each picture has."""
        self._check(turns, len(pictures))
        cut = [self.tiles(picture) for picture in pictures]
        none = torch.empty(0, 3, self.image_size, self.image_size)
        return list(turns), torch.cat([none, *cut]), [len(tiles) for tiles in cut]

    def _check(self, turns: Turns, pictures: int) -> None:
        """Refuses texts that are not clean, and marks that are not those of the pictures."""
        reserved = [t for t in self.tokenizer.all_special_tokens if any(t in text for _, text in turns)]
        if reserved:
            raise LayoutError("reserved token", f"a text holds {', '.join(reserved)}, which only the layout may place")
        if any(MARK in text for role, text in turns if role == "assistant"):
            raise LayoutError("picture in an answer", f"an answer holds {MARK}; pictures are for users to show")
        marks = sum(text.count(MARK) for _, text in turns)
        if marks != pictures:
            raise LayoutError("missing picture", f"{marks} marks {MARK} for {pictures} pictures")

    def tiles(self, picture: UInt8[Tensor, "3 _ _"]) -> Float[Tensor, "n 3 s s"]:
        """InternVL's dynamic tiling, normalised."""
        return tiles(picture, self.image_size, self.min_tiles, self.max_tiles, self.thumbnail)

    def _template(self, turns: Turns) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str, counts: Sequence[int]) -> list[int]:
        """Tokens of a text; each mark becomes the tokens of the next picture's tiles."""
        pieces = text.split(MARK)
        shown = [IMAGE_START + IMAGE * (self.tokens_per_tile * n) + IMAGE_END for n in counts]
        joined = "".join(piece + seen for piece, seen in zip(pieces, [*shown, ""], strict=True))
        return self.tokenizer(joined, add_special_tokens=False)["input_ids"]

    def _checked(self, sample: Sample) -> Sample:
        if len(sample) > self.context:
            raise LayoutError("too long", f"{len(sample)} tokens for a context of {self.context}")
        return sample


def last_question(turns: Turns) -> str:
    """What a user said last."""
    return next((text for role, text in reversed(turns) if role == "user"), "")


def grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """All (columns, rows) of that many tiles, fewest first, in the order that InternVL compares them in."""
    found = [
        (i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if min_tiles <= i * j <= max_tiles
    ]
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def best_grid(width: int, height: int, image_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """The grid of the nearest aspect ratio; of equal ones the largest that has at most twice the picture's area.

    >>> best_grid(800, 400, 448, 1, 12)
    (2, 1)
    """
    best, nearest = (1, 1), float("inf")
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        roomy = width * height > 0.5 * image_size**2 * columns * rows
        if distance < nearest or (distance == nearest and roomy):
            best, nearest = (columns, rows), distance
    return best


def tiles(
    picture: UInt8[Tensor, "3 _ _"], image_size: int, min_tiles: int, max_tiles: int, thumbnail: bool
) -> Float[Tensor, "n 3 s s"]:
    """InternVL's dynamic tiling: a picture stretched to its grid, cut in reading order, the whole of it last.

    Args:
        picture: 0 to 255.
        image_size: side of a tile in pixels.
        min_tiles, max_tiles: of the grid.
        thumbnail: whether a picture of several tiles is followed by itself at the size of one.

    Returns:
        Tiles with ImageNet's mean taken off, in units of its standard deviation.
    """
    height, width = picture.shape[1:]
    columns, rows = best_grid(width, height, image_size, min_tiles, max_tiles)
    fitted = resized(picture, rows * image_size, columns * image_size)
    cut = fitted.view(3, rows, image_size, columns, image_size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if thumbnail and len(cut) > 1:
        cut = torch.cat([cut, resized(picture, image_size, image_size)[None]])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (cut - mean) / std


def resized(picture: UInt8[Tensor, "3 _ _"], height: int, width: int) -> Float[Tensor, "3 _ _"]:
    """At a size, from 0 to 1; bytes are interpolated as bytes, which is what Pillow does."""
    if picture.shape[1:] != (height, width):
        picture = torch.nn.functional.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
    return picture.float() / 255


def pack(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Samples to rows of at most `context` tokens: each goes to the first row with room, the longest first.

    >>> pack([5, 9, 4], 10)
    [[1], [0, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((row for row, free in enumerate(room) if free >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(max(context, lengths[i]))
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def packed(samples: Sequence[Sample], context: int, pad: int) -> Rows:
    """Samples packed into rows of at most `context` tokens and padded on the right; no rows of none."""
    if not samples:
        nothing = torch.zeros(0, 0, dtype=torch.long)
        return Rows(nothing, nothing, nothing, torch.zeros(0), 0)
    rows = pack([len(sample) for sample in samples], context)
    width = max(sum(len(samples[i]) for i in row) for row in rows)
    shape = len(rows), width
    ids, mask, labels = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, members in enumerate(rows):
        at = 0
        for number, i in enumerate(members, start=1):
            end = at + len(samples[i])
            ids[row, at:end] = torch.tensor(samples[i].input_ids)
            labels[row, at:end] = torch.tensor(samples[i].labels)
            mask[row, at:end] = number
            at = end
    seen = torch.cat([samples[i].tiles for row in rows for i in row])
    return Rows(ids, mask, labels, seen, len(samples))


def prompts(samples: Sequence[Sample], pad: int) -> Rows:
    """Samples a row each, padded on the left, to generate from."""
    width = max(len(sample) for sample in samples)
    ids, mask = torch.full((len(samples), width), pad), torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, width - len(sample) :] = torch.tensor(sample.input_ids)
        mask[row, width - len(sample) :] = 1
    return Rows(ids, mask, torch.full_like(ids, IGNORED), torch.cat([s.tiles for s in samples]), len(samples))

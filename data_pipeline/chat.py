"""Conversations for training: which records, in which order, and what a batch of them holds."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline import parquet
from data_pipeline.chat_batches import ChatBatch
from data_pipeline.chat_plan import BUCKET, SET
from data_pipeline.dataset import Verify
from data_pipeline.errors import InputError
from data_pipeline.index import SCHEMA, TEXT_FIELDS, IndexedRecord, load_index, read_member, sidecars, view_member
from data_pipeline.plan import PHASE_EPOCHS, Draw, PlannedBatch
from data_pipeline.transforms import decode

logger = logging.getLogger(__name__)

MOST_UNSCORED = 0.5  # share of conversations without the score that they are chosen by


@dataclass(frozen=True)
class Chat:
    """A record as it lies in a shard, its text read."""

    record: IndexedRecord
    turns: tuple[tuple[str, str], ...]
    metadata: Mapping[str, Any]


def load_chats(folders: Sequence[str], minimum: Mapping[str, float], equal: Mapping[str, Any]) -> list[Chat]:
    """The conversations of folders of shards, in stored order, whose metadata pass; counts of what did not are logged.

    A score that was added to the index (`python -m data_pipeline score`) goes before one of its name in the record:
    what its scorer left null is no score.

    Args:
        folders: of shards.
        minimum: least value of a score by its name; a record without the score does not pass.
        equal: what fields of the metadata must be.
    """
    chats: list[Chat] = []
    left_out = Counter[str]()
    for folder in folders:
        scores = scores_of(Path(folder))
        for record in load_index(Path(folder)):
            if record.kind != SET:
                left_out[f"of the kind {record.kind}"] += 1
                continue
            try:
                facts = json.loads(read_member(record, "json"))
                readable = all(map(is_turn, facts["turns"]))
                metadata = {**(facts.get("metadata") or {}), **scores.get(record.sample_id, {})}
            except InputError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or no object of it, or no turns
                readable = False
            if not readable:
                left_out["unreadable"] += 1
                continue
            if reason := failing(metadata, minimum, equal):
                left_out[reason] += 1
                continue
            chats.append(Chat(record, tuple((role, text) for role, text in facts["turns"]), metadata))
    if left_out:
        logger.info("left out: %s", ", ".join(f"{n} {reason}" for reason, n in left_out.items()))
    if not chats:
        raise InputError(
            f"no conversation of {', '.join(folders)} can be trained on ({dict(left_out) or 'there is none'}); build "
            "shards as configs/data/reasoning.yaml does, score them as configs/data/grade_chains.yaml does, or loosen "
            "data.minimum and data.equal"
        )
    if minimum and not any("below" in reason for reason in left_out):
        logger.warning("data.minimum %s chooses nothing: all %d conversations reach it", dict(minimum), len(chats))
    return chats


def is_turn(turn: object) -> bool:
    """Whether this is a role and a text."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(each, str) for each in turn)


def scores_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Numbers and names that scorers have added to the indexes of a folder, by the record's id; null is None.

    What a column only repeats of the metadata, as steps.metadata.Metadata does, is left to the record itself.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in sidecars(folder):
        names = [field.name for field in parquet.schema(path) if is_score(field)]
        if not names:
            continue
        table = parquet.read(path, ["sample_id", "field", *names])
        table = table.filter(pc.is_in(table["field"], pa.array(TEXT_FIELDS))).drop(["field"])
        found |= {row.pop("sample_id"): row for row in table.to_pylist()}
    return found


def is_score(field: pa.Field) -> bool:
    """Whether a column of an index is a scorer's, and a number or a text."""
    added = field.name not in SCHEMA.names and (field.metadata or {}).get(b"scorer") != b"metadata"
    return added and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type) or field.type == pa.string())


def failing(metadata: Mapping[str, Any], minimum: Mapping[str, float], equal: Mapping[str, Any]) -> str:
    """Why a record does not pass; "" if it does."""
    for name, least in minimum.items():
        value = metadata.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"without a number {name}"
        if value < least:
            return f"with {name} below {least:g}"
    for name, wanted in equal.items():
        if metadata.get(name) != wanted:
            return f"whose {name} is not {wanted}"
    return ""


def parts(chats: Iterable[Chat], val_fraction: float) -> tuple[list[Chat], list[Chat]]:
    """Training and held-out conversations: by the records' own split, else by their ids."""
    train, val = list[Chat](), list[Chat]()
    for chat in chats:
        record = chat.record
        held = record.split == "val" or (not record.split and record.sample_id % 10_000 < val_fraction * 10_000)
        (val if held else train).append(chat)
    return train, val


class ChatDataset(Dataset[ChatBatch]):
    """Maps a planned batch to conversations with their pictures decoded.

    Args:
        chats: what is drawn from.
        verify: when the hash of each picture that is read is compared with the index.
    """

    def __init__(self, chats: Sequence[Chat], verify: Verify = "first_epoch") -> None:
        self.chats, self.verify = chats, verify

    def __getitem__(self, planned: PlannedBatch) -> ChatBatch:  # type: ignore[override]
        own = [(self.chats[draw.index], draw.epoch) for draw in planned.draws]
        checked = [
            self.verify == "always" or (self.verify == "first_epoch" and epoch % PHASE_EPOCHS == 0) for _, epoch in own
        ]
        return ChatBatch(
            keys=[chat.record.key for chat, _ in own],
            sample_ids=torch.tensor([chat.record.sample_id for chat, _ in own]),
            epochs=torch.tensor([epoch for _, epoch in own]),
            turns=[chat.turns for chat, _ in own],
            pictures=[pictures(chat.record, check) for (chat, _), check in zip(own, checked, strict=True)],
            metadata=[dict(chat.metadata) for chat, _ in own],
        )


def pictures(record: IndexedRecord, verify: bool = False) -> list[Tensor]:
    """A record's pictures in order, at their own size, (3, h, w) uint8."""
    names = shown(record)
    try:
        return [
            torch.from_numpy(np.array(decode(view_member(record, name, verify)))).permute(2, 0, 1).contiguous()
            for name in names
        ]
    except InputError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise InputError(
            f"{record.shard}: a picture of record {record.key} does not decode ({error}); build the shard again"
        ) from error


def shown(record: IndexedRecord) -> list[str]:
    """Names of a record's pictures, in order."""
    return [name for i in range(len(record.members)) if (name := f"image{i or ''}") in record.members]


def sizes(record: IndexedRecord) -> list[tuple[int, int]]:
    """Heights and widths of a record's pictures, in order; 0 where the index does not know them."""
    members = [record.members[name] for name in shown(record)]
    return [(member.height, member.width) for member in members]


def in_batches(chats: Sequence[Chat], size: int) -> Iterator[ChatBatch]:
    """All of these in their order."""
    dataset = ChatDataset(chats, "never")
    from_plan = plan_in_order(len(chats), size)
    yield from (dataset[planned] for planned in from_plan)


def plan_in_order(count: int, size: int) -> Iterator[PlannedBatch]:
    """Batches of the numbers from 0, the last one smaller."""
    for start in range(0, count, size):
        yield PlannedBatch(tuple(Draw((SET, BUCKET), i, 0) for i in range(start, min(start + size, count))))


def chosen(chats: Sequence[Chat], score: str, threshold: float, wrong: Collection[int]) -> list[Chat]:
    """R1V's D_t: those whose score reaches the threshold, united with those that the last model got wrong.

    Args:
        chats: D.
        score: name of the judge's score in the metadata.
        threshold: tau_t.
        wrong: ids of E_{t-1}.
    """
    scored = [chat for chat in chats if type(chat.metadata.get(score)) in (int, float)]
    if lacking := len(chats) - len(scored):
        notes = Counter(str(note) for chat in chats if (note := chat.metadata.get(f"{score}_note")))
        why = f" (such as: {notes.most_common(1)[0][0][:120]})" if notes else ""
        text = f"{lacking} of {len(chats)} conversations have no number {score}{why}"
        if lacking > MOST_UNSCORED * len(chats):
            raise InputError(f"{text}; score the data first: configs/data/grade_chains.yaml")
        logger.warning("%s: of these only what was answered wrongly is trained on", text)
    found = [chat for chat in chats if chat.record.sample_id in wrong or reaches(chat, score, threshold)]
    if len(found) == len(chats):
        least = min(chat.metadata[score] for chat in scored)
        logger.warning(
            "the %s of %g chooses nothing: all %d conversations are trained on, the least %s is %g and %d were "
            "answered wrongly", score, threshold, len(chats), score, least, len(wrong),
        )  # fmt: skip
    return found


def reaches(chat: Chat, score: str, threshold: float) -> bool:
    """Whether a conversation has a score, and one that is high enough."""
    value: Any = chat.metadata.get(score)
    return type(value) in (int, float) and bool(value >= threshold)

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
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.chat_batches import ChatBatch
from data_pipeline.dataset import Verify
from data_pipeline.errors import InputError
from data_pipeline.index import IndexedRecord, load_index, read_member, view_member
from data_pipeline.plan import PHASE_EPOCHS, Bucket, Draw, Plan, PlannedBatch
from data_pipeline.transforms import decode

logger = logging.getLogger(__name__)

SET = "reasoning"
BUCKET: Bucket = ((0, 0),)  # conversations have no shape: all are of one bucket


@dataclass(frozen=True)
class Chat:
    """A record as it lies in a shard, its text read."""

    record: IndexedRecord
    turns: tuple[tuple[str, str], ...]
    metadata: Mapping[str, Any]


def load_chats(folders: Sequence[str], minimum: Mapping[str, float], equal: Mapping[str, Any]) -> list[Chat]:
    """The conversations of folders of shards, in stored order, whose metadata pass; counts of what did not are logged.

    Args:
        folders: of shards.
        minimum: least value of a score by its name in the metadata; a record without the score does not pass.
        equal: what fields of the metadata must be.
    """
    chats: list[Chat] = []
    left_out = Counter[str]()
    for folder in folders:
        for record in load_index(Path(folder)):
            if record.kind != SET:
                left_out[f"of the kind {record.kind}"] += 1
                continue
            facts = json.loads(read_member(record, "json"))
            metadata = facts.get("metadata") or {}
            if reason := failing(metadata, minimum, equal):
                left_out[reason] += 1
                continue
            chats.append(Chat(record, tuple((role, text) for role, text in facts["turns"]), metadata))
    if left_out:
        logger.info("left out: %s", ", ".join(f"{n} {reason}" for reason, n in left_out.items()))
    if not chats:
        raise InputError(
            f"no conversation of {', '.join(folders)} can be trained on ({dict(left_out) or 'there is none'}); build "
            "shards as configs/data/reasoning.yaml does, or loosen data.minimum and data.equal"
        )
    return chats


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


def plan(count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Plan:
    """The order of conversations: a keyed permutation an epoch."""
    return Plan({(SET, BUCKET): count}, {SET: 1}, lambda bucket: batch_size, seed, rank, world_size)


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
    names = [f"image{i or ''}" for i in range(len(record.members)) if f"image{i or ''}" in record.members]
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
    lacking = sum(type(chat.metadata.get(score)) not in (int, float) for chat in chats)
    if lacking:
        raise InputError(f"{lacking} of {len(chats)} conversations have no number {score}; score the data first")
    return [chat for chat in chats if chat.metadata[score] >= threshold or chat.record.sample_id in wrong]

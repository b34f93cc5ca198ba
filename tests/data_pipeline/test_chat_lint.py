"""What a dry run says of conversations is what training would say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro_r1v import micro_r1v

from data_pipeline import chat, chat_lint
from data_pipeline.chat import load_chats, pictures
from data_pipeline.chat_lint import fault, faults
from data_pipeline.errors import InputError
from data_pipeline.shards import write_shard
from data_pipeline.sources import SceneQuestions
from lightning_modules.networks.layout import Layout, LayoutError

SAYS = ("assistant", "two")
BAD = {
    "missing picture": ([["user", "<image><image>how many?"], [*SAYS]], 1),
    "picture in an answer": ([["user", "how many?"], ["assistant", "<image>"]], 1),
    "no answer": ([["user", "<image>how many?"]], 1),
    "no picture": ([["user", "how many?"], [*SAYS]], 0),
}


@pytest.mark.parametrize("reason", BAD)
def test_the_layout_refuses_for_the_same_reason(reason: str) -> None:
    turns, shown = BAD[reason]
    said = [(role, text) for role, text in turns]
    assert [each for each, _ in fault(turns, shown, True)] == [reason]
    if reason == "no picture":
        return  # the layout takes it; a projector alone learns nothing from it
    with pytest.raises(LayoutError) as error:
        Layout.of(micro_r1v()).sample(said, [torch.zeros(3, 64, 64, dtype=torch.uint8)] * shown)
    assert error.value.reason == reason


def test_what_is_sound_has_no_fault() -> None:
    assert not list(fault([["system", "be brief"], ["user", "<image>how many?"], [*SAYS]], 1, True))
    assert [reason for reason, _ in fault("hello", 0)] == ["no turns"]
    assert [reason for reason, _ in fault([["user", "a"], ["tool", "b"], ["assistant", " "]], 0)] == [
        "unknown role", "empty answer"
    ]  # fmt: skip


def test_what_is_asked_needs_no_answer() -> None:
    assert not list(fault([["user", "<image>how many?"]], 1, True, asked=True))
    assert not list(fault([["user", "how many?"], ["assistant", "<image>"]], 0, asked=True))  # it is left out
    assert [reason for reason, _ in fault([["user", "<image>how many?"]], 0, asked=True)] == ["missing picture"]


def test_a_turn_that_is_no_text_is_named() -> None:
    assert [reason for reason, _ in fault([["user", 5], [*SAYS]], 0)] == ["no turns"]


@pytest.mark.parametrize("text", ["{half", "[1, 2]", '{"metadata": [1]}'])
def test_a_record_that_is_no_object_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chat, chat_lint):
        monkeypatch.setattr(module, "read_member", lambda record, name: text)
    folder = damaged(tmp_path / "shards")
    (line,) = faults(folder)
    assert line.startswith("8 of 8 conversations: unreadable, such as ")
    with pytest.raises(InputError, match="'unreadable': 8"):  # and none is trained on
        load_chats([str(folder)], {}, {})


def damaged(folder: Path) -> Path:
    """Eight conversations: one shows nothing where it says so, one has no right answer, two no score."""
    source = SceneQuestions(1, {"chain": 8})
    records = [source.record("chain", i, "train") for i in range(8)]
    records[1] = replace(records[1], pictures=())
    records[2] = replace(records[2], metadata={**records[2].metadata, "answer": ""})
    for i in (3, 4):
        records[i] = replace(records[i], metadata={k: v for k, v in records[i].metadata.items() if k != "score"})
    folder.mkdir()
    write_shard(folder / "000000-a.tar", ((record, {}) for record in records))
    return folder


def test_each_reason_is_named_and_counted(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "shards")
    assert len([c for c in load_chats([str(folder)], {}, {}) if not pictures(c.record)]) == 1
    found = list(faults(folder, ["score"], ["answer"], True))
    assert [line.partition(", such as ")[0] for line in found] == [
        "1 of 8 conversations: missing picture",
        "1 of 8 conversations: without answer",
        "2 of 8 conversations: without a number score",
    ]
    assert "chain-0000001 (1 marks <image> for 0 pictures)" in found[0]
    assert list(faults(folder)) == found[:1]

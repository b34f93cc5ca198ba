from __future__ import annotations

from pathlib import Path

import pytest
import torch
from micro import micro_shards
from micro_r1v import question_shards

from data_pipeline.chat import chosen, load_chats, parts
from data_pipeline.chat_batches import ChatBatch
from data_pipeline.chat_datamodule import ChatDataModule, QuestionShards
from data_pipeline.errors import InputError


def served(folder: Path, **settings: object) -> ChatDataModule:
    data = ChatDataModule([str(folder)], **{"batch_size": 5, "steps": 10, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return question_shards(tmp_path_factory.mktemp("chat") / "shards", flawed=0.5)


def test_a_batch_holds_conversations_with_their_pictures(folder: Path) -> None:
    batch = next(iter(served(folder).train_dataloader()))
    assert isinstance(batch, ChatBatch) and len(batch) == 5
    assert [len(own) for own in batch.pictures] == [1] * 5
    assert all(own[0].shape == (3, 64, 64) and own[0].dtype == torch.uint8 for own in batch.pictures)
    assert all(turns[0][0] == "user" and turns[0][1].startswith("<image>\n") for turns in batch.turns)
    assert all(facts["answer"] for facts in batch.metadata)


def test_words_alone_have_no_pictures(tmp_path: Path) -> None:
    batch = next(iter(served(question_shards(tmp_path / "shards", words=True)).train_dataloader()))
    assert batch.pictures == [[]] * 5


def test_validation_asks_of_every_style(tmp_path: Path) -> None:
    folder = question_shards(tmp_path / "shards", counts={"describe": 160, "short": 160})
    data = served(folder, batch_size=4, val_batches=2)
    batches = list(data.val_dataloader())
    styles = [facts["style"] for batch in batches for facts in batch.metadata]
    assert len(data.val) == 20 and styles == ["describe"] * 4 + ["short"] * 4
    assert all(("answer" in facts) == (facts["style"] == "short") for batch in batches for facts in batch.metadata)
    assert len(list(served(folder, val_batches=50).val_dataloader())) == 4
    assert not list(served(folder, val_batches=0).val_dataloader())


def test_an_epoch_holds_every_conversation_once_and_workers_change_nothing(folder: Path) -> None:
    plain, other = (list(served(folder, num_workers=n).train_dataloader()) for n in (0, 1))
    ids = [i for batch in plain for i in batch.sample_ids.tolist()]
    assert len(ids) == 50 and len(set(ids[:46])) == 46  # the next epoch fills the last batch
    assert ids == [i for batch in other for i in batch.sample_ids.tolist()]


def test_what_was_trained_on_does_not_come_again_after_a_resume(folder: Path) -> None:
    first = served(folder)
    whole = [batch.keys for batch in first.train_dataloader()]
    for _ in range(4):
        first.consumed.advance()
    state = first.state_dict()
    data = served(folder)
    data.load_state_dict(state)
    assert data.state_dict() == state
    assert [batch.keys for batch in data.train_dataloader()][:6] == whole[4:]
    larger = served(folder, batch_size=10)
    larger.load_state_dict(state)
    assert next(iter(larger.train_dataloader())).keys == [*whole[4], *whole[5]]
    with pytest.raises(InputError, match=r"trained on 12 conversations.*now 46"):
        served(folder).load_state_dict({**state, "total": 12})


def test_scores_and_facts_choose_what_is_trained_on(folder: Path) -> None:
    chats = load_chats([str(folder)], {"score": 4}, {"style": "chain"})
    assert 0 < len(chats) < 24
    assert all(chat.metadata["score"] >= 4 and chat.metadata["style"] == "chain" for chat in chats)
    with pytest.raises(InputError, match="without a number quality"):
        load_chats([str(folder)], {"quality": 4}, {})
    with pytest.raises(InputError, match="whose style is not steps"):
        load_chats([str(folder)], {}, {"style": "steps"})


def test_an_iteration_takes_what_scores_enough_and_what_was_answered_wrongly(folder: Path) -> None:
    train, val = parts(load_chats([str(folder)], {}, {}), 0.02)
    assert len(train) == 46 and len(val) == 2  # one of each style is marked as held out
    low = [chat for chat in train if chat.metadata["score"] < 3]
    wrong = {low[0].record.sample_id}
    found = chosen(train, "score", 3, wrong)
    assert len(found) == len(train) - len(low) + 1 and low[0] in found
    with pytest.raises(InputError, match="no number quality"):
        chosen(train, "quality", 3, wrong)
    data = served(folder)
    data.wrong = sorted(wrong)
    data.narrow("score", 3)
    assert len(data.train) == len(found)


def test_folders_without_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of the kind text_image"):
        served(micro_shards(tmp_path / "shards", 4, 4))
    with pytest.raises(InputError, match=r"set data\.shards"):
        ChatDataModule()


def test_missing_shards_of_questions_are_built(tmp_path: Path) -> None:
    shards = QuestionShards(counts={"short": 16}, root=str(tmp_path))
    data = ChatDataModule(scenes=shards, batch_size=4, steps=2)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train) == 15 and len(data.val) == 1
    changed = QuestionShards(counts={"short": 17}, root=str(tmp_path))
    assert changed.folder() != shards.folder()

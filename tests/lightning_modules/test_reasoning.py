from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from chains import grpo
from micro_r1v import part, question_shards
from safetensors.torch import load_file

from callbacks import Export
from data_pipeline.chat import in_batches, load_chats, pictures
from data_pipeline.chat_batches import ChatBatch
from data_pipeline.chat_datamodule import ChatDataModule
from data_pipeline.errors import InputError
from lightning_modules.losses.tokens import token_weights
from lightning_modules.networks.layout import Rows, packed
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.reasoning import WINDOW, Iteration, R1VModule
from lightning_modules.rewards.answers import Accuracy
from lightning_modules.schedule import AdamW

FAST = AdamW(lr=3e-3, warmup_steps=0, weight_decay=0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(question_shards(tmp_path_factory.mktemp("chat") / "shards", flawed=0.5))


def module(**changes: object) -> R1VModule:
    settings = {"vision": str(part("tower")), "language": str(part("reasoner")), "context": 256, "max_tiles": 1}
    return R1VModule(**{**settings, "optimizer": FAST, "steps": 4, **changes})


def data(shards: str, steps: int = 4, **changes: object) -> ChatDataModule:
    return ChatDataModule([shards], **{"batch_size": 4, "steps": steps, "val_batches": 1, **changes})


def trainer(root: Path, steps: int, **changes: object) -> L.Trainer:
    options = {"accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "logger": False, "default_root_dir": root}
    options |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{**options, "limit_val_batches": 0, **changes})


def test_only_the_projector_moves_and_words_are_answered_as_before(shards: str, tmp_path: Path) -> None:
    trained = module()
    run = trainer(tmp_path, 4, callbacks=[Export()])
    run.fit(trained, datamodule=data(shards))
    before = R1VModel.from_parts(part("tower"), part("reasoner"), seed=0)
    for name in ("vision", "language"):
        old, new = (getattr(m, name).state_dict() for m in (before, trained.model))
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert {n for n, _ in trained.trainable_parameters()} == {
        f"model.projector.{n}.{k}" for n in "013" for k in ("weight", "bias")
    }
    assert not torch.equal(before.projector[1].weight, trained.model.projector[1].weight)
    ids = torch.randint(20, 250, (1, 9))
    assert torch.equal(before(ids, torch.ones_like(ids)), trained.model(ids, torch.ones_like(ids)))
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(exported["mlp1.1.weight"], trained.model.projector[1].weight)
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert len(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == 6


def test_a_loss_is_the_likelihood_of_the_answers_alone(shards: str) -> None:
    own = module()
    own.configure_model()
    served = data(shards)
    served.setup("fit")
    batch = next(iter(served.train_dataloader()))
    rows = own.rows(batch)
    found, count = own.loss(rows)
    logits = own.model(rows.input_ids, rows.attention_mask, own.model.image_features(rows.tiles)).log_softmax(-1)
    nll = [
        -logits[b, t - 1, rows.labels[b, t]]
        for b in range(len(rows.labels))
        for t in range(rows.labels.shape[1])
        if rows.labels[b, t] != -100
    ]
    assert len(nll) == count
    assert torch.allclose(found, torch.stack(nll).mean(), atol=1e-5)


def test_interrupted_training_goes_on_bit_for_bit(shards: str, tmp_path: Path) -> None:
    whole = module()
    trainer(tmp_path, 4).fit(whole, datamodule=data(shards))
    first = module()
    run = trainer(tmp_path, 2)
    run.fit(first, datamodule=data(shards))
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = module()
    trainer(tmp_path, 4).fit(second, datamodule=data(shards), ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.model.projector.state_dict().items():
        assert torch.equal(tensor, second.model.projector.state_dict()[name])


def test_an_iteration_trains_on_good_records_and_on_errors_and_resumes_with_the_same(
    shards: str, tmp_path: Path
) -> None:
    settings = Iteration(Accuracy(), threshold=5.0, max_new_tokens=4)
    first, served = module(iteration=settings), data(shards)
    run = trainer(tmp_path, 2)
    run.fit(first, datamodule=served)
    # Barely trained, it answers nothing rightly: all are errors.
    assert len(served.wrong) == 46 and len(served.train) == 46
    run.save_checkpoint(tmp_path / "half.ckpt")
    second, again = module(iteration=settings), data(shards)
    second.errors = lambda chats: pytest.fail("errors were looked for anew")  # type: ignore[method-assign]
    trainer(tmp_path, 4).fit(second, datamodule=again, ckpt_path=tmp_path / "half.ckpt")
    assert again.wrong == served.wrong
    right = module(iteration=settings)
    right.errors = lambda chats: []  # type: ignore[method-assign]
    few = data(shards)
    trainer(tmp_path, 1).fit(right, datamodule=few)
    assert 0 < len(few.train) < 46 and all(chat.metadata["score"] == 5 for chat in few.train)


def test_errors_are_what_the_verifier_finds_wrong(shards: str, tmp_path: Path) -> None:
    class Known:
        """Right, unknown and wrong in turn."""

        def score(self, texts: list, requests: list) -> list[float | None]:
            return [(1.0, None, 0.0)[i % 3] for i in range(len(texts))]

    own = module(iteration=Iteration(Known(), max_new_tokens=2, samples=9))
    own.configure_model()
    run = trainer(tmp_path, 1)
    own.trainer = run
    chats = load_chats([shards], {}, {})[:9]
    assert own.errors(chats) == sorted(chat.record.sample_id for chat in chats[2::3])


def test_what_cannot_be_asked_is_no_error_and_stops_no_validation(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        """All are wrong."""

        def score(self, texts: list, requests: list) -> list[float | None]:
            assert all(request.prompt for request in requests)
            return [0.0] * len(texts)

    own = module(iteration=Iteration(Wrong(), max_new_tokens=2, samples=9))
    own.configure_model()
    own.trainer = trainer(tmp_path, 1)
    chats = load_chats([shards], {}, {})[:4]
    (role, question), answer = chats[1].turns
    bare = replace(chats[0], record=replace(chats[0].record, members={}))
    told = replace(chats[1], turns=(("system", "be brief."), (role, question), answer, (role, "sure?"), answer))
    long = replace(chats[2], turns=((role, question + " why?" * 300), answer))
    ids = [chat.record.sample_id for chat in (told, chats[3])]
    assert own.errors([bare, told, long, chats[3]]) == sorted(ids)
    assert own.left_out == {"missing picture": 1, "too long": 1}
    assert "2 of 4 conversations were not verified" in caplog.text
    with pytest.raises(InputError, match=r"2 of 3 conversations were not verified.*missing picture"):
        own.errors([bare, long, told])
    own.left_out.clear()
    batch = next(in_batches([bare, told, chats[3]], 3))
    logged: dict[str, float] = {}
    own.log = lambda name, value, **_: logged.update({name: float(torch.as_tensor(value).detach())})
    own.eval().validation_step(batch, 0)
    assert {"val/loss", "val/accuracy"} <= set(logged)


def test_batches_of_tokens_fill_rows_and_resume_bit_for_bit(shards: str, tmp_path: Path) -> None:
    """Rows are full to the context, one a batch; a run that was stopped goes on with the very same ones."""
    seen: list[tuple[int, int]] = []

    class Watched(R1VModule):
        def rows(self, batch: ChatBatch) -> Rows:
            found = super().rows(batch)
            seen.append((len(found.input_ids), found.samples))
            return found

    def made() -> R1VModule:
        return Watched(str(part("tower")), str(part("reasoner")), context=256, max_tiles=1, optimizer=FAST, steps=4)

    whole, served = made(), data(shards, batch_tokens=256)
    trainer(tmp_path, 4).fit(whole, datamodule=served)
    assert {rows for rows, _ in seen} == {1} and sum(samples for _, samples in seen) > 4 * 2
    samples = [whole.layout.sample(chat.turns, pictures(chat.record)) for chat in served.train]
    assert served.lengths == [len(sample) for sample in samples]
    first = made()
    run = trainer(tmp_path, 2)
    run.fit(first, datamodule=data(shards, batch_tokens=256))
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = made()
    trainer(tmp_path, 4).fit(second, datamodule=data(shards, batch_tokens=256), ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.model.projector.state_dict().items():
        assert torch.equal(tensor, second.model.projector.state_dict()[name])
    narrow = module(context=28)
    narrow.configure_model()
    assert [narrow.tokens_of(chat) for chat in served.train] == [n if n <= 28 else 0 for n in served.lengths]


def test_devices_share_the_measuring_and_the_looking_for_errors(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, one after the other; what one gathers is what both found."""
    own = module(iteration=Iteration(Accuracy(), max_new_tokens=2, samples=9))
    own.configure_model()
    own.trainer = trainer(tmp_path, 1)
    chats = load_chats([shards], {}, {})[:7]
    whole = own.lengths(chats), own.errors(chats)
    assert len(set(whole[0])) > 1 and len(whole[1]) == 7
    told: list[object] = []

    def gathered(found: list, mine: object) -> None:
        told.append(mine)
        found[:] = [told[0], told[-1]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    for work, expected in zip((own.lengths, own.errors), whole, strict=True):
        told.clear()
        for rank in range(2):
            own._trainer = SimpleNamespace(global_rank=rank, world_size=2)
            last = work(chats)
        assert last == expected


def test_questions_are_not_measured(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.batch_tokens is for stages that measure"):
        trainer(tmp_path, 1).fit(grpo(), datamodule=data(shards, batch_tokens=256))


def test_what_has_no_answer_is_no_error(shards: str, tmp_path: Path) -> None:
    own = module(iteration=Iteration(Accuracy(), max_new_tokens=2, samples=9))
    own.configure_model()
    own.trainer = trainer(tmp_path, 1)
    assert own.wanted() == (("score",), ("answer",), True) and module().wanted() == ((), (), True)
    chats = load_chats([shards], {}, {})[:3]
    unknown = replace(chats[0], metadata={})
    assert own.errors([unknown, *chats[1:]]) == sorted(chat.record.sample_id for chat in chats[1:])


@pytest.mark.parametrize("normalisation", ["token", "sample", "square"])
def test_devices_learn_together_what_one_does(normalisation: str, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them has nothing to learn from."""
    own = module(normalisation=normalisation)
    own.configure_model()
    samples = own.samples(next(in_batches(load_chats([shards], {}, {}), 4)))
    rows = [packed(part, 400, own.model.pad_token) for part in (samples[:1], samples[1:], [])]
    totals = [token_weights(r.labels, r.attention_mask, normalisation)[1] for r in rows[:2]] + [torch.zeros(())]
    whole, _ = own.loss(packed(samples, 400, own.model.pad_token))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(own, "all_gather", lambda _: torch.stack(totals))
    devices = [own.train().loss(r)[0] for r in rows]
    assert devices[2] == 0 and devices[2].requires_grad
    assert torch.stack(devices).mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_words_alone_teach_a_projector_nothing_and_are_left_out(shards: str) -> None:
    own = module()
    own.configure_model()
    batch = next(in_batches(load_chats([shards], {}, {}), 4))
    batch.turns[0], batch.pictures[0] = (("user", "how many?"), ("assistant", "two")), []
    assert own.rows(batch).samples == 3 and own.left_out == {"no picture": 1}
    every = module(train=["projector", "language"])
    every.configure_model()
    assert every.rows(batch).samples == 4 and not every.left_out


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_recomputed_where_that_is_asked_for(recomputed: bool, shards: str, tmp_path: Path) -> None:
    own = module(gradient_checkpointing=recomputed)
    own.configure_model()
    calls: list[bool] = []
    own.model.language.model.layers[0].mlp.register_forward_pre_hook(lambda layer, _: calls.append(layer.training))
    modes = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer(tmp_path, 1).fit(own, datamodule=data(shards))
    assert calls == ([True, True] if recomputed else [False])
    trainer(tmp_path, 2, **modes).fit(own, datamodule=data(shards))
    assert sum(calls) == (2 + 2 * 2 if recomputed else 0)  # and not while it answers
    assert not any(part.training for part in own.model.modules())


def test_conversations_that_do_not_fit_are_counted_and_never_trained_on(shards: str) -> None:
    own = module(context=28)
    own.configure_model()
    served = data(shards, equal={"style": "chain"})
    served.setup("fit")
    batch = next(iter(served.train_dataloader()))
    few = [own.rows(batch).samples for _ in range(WINDOW // len(batch) - 1)]  # one of them alone ends no run
    assert len(set(few)) == 1 and few[0] < 2
    with pytest.raises(InputError, match=r"of 64 conversations in a row cannot be trained on \(\{'too long'"):
        own.rows(batch)
    batch.pictures[0] = []
    roomy = module(context=400)
    roomy.configure_model()
    assert roomy.rows(batch).samples == 3
    assert roomy.left_out == {"missing picture": 1}


def test_validation_answers_held_out_questions(shards: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None)
    run.fit(module(val_tokens=3), datamodule=data(shards))
    assert {"val/loss", "val/accuracy", "val/length"} <= set(run.callback_metrics)
    assert run.callback_metrics["val/length"] <= 3
    with pytest.raises(InputError, match="val_tokens is 0"):
        module(val_tokens=0)
    with pytest.raises(InputError, match="train is empty"):
        module(train=[])

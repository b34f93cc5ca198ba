"""Reinforcement of answers on a micro R1V: what it samples, keeps, learns from, and how it goes on after a stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chains import SAMPLING, Vowels, asked, grpo
from rl import SaveAfter, trained

from data_pipeline.errors import InputError
from lightning_modules.networks.layout import Sample
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.pipelines.answering import Decoding, TransformersEngine
from lightning_modules.planning import Plan, Run
from lightning_modules.reasoning_grpo import PATIENCE, ReasoningGrpoModule
from lightning_modules.rewards.answers import Accuracy
from lightning_modules.rewards.protocol import Request
from lightning_modules.rollouts.chain_algorithms import MixedPreference, TokenGRPO
from lightning_modules.rollouts.chain_settings import Overlong, WeightedText
from lightning_modules.rollouts.sample_buffer import SampleBuffer

TOLERANCE = 1e-5  # of the first ratio: the answers are padded with others when they are sampled than when learned from


def watched(module: ReasoningGrpoModule) -> dict[str, list[float]]:
    """What is logged."""
    seen: dict[str, list[float]] = {}
    module.log = lambda name, value, **_: seen.setdefault(name, []).append(float(value))
    return seen


def test_the_first_ratio_is_one_and_moves_with_further_updates(tmp_path: Path) -> None:
    module = grpo(sampling=replace(SAMPLING, groups=4, updates=2))
    seen = watched(module)
    trained(module, [asked(i) for i in range(4)], 4, tmp_path)
    assert len(seen["train/ratio_off"]) == 4
    first, second = seen["train/ratio_off"][0::2], seen["train/ratio_off"][1::2]
    assert max(first) < TOLERANCE
    assert min(second) > 10 * TOLERANCE
    assert seen["train/age"] == [0.0, 1.0, 0.0, 1.0]


def test_only_the_projector_learns(tmp_path: Path) -> None:
    module = grpo()
    module.configure_model()
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    trained(module, [asked(i) for i in range(3)], 3, tmp_path)
    for name, p in module.model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("projector"), name


def test_learning_raises_the_reward(tmp_path: Path) -> None:
    """All parts: what the projector of a barely trained model can change is little."""
    sampling = replace(SAMPLING, group_size=8, micro_answers=8)
    module = grpo(sampling=sampling, steps=40, train=["projector", "language"])
    seen = watched(module)
    trained(module, [asked(i) for i in range(40)], 40, tmp_path)
    first, last = torch.tensor(seen["reward/vowels"][:12]), torch.tensor(seen["reward/vowels"][-12:])
    assert last.mean() > first.mean() + 2 * (first.std() + last.std()) / 12**0.5


@pytest.mark.parametrize(
    "algorithm", [TokenGRPO(kl=0.1), MixedPreference(cut_off=True)], ids=lambda a: type(a).__name__
)
def test_the_reference_is_what_training_began_with(algorithm, tmp_path: Path) -> None:
    module = grpo(algorithm=algorithm)
    seen = watched(module)
    trained(module, [asked(i) for i in range(3)], 3, tmp_path)
    if isinstance(algorithm, TokenGRPO):
        assert abs(seen["train/kl"][0]) < TOLERANCE < seen["train/kl"][-1]
    else:
        assert seen["train/dpo"][0] == pytest.approx(0.6931, abs=1e-4)


def test_the_buffer_fills_updates_up(tmp_path: Path) -> None:
    module = grpo(buffer=SampleBuffer(share=0.5, max_age=4))
    seen = watched(module)
    trained(module, [asked(i) for i in range(4)], 4, tmp_path)
    assert seen["train/age"][0] == 0 and min(seen["train/age"][1:]) > 0
    assert seen["train/ratio_off"][0] < TOLERANCE < min(seen["train/ratio_off"][1:])


def test_pairs_and_a_buffer_of_single_answers_do_not_go_together() -> None:
    with pytest.raises(InputError, match="pairs"):
        grpo(algorithm=MixedPreference(), buffer=SampleBuffer())


def test_training_goes_on_exactly_where_it_stopped_within_an_iteration(tmp_path: Path) -> None:
    """Stopped after three batches of two groups, of which an iteration takes four."""

    def module() -> ReasoningGrpoModule:
        sampling = replace(SAMPLING, groups=4, updates=2)
        return grpo(sampling=sampling, buffer=SampleBuffer(share=0.25), algorithm=TokenGRPO(kl=0.1))

    batches = [asked(i) for i in range(16)]  # more than are needed where every group teaches something
    whole, part, rest = module(), module(), module()
    trained(whole, batches, 8, tmp_path)
    trained(part, batches[:3], 4, tmp_path, [SaveAfter(3, tmp_path / "stop.ckpt")])
    saved = torch.load(tmp_path / "stop.ckpt", weights_only=True)["grpo"]
    (own,) = saved["devices"]
    assert len(own["waiting"]) == 2 and own["buffer"] and (saved["updates"], own["asked"], own["idle"]) == (2, 24, 0)
    trained(rest, batches[3:], 8, tmp_path, resume=tmp_path / "stop.ckpt")
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(rest.named_parameters())[name]), name
    assert (rest.updates, rest.asked) == (whole.updates, whole.asked)


def test_a_reward_that_never_tells_answers_apart_ends_the_run(tmp_path: Path) -> None:
    class Flat:
        def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
            return [0.0] * len(texts)

    module = grpo(Flat(), sampling=replace(SAMPLING, max_new_tokens=1))
    with pytest.raises(InputError, match="taught nothing"):
        trained(module, [asked(i, 1) for i in range(PATIENCE + 1)], 2, tmp_path)


def test_questions_that_are_mostly_left_out_end_a_run(tmp_path: Path) -> None:
    """None can be asked here; half of them may be lost for ever, and any number now and then."""
    batches = [asked(i) for i in range(PATIENCE)]
    for batch in batches:
        batch.pictures = [[], []]
    with pytest.raises(InputError, match=r"most questions were left out \(\{'missing picture': 100\} so far\)"):
        trained(grpo(), batches, 1, tmp_path)
    module = grpo()
    for _ in range(2 * PATIENCE):
        module.bound(4, 2)
    for lost in [3, 4] * (PATIENCE // 2 - 1) + [3, 0] + [4] * (PATIENCE - 1):
        module.bound(4, 4 - lost)
    with pytest.raises(InputError, match="most questions"):
        module.bound(4, 1)


def test_answers_that_are_never_scored_end_a_run_by_the_name_of_the_failure(tmp_path: Path) -> None:
    """The records' own answers cannot be read: no answer is worth nothing, and the run does not go on for ever."""
    module = grpo(Accuracy(), sampling=replace(SAMPLING, max_new_tokens=1, group_size=2))
    seen = watched(module)
    batches = [asked(i, 1) for i in range(PATIENCE)]
    for batch in batches:
        batch.metadata = [{"answer": "twelve", "answer_kind": "number"} for _ in batch.keys]
    with pytest.raises(InputError, match=r"answers got no score \(\{'truth': 100\} so far\)"):
        trained(module, batches, 2, tmp_path)
    assert set(seen["answers/unscored"]) == {1.0} and "reward/mean" not in seen


def test_questions_without_what_rewards_compare_with_are_left_out(tmp_path: Path) -> None:
    module = grpo(Accuracy())
    seen = watched(module)
    module.configure_model()
    batch = asked(0, 4)
    batch.metadata[1], batch.metadata[2] = {}, {"answer": ""}
    assert [q.key for q in module.questions(batch)] == ["k0-0", "k0-3"] and module.left_out == {"no answer": 2}
    assert seen["answers/questions_left_out"] == [0.5] and module.wanted() == ((), ("answer",), True)


@pytest.mark.parametrize(
    ("groups", "devices", "updates", "near"),
    [(6, 4, 1, "4 or 8"), (12, 4, 2, "8 or 16"), (2, 8, 1, "take 8"), (16, 8, 2, ""), (8, 4, 2, "")],
)
def test_groups_that_devices_cannot_share_are_refused_with_what_would_do(
    groups: int, devices: int, updates: int, near: str
) -> None:
    """Before anything is loaded by plan, and by fit before anything is sampled."""
    module = grpo(sampling=replace(SAMPLING, groups=groups, updates=updates))
    run = Run(module, {"devices": devices}, 0, {"conversations": 1.0}, 2, None, 1, ema=False, keep=2)
    module.snapshots = SimpleNamespace(to=lambda device: None)
    module._trainer = SimpleNamespace(world_size=devices)
    for done in (lambda: Plan(run), module.on_fit_start):
        if not near:
            done()
            continue
        with pytest.raises(InputError, match=rf"groups {groups} must be a multiple.*{near}$"):
            done()


def test_a_failed_reward_is_no_zero(tmp_path: Path) -> None:
    class Failing(Vowels):
        def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
            found = super().score(texts, requests)
            return [None, *found[1:]] if requests[0].metadata["answer"] == "fails" else found

    module = grpo(Failing())
    seen = watched(module)
    batches = [asked(i) for i in range(3)]
    batches[0].metadata[0]["answer"] = "fails"
    trained(module, batches, 1, tmp_path)
    assert seen["answers/unscored"][0] == 0.5
    assert len(module.waiting) + module.updates * SAMPLING.groups <= 5


def test_what_cannot_be_asked_is_left_out_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = grpo()
    seen = watched(module)
    batch = asked(0, 4)
    batch.pictures[1] = []  # a record without its image
    batch.turns[2] = (("user", "<image>" + "how many? " * 100), ("assistant", "two"))  # longer than the context
    batch.turns[3], batch.pictures[3] = (("user", "how many?"), ("assistant", "two")), []  # nothing for a projector
    with caplog.at_level(logging.WARNING):
        trained(module, [batch, *(asked(i) for i in range(1, 4))], 2, tmp_path)
    assert seen["answers/questions_left_out"][0] == 0.75
    assert "k0-3 is left out: no picture" in caplog.text
    assert "k0-1 is left out: missing picture" in caplog.text and "k0-2 is left out: too long" in caplog.text


def test_rewards_are_told_the_question_that_is_asked(tmp_path: Path) -> None:
    module = grpo()
    watched(module)
    batch = asked(0, 2)
    batch.turns[0] = (("user", "<image>how many?"), ("assistant", "two"), ("user", "and red?"), ("assistant", "one"))
    batch.turns[1] = (("system", "<image>describe"),)  # no user says anything
    trained(module, [asked(i) for i in range(1, 3)], 1, tmp_path)
    assert [question.prompt for question in module.questions(batch)] == ["and red?", ""]


class EndsAtTimes:
    """Every third answer ends at its second token, no other does."""

    def answers(
        self, model: R1VModel, samples: Sequence[Sample], count: int, decoding: Decoding, seed: int
    ) -> list[torch.Tensor]:
        end = model.tokenizer.eos_token_id
        found = TransformersEngine().answers(model, samples, count, replace(decoding, max_new_tokens=1), seed)
        tails = [[end] if i % 3 == 0 else [end - 1] * (decoding.max_new_tokens - 1) for i in range(len(found))]
        return [torch.cat([t.where(t != end, t - 1), t.new_tensor(tail)]) for t, tail in zip(found, tails, strict=True)]


def test_answers_that_are_cut_off_are_counted_and_not_learned_from(tmp_path: Path) -> None:
    settings = replace(SAMPLING, max_new_tokens=3)
    module = grpo(overlong=Overlong(buffer=2), sampling=settings, engine=EndsAtTimes())
    seen = watched(module)
    trained(module, [asked(i) for i in range(3)], 2, tmp_path)
    assert seen["answers/cut_off"][0] == 0.5  # of four answers to a question the first and the last end
    assert min(seen["reward/overlong"]) < 0
    answers = module.sample(module.questions(asked(9)))
    learned = module.padded(answers).mask.sum(dim=1)
    assert [bool(n) for n in learned] == [answer.ended for answer in answers]


def test_recomputed_activations_change_no_bit(tmp_path: Path) -> None:
    states = []
    for recompute in (False, True):
        module = grpo(gradient_checkpointing=recompute)
        trained(module, [asked(i) for i in range(2)], 2, tmp_path)
        states.append(module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"context": 6}, "no room"), ({"train": []}, "train is empty"), ({"max_grad_norm": -1.0}, "max_grad_norm is -1")],
)
def test_settings_that_train_nothing_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        grpo(**changes)


@pytest.mark.parametrize("rewards", [{}, {"vowels": WeightedText(Vowels(), weight=0.0)}])
def test_rewards_without_a_weight_are_refused(rewards: dict[str, WeightedText]) -> None:
    with pytest.raises(InputError, match="none has a weight"):
        ReasoningGrpoModule("nowhere", rewards, TokenGRPO(), TransformersEngine())

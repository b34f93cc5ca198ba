"""Answers as batches, what algorithms take from groups, and the sample buffer."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import tensor

from data_pipeline.counters import draw
from data_pipeline.errors import InputError
from lightning_modules.losses.policy_gradient import clip_higher
from lightning_modules.losses.tokens import token_weights
from lightning_modules.rewards.weighted import numbers
from lightning_modules.rollouts.advantages import Advantages
from lightning_modules.rollouts.chain_algorithms import MixedPreference, TokenGRPO, Totals
from lightning_modules.rollouts.chain_settings import ChainSampling, Overlong
from lightning_modules.rollouts.chains import Answer, Question, batched, moved
from lightning_modules.rollouts.sample_buffer import SampleBuffer

QUESTION = Question("q", 0, 0, "how many?", tensor([7, 8, 9]), torch.zeros(2, 3, 4, 4))


def answer(length: int = 2, advantage: float = 1.0, **facts: object) -> Answer:
    tokens, question = torch.arange(1, length + 1), facts.pop("question", QUESTION)
    given = {"ended": True, "old": torch.full((length,), -1.0), "reference": torch.full((length,), -2.0), **facts}
    return Answer(question, tokens, advantage=advantage, **given)


def test_answers_are_padded_on_the_right_and_questions_on_the_left() -> None:
    short = Question("s", 1, 0, "?", tensor([5]))
    batch = batched([answer(3), answer(1, question=short, ended=False), answer(2)], pad=0, longest=3, cut_off=False)
    assert batch.prompts.input_ids.tolist() == [[7, 8, 9], [0, 0, 5], [7, 8, 9]]
    assert batch.prompts.mask.tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 0, 0], [1, 2, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]  # what was cut off is not learned from
    assert batch.prompts.rows == [[0, 1], [], [0, 1]] and len(batch.prompts.tiles) == 2  # a picture is seen once
    features = torch.arange(2.0)[:, None, None]
    assert batch.prompts.spread(features).flatten().tolist() == [0, 1, 0, 1]


def test_the_loss_of_a_batch_by_hand() -> None:
    """Two answers, one of an advantage of 2 whose second token's ratio exceeds the clip, one of -1."""
    batch = batched([answer(2, 2.0), answer(1, -1.0)], pad=0, longest=4, cut_off=True)
    new = tensor([[-1.0, -1.0 + math.log(1.5)], [-1.0 + math.log(0.5), 5.0]])
    loss, metrics = TokenGRPO(clip_low=0.2, clip_high=0.28).loss(new, batch, Totals(3.0, 2.0))
    assert loss.item() == pytest.approx((-2 * 1 - 2 * 1.28 + 0.8) / 3)
    assert metrics["clipped_high"] == pytest.approx(1 / 3) and metrics["clipped_low"] == pytest.approx(1 / 3)
    assert metrics["ratio_off"].item() == pytest.approx(0.5)
    with_kl, metrics = TokenGRPO(kl=0.1, estimator="k1").loss(new, batch, Totals(3.0, 2.0))
    away = (1 + 1 + math.log(1.5) + 1 + math.log(0.5)) / 3
    assert with_kl.item() == pytest.approx(loss.item() + 0.1 * away, rel=1e-6)
    assert metrics["kl"].item() == pytest.approx(away, rel=1e-6)


def test_advantages_are_those_of_pictures() -> None:
    rewards = {"accuracy": tensor([[1.0, 0, 0, 1]]), "format": tensor([[1.0, 1, 0, 1]])}
    found = Advantages()(rewards, {"accuracy": 1.0, "format": 0.5})
    total = tensor([1.5, 0.5, 0.0, 1.5])
    torch.testing.assert_close(found[0], (total - total.mean()) / total.std(correction=0))


def test_a_pair_is_the_best_and_the_worst_that_ended() -> None:
    group = [answer(reward=r, ended=e) for r, e in ((0.2, True), (0.9, False), (0.5, True), (0.0, True), (0.5, True))]
    assert MixedPreference().choose(group) == [group[2], group[3]]
    assert MixedPreference(margin=0.5).choose(group) == []


def test_mixed_preferences_follow_a_moving_average() -> None:
    algorithm = MixedPreference(weights=(1.0, 0.0, 0.0), beta=0.1, shift_decay=0.5)
    batch = batched([answer(2), answer(1)], pad=0, longest=4, cut_off=True)
    new = tensor([[-1.0, -1.0], [-3.0, 9.0]])  # log-ratios to the reference: 2 and -1
    loss, metrics = algorithm.loss(new, batch, Totals(3.0, 2.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3)))
    assert algorithm.shift == pytest.approx(0.5 * 0.1 * 0.5) and metrics["preferred"] == 1


def test_the_buffer_draws_by_the_size_of_advantages() -> None:
    buffer = SampleBuffer(capacity=8, share=0.5, max_age=3)
    buffer.keep([answer(advantage=a) for a in (1.0, -3.0, 0.0, 2.0)], update=0)
    assert [a.advantage for a in buffer.answers] == [1.0, -3.0, 2.0]
    torch.testing.assert_close(buffer.weights(), tensor([1 / 6, 1 / 2, 1 / 3], dtype=torch.float64))
    drawn = Counter(buffer.draw(1, torch.Generator().manual_seed(i))[0].advantage for i in range(600))
    for advantage, share in ((1.0, 1 / 6), (-3.0, 1 / 2), (2.0, 1 / 3)):
        assert drawn[advantage] / 600 == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)
    assert buffer.wanted(2) == 2 and buffer.wanted(100) == 3  # as many as new ones, where there are so many
    buffer.keep([answer(advantage=5.0, update=3)], update=3)  # what was sampled three updates ago goes
    assert [a.advantage for a in buffer.answers] == [5.0]
    buffer.keep([answer(advantage=float(i + 1), update=3) for i in range(9)], update=4)
    assert len(buffer.answers) == 8 and buffer.answers[-1].advantage == 9.0


def test_overlong_answers_are_punished_before_the_limit() -> None:
    found = Overlong(buffer=4).punished([5, 6, 8, 10, 12], 10)["overlong"]
    torch.testing.assert_close(found, tensor([0.0, 0.0, -0.5, -1.0, -1.0]))
    assert Overlong().punished([5], 10) == {}


def test_a_state_is_whole() -> None:
    kept = answer(2, 0.5, update=3, reward=1.0)
    again = Answer.of(kept.state())
    assert torch.equal(again.tokens, kept.tokens) and again.question.key == "q" and again.update == 3


def test_answers_that_were_saved_share_their_question_again() -> None:
    group = moved([Answer.of(answer(2, float(i)).state()) for i in range(3)], "cpu")
    assert len({id(a.question.tiles) for a in group}) == 1 and [a.advantage for a in group] == [0, 1, 2]
    assert {t.device.type for a in moved(group, "meta") for t in (a.tokens, a.old, a.question.tiles)} == {"meta"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChainSampling(group_size=1),
        lambda: ChainSampling(groups=3, updates=2),
        lambda: ChainSampling(micro_answers=3),
        lambda: TokenGRPO(clip_low=1.0),
        lambda: TokenGRPO(dual_clip=1.1),
        lambda: MixedPreference(beta=0.0),
        lambda: SampleBuffer(share=1.0),
        lambda: Overlong(buffer=-1),
    ],
)
def test_settings_that_cannot_be_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_a_first_ratio_of_one_clips_nothing() -> None:
    ones = torch.ones(1, 3)
    torch.testing.assert_close(clip_higher(ones, ones, 0.2, 0.28), -ones)


def test_what_is_learned_from_is_exact_where_weights_are_not() -> None:
    """Precision bf16-true makes bfloat16 the type of new tensors, in which 300 tokens count 300 and 301 count 302."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch = batched([answer(301, 0.3)], pad=0, longest=301, cut_off=True)
        scores = numbers("exact", lambda: [0.3], 1)
        punished = Overlong("mask", 100).punished([250], 301)
        weights, _ = token_weights(tensor([[-100] + [1] * 301]), torch.ones(1, 302, dtype=torch.int64), "square")
        noise = draw(torch.randn, (), 0, "noise", tensor([0]), tensor([0]))
    finally:
        torch.set_default_dtype(torch.float32)
    exact = tensor(0.3)
    assert batch.lengths.item() == 301 and batch.advantages.item() == scores.item() == exact.item()
    assert {t.dtype for t in (batch.mask, weights, noise, *punished.values())} == {torch.float32}
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)

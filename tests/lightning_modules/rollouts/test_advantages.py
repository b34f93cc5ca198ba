import pytest
import torch

from data_pipeline.errors import InputError
from lightning_modules.rollouts.advantages import (
    Advantages,
    decoupled,
    flat,
    group_normalised,
    weighted_sum,
    win_rates,
)

R = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 4.0]])


def test_groups_are_normalised_each_by_itself() -> None:
    found = group_normalised(R)
    assert torch.allclose(found[0], torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    assert torch.allclose(found[2], torch.tensor([-1.0, -1.0, -1.0, 3.0]) / 3**0.5)


def test_equal_rewards_give_zero_exactly_whatever_the_number() -> None:
    for value in (0.0, 0.1, 1e8, 1 / 3):
        rewards = torch.full((2, 7), value)
        for kind in ("group", "win_rate", "decoupled"):
            assert (Advantages(kind)({"a": rewards}, {"a": 1.0}) == 0).all()
        assert flat(rewards).all() and not Advantages().useful(rewards).any()


def test_a_floor_keeps_small_differences_small() -> None:
    rewards = torch.tensor([[0.500, 0.501]])
    assert group_normalised(rewards).abs().max() == pytest.approx(1, rel=1e-3)
    assert group_normalised(rewards, floor=0.05).abs().max() == pytest.approx(0.01, rel=1e-3)


def test_win_rates_count_ties_half_and_see_no_distances() -> None:
    assert torch.allclose(win_rates(R)[0], torch.tensor([1 / 6, 5 / 6, 5 / 6, 1 / 6]))
    assert torch.equal(win_rates(R * 100), win_rates(R))
    assert torch.allclose(win_rates(R, margin=2.0)[0], torch.full((4,), 0.5))


def test_decoupled_normalisation_keeps_a_reward_of_small_numbers() -> None:
    large, small = torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[0.0, 0.01, 0.0, 0.01]])
    weights = {"large": 1.0, "small": 1.0}
    summed = group_normalised(weighted_sum({"large": large, "small": small}, weights))
    apart = decoupled({"large": large, "small": small}, weights)
    assert (summed[0, 1] - summed[0, 0]).abs() < 1e-3
    assert torch.allclose(apart, torch.tensor([[-1.0, 0.0, 0.0, 1.0]]) * 2**0.5, atol=1e-5)


def test_a_group_without_a_reward_says_nothing_of_the_others() -> None:
    first, second = torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = {"a": 1.0, "b": 0.5}
    alone = decoupled({"a": first, "b": second}, weights)
    unknown = torch.tensor([[float("nan"), 1.0]])
    found = decoupled({"a": torch.cat([first, unknown]), "b": torch.cat([second, second[:1]])}, weights)
    assert torch.equal(found[:2], alone) and found[2].isnan().all()
    assert decoupled({"a": unknown}, weights).isnan().all()


def test_nearly_flat_groups_are_dropped_and_advantages_limited() -> None:
    settings = Advantages(flat_below=0.1, limit=1.5)
    assert settings.useful(torch.tensor([[0.0, 0.1], [0.0, 0.3], [0.5, 0.5]])).tolist() == [False, True, False]
    assert settings({"a": R}, {"a": 1.0}).max() == 1.5


@pytest.mark.parametrize("wrong", [{"std_floor": 0.0}, {"flat_below": -0.1}, {"limit": 0.0}])
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="advantages"):
        Advantages(**wrong)

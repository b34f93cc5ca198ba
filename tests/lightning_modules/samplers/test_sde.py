import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from lightning_modules.samplers import ode, sde
from lightning_modules.samplers.sde import CPS, SAMPLERS, DanceSDE, FlowSDE, Precise
from lightning_modules.samplers.timesteps import schedule

MEAN, STD = 0.7, 0.5  # of the data, one Gaussian an element
EVERY = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8), Precise(1.5)]


def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact velocity E[eps - x0 | x] where x0 is Gaussian."""
    s = sigma.double()[:, None]
    variance = (1 - s) ** 2 * STD**2 + s**2
    centred = x.double() - (1 - s) * MEAN
    return (s - (1 - s) * STD**2) / variance * centred - MEAN


def noise(seed: int = 0, count: int = 4, width: int = 6):
    def of(i: int) -> torch.Tensor:
        return torch.randn(count, width, generator=torch.Generator().manual_seed(1000 * seed + i))

    return of


# Published figures of SD3.5's own schedule of 10 steps and shift 3, to the digits that are printed: noise levels; of a
# step the standard deviation s, J^2 = (dmean/dv)^2 where log-probabilities have no other factor, and J^2 / 2 s^2.
LEVELS = ["1", ".960", ".913", ".858", ".790", ".707", ".602", ".465", ".278", ".0089", "0"]
TABLE = {  # Flow-SDE 0.7; CPS 0.8; Precise 1.5
    0: (".700 .0016", ".913 .0016 .00095", ".960 .00086"),
    2: (".536 .0084", ".816 .0115 .0086", ".726 .0078"),
    4: (".392 .035", ".673 .034 .038", ".563 .032"),
    6: (".319 .143", ".442 .070 .18", ".393 .16"),
    7: (".282 .34", ".264 .084 .60", ".255 .59"),
    8: (".225 1.11", ".0085 .075 519", ".0089 476"),
}


def printed(number: str) -> object:
    """Whatever rounds to these digits."""
    return pytest.approx(float(number), abs=0.501 * 10.0 ** -len(number.partition(".")[2]), rel=0)


def own_step(sampler: sde.Stochastic, i: int) -> sde.Coefficients:
    """Of a step of SD3.5's own schedule."""
    sigmas = schedule(10, 3.0).double().tolist()
    return sampler.coefficients(sigmas[i], sigmas[i + 1], sigmas[1])


def weight(c: sde.Coefficients) -> float:
    """What a Gaussian log-probability makes of a change of the velocity, squared."""
    return c.v**2 / (2 * c.std**2)


def test_noise_levels_are_the_published_ones() -> None:
    assert schedule(10, 3.0).tolist() == [printed(level) for level in LEVELS]


@pytest.mark.parametrize("i", TABLE)
def test_coefficients_are_the_published_ones(i: int) -> None:
    flow, cps, precise = (own_step(sampler, i) for sampler in (FlowSDE(0.7), CPS(0.8), Precise(1.5)))
    found = [flow.std, weight(flow), cps.std, cps.v**2, weight(cps), precise.std, weight(precise)]
    assert found == [printed(number) for column in TABLE[i] for number in column.split()]


def test_late_steps_outweigh_early_ones_as_published() -> None:
    """About 690 times in Flow-SDE; 52 times in CPS, whose log-probability sees J^2 alone, from the first to step 7."""
    flow, cps = FlowSDE(0.7), CPS(0.8)
    assert weight(own_step(flow, 8)) / weight(own_step(flow, 0)) == pytest.approx(690, rel=0.02)
    assert own_step(cps, 7).v ** 2 / own_step(cps, 0).v ** 2 == pytest.approx(52, rel=0.02)


# Each step as its paper's code has it: mean and standard deviation, from x, v and three noise levels.
def published_flow(x: float, v: float, s: float, following: float, second: float) -> tuple[float, float]:
    dt, std = following - s, 0.7 * math.sqrt(s / (1 - (second if s == 1 else s)))
    mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    return mean, std * math.sqrt(-dt)


def published_dance(x: float, v: float, s: float, following: float, second: float) -> tuple[float, float]:
    dt, score = following - s, -(x - (1 - s) * (x - s * v)) / s**2
    return x + dt * v - 0.5 * 0.3**2 * score * dt, 0.3 * math.sqrt(-dt)


def published_mean(x: float, v: float, s: float, following: float, std: float) -> tuple[float, float]:
    clean, noise = x - s * v, x + (1 - s) * v
    return (1 - following) * clean + math.sqrt(following**2 - std**2) * noise, std


def published_cps(x: float, v: float, s: float, following: float, second: float) -> tuple[float, float]:
    return published_mean(x, v, s, following, following * math.sin(0.8 * math.pi / 2))


def published_precise(x: float, v: float, s: float, following: float, second: float) -> tuple[float, float]:
    kept = (following * (1 - s) / (s * (1 - following))) ** (1.5**2)
    return published_mean(x, v, s, following, following * math.sqrt(1 - kept))


@pytest.mark.parametrize(
    ("sampler", "published"),
    list(zip(EVERY, (published_flow, published_dance, published_cps, published_precise), strict=True)),
    ids=SAMPLERS,
)
def test_every_step_is_the_published_one(sampler: sde.Stochastic, published: Callable[..., tuple]) -> None:
    sigmas = schedule(10, 3.0).double().tolist()
    for i, (x, v) in itertools.product(range(10), ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3))):
        c = own_step(sampler, i)
        found = (c.x * x + c.v * v, c.std)
        assert found == pytest.approx(published(x, v, *sigmas[i : i + 2], sigmas[1]), rel=1e-9, abs=1e-12), i


def test_variance_along_the_schedule_is_the_published_one() -> None:
    """Flow-SDE has 1.09 to 1.17 times the path's in its first seven steps; CPS and Precise never more, Precise nearer.

    The data have a standard deviation of 0.5.
    """
    levels = schedule(10, 3.0).double().tolist()[:-1]
    flow, cps, precise = (along(sampler, levels) for sampler in (FlowSDE(0.7), CPS(0.8), Precise(1.5)))
    assert (min(flow[:7]), max(flow[:7])) == (printed("1.09"), printed("1.17"))
    assert all(c < p <= 1 for c, p in zip(cps[1:7], precise[1:7], strict=True)) and max(cps) <= 1 >= max(precise)


@pytest.mark.parametrize("kind", SAMPLERS.values(), ids=SAMPLERS)
def test_without_noise_each_step_is_eulers(kind: type) -> None:
    sigmas, x = schedule(8, 3.0), noise()(0)
    found = sde.sample(lambda x, s: velocity(x, s).float(), x, sigmas, kind(0.0), (0, 0), noise())
    assert torch.equal(found.x0, ode.euler(lambda x, s: velocity(x, s).float(), x, sigmas))
    for i in range(7):
        c = kind(0.0).coefficients(sigmas[i].item(), sigmas[i + 1].item(), sigmas[1].item())
        assert c == pytest.approx((1.0, sigmas[i + 1].item() - sigmas[i].item(), 0.0), abs=1e-7)


def test_without_noise_a_window_of_cps_walks_as_the_ode_to_the_end() -> None:
    # The others' log-probabilities divide by the noise.
    sigmas, x = schedule(8, 3.0), noise()(0)
    exact = lambda x, s: velocity(x, s).float()  # noqa: E731
    found = sde.sample(exact, x, sigmas, CPS(0.0), (1, 8), noise())
    assert torch.allclose(found.x0, ode.euler(exact, x, sigmas), atol=1e-5)
    assert (found.log_probs == 0).all() and found.states.shape[0] == 8


def mixture_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact velocity where x0 is -1 or 1 (one in three and two in three) with a standard deviation of 0.2."""
    s = sigma.double()[:, None, None]
    centres, shares = torch.tensor([-1.0, 1.0]).double(), torch.tensor([1 / 3, 2 / 3]).double()
    variance = (1 - s) ** 2 * 0.2**2 + s**2
    gaps = x.double()[..., None] - (1 - s) * centres
    weights = torch.softmax(shares.log() - gaps.square() / (2 * variance), dim=-1)
    denoised = (weights * (centres + (1 - s) * 0.2**2 / variance * gaps)).sum(-1)
    return (x.double() - denoised) / sigma.double()[:, None]


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), DanceSDE(0.3), Precise(1.0)], ids=lambda s: type(s).__name__)
def test_sde_and_ode_reach_the_same_moments_of_a_mixture(sampler: sde.Stochastic) -> None:
    levels = torch.cat([torch.linspace(1, 0.004, 200), torch.zeros(1)])
    x = noise(count=20_000, width=1)(0)
    stochastic = sde.sample(mixture_velocity, x, levels, sampler, (0, 199), noise(1, 20_000, 1)).x0
    deterministic = ode.euler(mixture_velocity, x, levels)
    for power in (1, 2, 3, 4):
        assert (stochastic**power).mean().item() == pytest.approx((deterministic**power).mean().item(), abs=0.03)
    assert (stochastic > 0).float().mean().item() == pytest.approx(2 / 3, abs=0.02)


def spread(sampler: sde.Stochastic, steps: int, first: float = 1.0) -> list[float]:
    """Variance along evenly spaced levels, over that of the path."""
    return along(sampler, torch.linspace(first, 0.02, steps + 1, dtype=torch.float64).tolist())


def along(sampler: sde.Stochastic, levels: Sequence[float]) -> list[float]:
    """Variance over that of the path, after each step, of Gaussian data whose exact velocity is linear in x."""
    variance, ratios = (1 - levels[0]) ** 2 * STD**2 + levels[0] ** 2, []
    for sigma, following in itertools.pairwise(levels):
        c = sampler.coefficients(sigma, following, levels[1])
        slope = (sigma - (1 - sigma) * STD**2) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
        variance = (c.x + c.v * slope) ** 2 * variance + c.std**2
        ratios.append(variance / ((1 - following) ** 2 * STD**2 + following**2))
    return ratios


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), DanceSDE(0.3), Precise(1.0)], ids=lambda s: type(s).__name__)
def test_the_error_of_a_stochastic_sampler_falls_at_first_order(sampler: sde.Stochastic) -> None:
    # From 0.9 on: Flow-GRPO's noise is infinite at 1, where its code puts another number, whatever the steps.
    errors = [abs(spread(sampler, steps, 0.9)[-1] - 1) for steps in (200, 400, 800)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_only_the_first_order_samplers_of_an_sde_add_variance() -> None:
    assert max(spread(CPS(0.8), 10)) <= 1 + 1e-9 and max(spread(Precise(1.5), 10)) <= 1 + 1e-9
    assert max(spread(FlowSDE(0.7), 10)) > 1.05
    # What CPS loses does not vanish with more steps: its noise does not shrink with them.
    assert spread(CPS(0.8), 800)[-1] < 0.8


@pytest.mark.parametrize("walk", [ode.euler, ode.dpm_solver_2])
def test_errors_fall_at_the_order_of_the_solver(walk) -> None:
    order = {ode.euler: 1, ode.dpm_solver_2: 2}[walk]
    # Between levels away from both ends, where neither solver falls back to first order.
    errors = []
    for steps in (40, 80):
        sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        exact_std = [math.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (0.95, 0.05)]
        exact = (x - 0.05 * MEAN) * exact_std[1] / exact_std[0] + 0.95 * MEAN
        errors.append((walk(velocity, x, sigmas) - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(("solver", "walk"), [("euler", ode.euler), ("dpm2", ode.dpm_solver_2)])
@pytest.mark.parametrize("sampler", [None, CPS()], ids=["no sampler", "cps"])
def test_without_a_window_sampling_is_the_ode_bit_for_bit(solver: ode.Solver, walk, sampler) -> None:
    sigmas, x = schedule(8, 3.0), noise()(0)
    exact = lambda x, s: velocity(x, s).float()  # noqa: E731
    found = sde.sample(exact, x, sigmas, sampler, (0, 0), noise(), solver)
    assert torch.equal(found.x0, walk(exact, x, sigmas)) and torch.equal(found.states, x[None])
    assert found.log_probs.shape == (0, 4)


def test_a_window_needs_a_sampler() -> None:
    with pytest.raises(ValueError, match="need a sampler"):
        sde.sample(mixture_velocity, noise()(0), schedule(4), None, (0, 1), noise())


def test_a_solver_of_second_order_begins_anew_behind_a_window() -> None:
    """Its steps before and after are those of the ODE on each part by itself."""
    sigmas = torch.linspace(0.9, 0.1, 11)
    exact = lambda x, s: velocity(x, s).float()  # noqa: E731
    found = sde.sample(exact, noise()(0), sigmas, Precise(), (4, 6), noise(3), "dpm2")
    assert torch.equal(found.states[0], ode.dpm_solver_2(exact, noise()(0), sigmas[:5]))
    assert torch.equal(found.x0, ode.dpm_solver_2(exact, found.states[-1], sigmas[6:]))
    for i in (4, 5):
        _, mean, c = sde.replay(exact(found.states[i - 4], sigmas[i].expand(4)), found, Precise(), i)
        assert torch.equal(found.states[i - 3], mean + c.std * noise(3)(i))


def test_the_error_of_a_mixtures_pictures_falls_at_the_order_of_the_solver() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = {}
    for solver in ("euler", "dpm2"):
        walked = [
            sde.sample(mixture_velocity, x, levels, None, (0, 0), noise(), solver).x0
            for levels in (torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64) for steps in (40, 80, 1280))
        ]
        errors[solver] = [(each - walked[-1]).abs().max().item() for each in walked[:2]]
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.15)
    assert errors["dpm2"][0] / errors["dpm2"][1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("sampler", EVERY, ids=lambda s: type(s).__name__)
def test_a_replayed_log_probability_is_the_recorded_one_bit_for_bit(sampler: sde.Stochastic) -> None:
    net = torch.nn.Linear(6, 6)
    policy = lambda x, s: net(x) * s[:, None]  # noqa: E731
    with torch.no_grad():
        trajectory = sde.sample(policy, noise()(0), schedule(10, 3.0), sampler, (1, 4), noise(2))
    assert trajectory.states.shape == (4, 4, 6) and trajectory.log_probs.shape == (3, 4)
    for i in range(1, 4):
        v = policy(trajectory.states[i - 1], trajectory.sigmas[i].expand(4))
        log_prob, _, _ = sde.replay(v, trajectory, sampler, i)
        assert log_prob.requires_grad and torch.equal(log_prob, trajectory.log_probs[i - 1])


def test_log_probability_is_the_gaussians_mean_over_elements() -> None:
    c = sde.Coefficients(1.0, -0.1, 0.3)
    x, mean = torch.tensor([[0.2, 0.5]]), torch.tensor([[0.1, 0.1]])
    wanted = torch.distributions.Normal(mean, 0.3).log_prob(x).mean(dim=1)
    assert torch.allclose(sde.log_prob(c, "gaussian", x, mean), wanted)
    assert sde.log_prob(c, "squared", x, mean).item() == pytest.approx(-(0.01 + 0.16) / 2)

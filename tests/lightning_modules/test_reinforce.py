"""The reinforcement loop on a micro folder: what it samples, keeps, learns from, and how it goes on after a stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from jsonargparse import ArgumentParser
from micro import Brightness, micro_folder
from rl import SAMPLING, SaveAfter, made, prompts, trained, watched
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.losses.flow_matching import flow_matching
from lightning_modules.networks.adapters import Lora
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.reinforce import PATIENCE, ReinforceModule
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.weighted import Weighted
from lightning_modules.rollouts.advantages import Advantages, decoupled
from lightning_modules.rollouts.algorithms import AWM, GRPO, Algorithm, DiffusionNFT, FlowDPPO, GRPOGuard, Window
from lightning_modules.rollouts.policy import Policy
from lightning_modules.rollouts.records import Rollout
from lightning_modules.rollouts.settings import Regularisation, Sampling
from lightning_modules.samplers import ode
from lightning_modules.samplers.sde import SAMPLERS, FlowSDE
from lightning_modules.schedule import AdamW

WINDOW = Window(2, (0, 3))
KL = Regularisation(latent_kl=0.1)
RATIO_BASED = [
    GRPO(window=WINDOW),
    GRPO("flow", unit="gaussian", window=WINDOW),
    GRPO("dance", unit="gaussian", window=WINDOW),
    GRPO("precise", unit="gaussian", window=Window(2, (0, 2))),
    FlowDPPO(window=WINDOW),
    FlowDPPO("cps", unit="squared", window=WINDOW),
    GRPOGuard(window=WINDOW),
    GRPOGuard("precise", window=WINDOW),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_folder(tmp_path_factory.mktemp("micro") / "folder"))


def sampled(module: ReinforceModule, batch: ImageBatch, tmp_path: Path) -> Rollout:
    """One rollout with rewards, outside of a Trainer's loop."""
    module.configure_model()
    module.configure_optimizers()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with torch.no_grad():
        rollout = module.sample(batch)
    rollout.rewards = {"bright": torch.rand(len(batch), 3, generator=torch.Generator().manual_seed(0))}
    return rollout


@pytest.mark.parametrize("algorithm", RATIO_BASED, ids=lambda a: f"{type(a).__name__}-{a.sampler}")
def test_log_probabilities_agree_bitwise_and_the_first_ratio_is_one(folder: str, algorithm, tmp_path: Path) -> None:
    module = made(folder, algorithm)
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    policy = Policy.of(module.transformer, rollout, 1.0)
    points = list(algorithm.points(rollout, module.draw_points))
    assert len(points) == 2
    for place, point in enumerate(points):
        v = policy(point.x, point.sigma)
        comparison = algorithm.compare(v, v.detach(), point, rollout)
        assert torch.equal(comparison.log_prob, rollout.trajectory.log_probs[place])
        loss, metrics = algorithm.loss(v, v.detach(), point, rollout, torch.ones(len(rollout)))
        assert metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0 and metrics["clipped"] == 0
        loss.mean().backward()
    assert module.transformer.proj_out.weight.grad.abs().max() > 0


def test_the_first_ratio_of_weighted_matching_is_one(folder: str, tmp_path: Path) -> None:
    module = made(folder, AWM())
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    policy = Policy.of(module.transformer, rollout, 1.0)
    for point in AWM().points(rollout, partial(module.draw_points, 0, len(rollout))):
        v = policy(point.x, point.sigma)
        _, metrics = AWM().loss(v, v.detach(), point, rollout, torch.ones(len(rollout)))
        assert metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0 and metrics["clipped"] == 0


@pytest.mark.parametrize("algorithm", [GRPO(window=WINDOW), AWM()], ids=lambda a: type(a).__name__)
def test_the_first_ratio_to_a_policy_that_follows_slowly_is_one(folder: str, algorithm, tmp_path: Path) -> None:
    advantages = Advantages("decoupled")
    module = made(folder, algorithm, regularisation=Regularisation(old_rate=0.5), advantages=advantages)
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.setdefault(name, float(value))
    trained(module, [prompts(0)], 1, tmp_path)
    assert logged["train/ratio_mean"] == 1 and logged["train/ratio_std"] == 0


def test_under_autocast_sampling_and_learning_agree_and_rewards_see_exact_pictures(folder: str, tmp_path: Path) -> None:
    module = made(folder, GRPO(window=WINDOW))
    exact = sampled(module, prompts(0, count=2), tmp_path).trajectory
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning's bf16-mixed does
        rollout = sampled(module, prompts(0, count=2), tmp_path)
        policy = Policy.of(module.transformer, rollout, 1.0)
        for place, point in enumerate(module.algorithm.points(rollout, module.draw_points)):
            v = policy(point.x, point.sigma)
            assert torch.equal(
                module.algorithm.compare(v, v, point, rollout).log_prob, rollout.trajectory.log_probs[place]
            )
        v.square().mean().backward()
        found = module.pictures_of(exact.x0)
    assert module.transformer.transformer_blocks[0].attn.to_q.weight.grad.abs().max() > 0
    assert not torch.equal(rollout.trajectory.x0, exact.x0) and rollout.trajectory.x0.dtype == torch.float32
    assert torch.equal(found, module.pictures_of(exact.x0))


@pytest.mark.parametrize("algorithm", [*RATIO_BASED, DiffusionNFT(), AWM()], ids=lambda a: type(a).__name__)
def test_zero_advantages_have_no_gradient(folder: str, algorithm, tmp_path: Path) -> None:
    module = made(folder, algorithm)
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    policy = Policy.of(module.transformer, rollout, 1.0)
    draw = lambda purpose, number, shape: module.draw_points(0, len(rollout), purpose, number, shape)  # noqa: E731
    for point in algorithm.points(rollout, draw):
        v = policy(point.x, point.sigma)
        loss, _ = algorithm.loss(v, v.detach(), point, rollout, torch.zeros(len(rollout)))
        gradient = torch.autograd.grad(loss.mean(), module.transformer.proj_out.weight)[0]
        # NFT contrasts v+ and v- with equal weights: nothing but rounding is left.
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize(
    "algorithm", [GRPO(window=WINDOW, clip=1e-2), DiffusionNFT(), AWM()], ids=lambda a: type(a).__name__
)
def test_learning_raises_the_reward(folder: str, algorithm, tmp_path: Path) -> None:
    module = made(folder, algorithm, optimizer=AdamW(lr=3e-3, warmup_steps=0, weight_decay=0.0), steps=40)
    seen: list[float] = []
    module.log = lambda name, value, **_: seen.append(float(value)) if name == "reward/edit" else None
    trained(module, [prompts(i) for i in range(24)], 24, tmp_path)
    first, last = torch.tensor(seen[:12]), torch.tensor(seen[-12:])
    assert last.mean() > first.mean() + 2 * (first.std() + last.std()) / 12**0.5


def test_an_update_waits_until_enough_groups_teach_something(folder: str, tmp_path: Path) -> None:
    class Picky(Brightness):
        """Tells only the pictures of the first prompt of a batch apart."""

        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            found = super().score(pictures, requests)
            return [s if r.prompt == "make it 0" else 0.5 for s, r in zip(found, requests, strict=True)]

    module = made(folder, reward=Picky())
    updates = watched(module)
    trained(module, [prompts(i) for i in range(9)], 2, tmp_path)
    assert updates == [["k0-0", "k1-0", "k2-0", "k3-0"], ["k4-0", "k5-0", "k6-0", "k7-0"]]


def test_pictures_of_several_shapes_are_learned_from_in_batches_of_their_own(folder: str, tmp_path: Path) -> None:
    module = made(folder)
    updates = watched(module)
    trained(module, [prompts(i, count=2, width=(32, 16)[i % 2]) for i in range(4)], 2, tmp_path)
    assert updates == [["k1-0", "k1-1", "k0-0", "k0-1"], ["k3-0", "k3-1", "k2-0", "k2-1"]]


def test_recomputed_activations_change_no_bit(folder: str, tmp_path: Path) -> None:
    states = []
    for recompute in (False, True):
        module = made(folder, recompute=recompute)
        trained(module, [prompts(i) for i in range(2)], 2, tmp_path)
        states.append(module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_reward_that_never_tells_pictures_apart_ends_the_run(folder: str, tmp_path: Path) -> None:
    class Flat:
        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            return [0.0] * len(requests)

    with pytest.raises(InputError, match="taught nothing"):
        trained(made(folder, reward=Flat()), [prompts(i, count=2) for i in range(PATIENCE + 2)], 2, tmp_path)


class Faulty(Brightness):
    """Fails in one way at its second call."""

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        self.calls += 1
        found = super().score(pictures, requests)
        if self.calls != 2:
            return found
        if self.fault == "raises":
            raise ConnectionError("the server is down")
        return {"nan": [math.nan, *found[1:]], "none": [None, *found[1:]], "short": found[1:]}[self.fault]


@pytest.mark.parametrize("fault", ["raises", "nan", "none", "short"])
def test_no_failure_of_a_reward_becomes_a_number(folder: str, fault: str, tmp_path: Path) -> None:
    module = made(folder, reward=Faulty(fault))
    kept = watched(module)
    trained(module, [prompts(i) for i in range(4)], 1, tmp_path)
    # The second call is on the prompts 2 and 3 of the first batch; one missing number loses its own group alone.
    lost = {"k0-2"} if fault in ("nan", "none") else {"k0-2", "k0-3"}
    assert len(kept[0]) >= 4 and lost.isdisjoint(kept[0])


def test_adapters_train_alone_and_export_merged(folder: str, tmp_path: Path) -> None:
    module = made(folder, lora=Lora(rank=2, alpha=4), regularisation=Regularisation(velocity_kl=0.1))
    module.configure_model()
    base = {n: p.detach().clone() for n, p in module.transformer.named_parameters() if "lora_" not in n}
    sigma = torch.tensor([500.0])
    inputs = {"encoder_hidden_states": torch.randn(1, 3, module.transformer.config.joint_attention_dim)}
    inputs |= {"pooled_projections": torch.randn(1, module.transformer.config.pooled_projection_dim)}
    channels = module.transformer.config.in_channels
    x = torch.randn(1, channels, 8, 8)

    def velocity(transformer: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return transformer(hidden_states=x, timestep=sigma, return_dict=False, **inputs)[0]

    plain = KontextPipeline.from_pretrained(folder).transformer
    assert torch.equal(velocity(module.transformer), velocity(plain))  # B is zero: the base, bit for bit
    trained(module, [prompts(i) for i in range(3)], 3, tmp_path)
    for name, p in module.transformer.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert "lora_" in name or torch.equal(p, base[name])
    with torch.no_grad():
        moved = velocity(module.transformer)
    assert not torch.equal(moved, velocity(plain))
    with module.snapshots.using("reference"):
        assert torch.equal(velocity(module.transformer), velocity(plain))
    module.pipeline().save_pretrained(tmp_path / "export")
    assert torch.allclose(velocity(KontextPipeline.from_pretrained(tmp_path / "export").transformer), moved, atol=1e-5)
    stock = StableDiffusion3Pipeline.from_pretrained(folder, transformer=plain)
    stock.load_lora_weights(tmp_path / "export" / "lora")
    assert torch.allclose(velocity(stock.transformer), moved, atol=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("task", ["edit", "text_to_image"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder: str, task: str, lora: Lora | None, tmp_path: Path) -> None:
    changes = {"regularisation": Regularisation(velocity_kl=0.1, old_rate=0.3), "lora": lora}
    batches = [prompts(i, task, 2) for i in range(12)]  # two batches an update
    whole = made(folder, **changes)
    trained(whole, batches, 4, tmp_path)
    first = made(folder, **changes)
    between = SaveAfter(5, tmp_path / "stopped.ckpt")
    trained(first, batches, 3, tmp_path, callbacks=[between])
    second = made(folder, **changes)
    trained(second, batches[5:], 4, tmp_path, resume=tmp_path / "stopped.ckpt")
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name]), name
    for name, copy in whole.snapshots.copies["old"].items():
        assert torch.equal(copy, second.snapshots.copies["old"][name])


def test_rollouts_survive_saving_selecting_and_joining(folder: str, tmp_path: Path) -> None:
    rollout = sampled(made(folder, GRPO(window=WINDOW)), prompts(0), tmp_path)
    rollout.save(tmp_path / "r.safetensors")
    loaded = Rollout.load(tmp_path / "r.safetensors")
    assert loaded.facts() == rollout.facts() and len(loaded) == 12 and loaded.group_size == 3
    again = Rollout.join([loaded.select([0, 1]), loaded.select([2, 3])])
    for name, tensor in rollout.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name]) and torch.equal(tensor, again.tensors()[name])
    assert again.keys == rollout.keys and loaded.select([3]).keys == ["k0-3"]


@pytest.mark.parametrize(
    ("algorithm", "solver", "wanted"),
    [
        (DiffusionNFT(), None, "dpm2"),
        (DiffusionNFT(), "euler", "euler"),
        (GRPO(window=Window(1, (0, 2))), None, "euler"),
        (GRPO(window=Window(1, (0, 2))), "dpm2", "dpm2"),
    ],
)
def test_a_config_chooses_what_takes_the_steps_that_are_not_stochastic(
    folder: str, algorithm, solver: ode.Solver | None, wanted: ode.Solver, tmp_path: Path
) -> None:
    module = made(folder, algorithm, sampling=replace(SAMPLING, solver=solver))
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    t = rollout.trajectory
    with torch.no_grad():
        x0 = ode.walk(wanted, Policy.of(module.transformer, rollout, 1.0), t.states[-1], t.sigmas[t.window[1] :])
    assert torch.equal(t.x0, x0)


def test_members_of_a_group_differ_and_do_not_depend_on_what_is_beside_them(folder: str, tmp_path: Path) -> None:
    module = made(folder, GRPO(window=WINDOW))
    both = sampled(module, prompts(0, count=2), tmp_path).trajectory
    with torch.no_grad():
        alone = module.sample(prompts(0, count=2).rows(1, 2)).trajectory
    assert torch.equal(both.states[0, 3:], alone.states[0]) and both.window == alone.window
    assert len({tuple(row.flatten().tolist()) for row in both.states[0]}) == 6


def test_guidance_is_part_of_the_policy_and_costs_twice(folder: str, tmp_path: Path) -> None:
    guided = made(folder, GRPO(window=WINDOW), sampling=replace(SAMPLING, guidance_scale=3.0))
    rollout = sampled(guided, prompts(0, count=2), tmp_path)
    assert guided.evaluations == 2 * 4 * 6
    policy = Policy.of(guided.transformer, rollout, 3.0)
    point = next(guided.algorithm.points(rollout, guided.draw_points))
    comparison = guided.algorithm.compare(v := policy(point.x, point.sigma), v.detach(), point, rollout)
    assert torch.equal(comparison.log_prob, rollout.trajectory.log_probs[0])


def test_the_velocity_kl_pulls_to_the_reference(folder: str, tmp_path: Path) -> None:
    away: dict[float, float] = {}
    for weight in (0.0, 10.0):
        module = made(folder, regularisation=Regularisation(velocity_kl=weight))
        module.configure_model()
        before = [p.detach().clone() for _, p in module.trainable_parameters()]
        trained(module, [prompts(i) for i in range(6)], 6, tmp_path)
        away[weight] = sum(
            (p - b).square().sum().item() for (_, p), b in zip(module.trainable_parameters(), before, strict=True)
        )
    assert away[10.0] < away[0.0]


def test_every_regularisation_has_a_gradient_and_its_cost_is_counted(folder: str, tmp_path: Path) -> None:
    settings = Regularisation(velocity_kl=0.1, latent_kl=0.04, ema_kl=0.1, supervised=0.5, anchor=0.5, old_rate=0.5)
    module = made(folder, GRPO("flow", unit="gaussian", clip=1e-4, window=WINDOW), regularisation=settings)
    module.rewards = {"bright": Weighted(Brightness(), tasks=["edit"])}
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value))
    trained(module, [prompts(9, "text_to_image"), *map(prompts, range(3))], 3, tmp_path)
    assert all(logged[f"train/{name}"] > 0 for name in ("velocity_kl", "latent_kl", "ema_kl", "supervised", "anchor"))
    # A batch of 12 pictures: 4 steps of sampling; 2 points, each a forward and a backward pass and three copies'; 4
    # targets to learn, each a forward and a backward pass, and 4 to keep, each with a pass of the reference too.
    assert module.evaluations == 3 * (12 * 4 + 12 * 2 * (3 + 3) + 4 * 3 + 4 * 4)
    assert logged["cost/per_picture"] == pytest.approx(module.evaluations / 36)


@pytest.mark.parametrize("name", ["latent_kl", "velocity_kl", "ema_kl"])
def test_each_divergence_pulls_on_the_weights(name: str, folder: str, tmp_path: Path) -> None:
    settings = Regularisation(**{name: 0.1})
    module = made(folder, GRPO("flow", unit="gaussian", window=WINDOW), regularisation=settings)
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    policy = Policy.of(module.transformer, rollout, 1.0)
    point = next(module.algorithm.points(rollout, module.draw_points))
    v = policy(point.x, point.sigma)
    others = dict.fromkeys(("reference", "ema"), v.detach() + 0.1)
    ((_, weight, divergence),) = settings.divergences(module.algorithm, v, others, point, rollout)
    (weight * divergence).mean().backward()
    assert module.transformer.proj_out.weight.grad.abs().max() > 0


def test_the_published_preset_costs_74_forward_passes_a_picture(folder: str, tmp_path: Path) -> None:
    """Flow-GRPO's ten steps with guidance, nine of them trained with a KL term, and LoRA: spec of its authors' code."""
    module = made(
        folder,
        GRPO("flow", noise=0.7, unit="gaussian", clip=1e-4, window=Window(9, (0, 9))),
        sampling=Sampling(group_size=2, groups=2, micro_groups=2, num_inference_steps=10, guidance_scale=4.5),
        regularisation=Regularisation(latent_kl=0.04),
        lora=Lora(rank=2, alpha=4),
    )
    trained(module, [prompts(0, count=2)], 1, tmp_path)
    assert module.evaluations / module.pictures == 74


def test_matching_without_contrast_is_flow_matching(folder: str, tmp_path: Path) -> None:
    """Where all pictures are entirely good and beta is 1, NFT regresses on them as flow matching does."""
    module = made(folder)
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    policy = Policy.of(module.transformer, rollout, 1.0)
    draw = lambda purpose, number, shape: module.draw_points(0, len(rollout), purpose, number, shape)  # noqa: E731
    point = next(DiffusionNFT().points(rollout, draw))
    v = policy(point.x, point.sigma)
    loss, _ = DiffusionNFT().loss(v, torch.randn_like(v), point, rollout, torch.full((len(rollout),), 5.0))
    target = point.noise - rollout.trajectory.x0
    error = (v - target).flatten(1)
    wanted = (error.square().mean(1) / error.abs().mean(1)) * point.sigma  # |x0(v) - x0| = sigma |v - target|
    assert torch.allclose(loss / 5, wanted, rtol=1e-4)
    assert flow_matching(v, target, torch.ones(len(v))).item() > 0


def test_defaults_are_the_published_settings_of_each_algorithm() -> None:
    assert FlowDPPO() == FlowDPPO("flow", noise=None, unit="gaussian", limit=1e-5) and FlowDPPO().steps == FlowSDE(0.7)
    clips = {name: GRPO(name, unit=kind().unit).clip_range for name, kind in SAMPLERS.items()}
    assert clips == {"flow": 1e-4, "dance": 1e-4, "cps": 1e-5, "precise": 4e-6}
    assert GRPO(clip=0.2).clip_range == 0.2 and AWM().points_per_picture == 6


def test_the_largest_advantage_weighs_one_in_advantage_weighted_matching(folder: str, tmp_path: Path) -> None:
    module = made(folder, AWM())
    rollout = sampled(module, prompts(0, count=2), tmp_path)
    point = next(AWM().points(rollout, partial(module.draw_points, 0, len(rollout))))
    v = torch.zeros_like(point.x)
    loss, _ = AWM().loss(v, v, point, rollout, torch.tensor([5.0, -5.0, 2.5, 0.0, 9.0, -1.0]))
    assert torch.allclose(loss, torch.tensor([-1.0, 1.0, -0.5, 0.0, -1.0, 0.2]))


def test_decoupled_advantages_do_not_depend_on_how_groups_are_packed(folder: str, tmp_path: Path) -> None:
    sampling = replace(SAMPLING, groups=4, micro_groups=4)
    weights = {"bright": Weighted(Brightness(), 1.0), "even": Weighted(Brightness(), 0.3)}
    module = made(folder, advantages=Advantages("decoupled"), sampling=sampling)
    module.rewards = weights
    whole = {task: sampled(module, prompts(0, task, count=4), tmp_path) for task in ("edit", "text_to_image")}
    for seed, rollout in enumerate(whole.values()):
        generator = torch.Generator().manual_seed(seed)
        rollout.rewards = {name: torch.rand(4, 3, generator=generator) for name in weights}
    # Each task has a scale of its own, that of all its groups.
    wanted = torch.cat([decoupled(rollout.rewards, module.weights).flatten() for rollout in whole.values()])
    for size in (1, 2, 4):
        module.sampling = replace(sampling, micro_groups=size)
        parts = [each.select(range(i, i + size)) for each in whole.values() for i in range(0, 4, size)]
        assert torch.allclose(torch.cat(module.advantages_of(parts)), wanted, rtol=1e-6)
    first = whole["edit"].select([0])
    assert not torch.allclose(decoupled(first.rewards, module.weights).flatten(), wanted[:3], rtol=1e-3)


@pytest.mark.parametrize("name", ["GRPO", "FlowDPPO", "GRPOGuard", "DiffusionNFT", "AWM"])
def test_a_config_can_name_every_algorithm(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    path = f"lightning_modules.rollouts.algorithms.{name}"
    found = parser.instantiate_classes(parser.parse_object({"algorithm": {"class_path": path}}))
    assert type(found.algorithm).__name__ == name and isinstance(found.algorithm, Algorithm)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: Sampling(group_size=1), "at least 2 pictures"),
        (lambda: made("x", sampling=Sampling(groups=6, micro_groups=4)), "multiple of micro_groups"),
        (lambda: Window(4, (0, 3)), "do not fit"),
        (lambda: GRPO("flow"), "log-probabilities in 'gaussian'"),
        (lambda: GRPO("cps", unit="gaussian"), "log-probabilities in 'squared'"),
        (lambda: GRPOGuard("cps", unit="squared"), "defined for"),
        (lambda: Regularisation(old_rate=0.0), "old_rate"),
        (lambda: Regularisation(ema_kl=-1.0), "at least 0"),
        (lambda: ReinforceModule("x", {}, AWM(), regularisation=Regularisation(latent_kl=0.1)), "which AWM has not"),
        (lambda: Weighted(Brightness(), math.nan), "weight"),
        (
            lambda: made("x", GRPO(window=Window(2, (0, 5)))),
            "0 to 5 ends after the last of sampling.num_inference_steps 4; let",
        ),
        (lambda: made("x", GRPO("precise", unit="gaussian", window=Window(1, (0, 4)))), "no noise at step 3 of 4"),
        (lambda: made("x", GRPO("flow", 0.0, "gaussian", WINDOW)), "'flow' adds no noise at step 0"),
        (lambda: made("x", GRPOGuard("dance", 0.0, window=WINDOW)), "its log-probability divides by it"),
        (lambda: made("x", GRPO(window=Window(1, (3, 4))), regularisation=KL), "latent_kl divides by it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, match: str) -> None:
    with pytest.raises(InputError, match=match):
        wrong()


def test_a_step_without_noise_is_allowed_where_nothing_divides_by_it() -> None:
    cps = made("x", GRPO(window=Window(1, (3, 4))))  # CPS, whose unit is the square alone
    flow = made("x", GRPO("flow", unit="gaussian", window=Window(1, (3, 4))), regularisation=KL)
    assert cps.algorithm.window.within == flow.algorithm.window.within == (3, 4)


def test_a_task_without_a_reward_is_named(folder: str, tmp_path: Path) -> None:
    module = made(folder)
    module.rewards = {"bright": Weighted(Brightness(), tasks=["text_to_image"])}
    with pytest.raises(InputError, match="no reward judges the task 'edit'"):
        trained(module, [prompts(0)], 1, tmp_path)


def editor(folder: str, anchor: float, **changes: object) -> ReinforceModule:
    """Learns to edit alone, held where it was in text-to-image."""
    module = made(folder, regularisation=Regularisation(anchor=anchor, old_rate=0.5), **changes)
    module.rewards = {"bright": Weighted(Brightness(), tasks=["edit"])}
    return module


def test_a_task_without_a_reward_is_held_to_the_reference(folder: str, tmp_path: Path) -> None:
    batches = [prompts(i, "edit" if i % 2 else "text_to_image") for i in range(12)]
    strayed = {}
    for weight in (1e-9, 10.0):
        module = editor(folder, weight, optimizer=AdamW(lr=3e-3, warmup_steps=0))
        updates = watched(module)
        trained(module, batches, 6, tmp_path)
        assert [{int(key[1:].split("-")[0]) for key in keys} for keys in updates] == [{i} for i in range(1, 12, 2)]
        module.anchor = prompts(20, "text_to_image", count=8)
        strayed[weight] = next(loss.item() for name, _, loss in module.on_targets(batches[0]) if name == "anchor")
    assert 0 < strayed[10.0] < strayed[1e-9] / 2


def test_an_anchored_run_that_was_stopped_goes_on_bit_for_bit(folder: str, tmp_path: Path) -> None:
    batches = [prompts(i, "text_to_image" if i in (0, 4) else "edit", 2) for i in range(12)]
    whole, first, second = (editor(folder, 1.0) for _ in range(3))
    trained(whole, batches, 4, tmp_path)
    trained(first, batches, 3, tmp_path, callbacks=[SaveAfter(7, tmp_path / "stopped.ckpt")])
    trained(second, batches[7:], 4, tmp_path, resume=tmp_path / "stopped.ckpt")
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name]), name
    assert whole.evaluations == second.evaluations


def test_an_anchor_without_data_ends_the_run(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.reinforce.PATIENCE", 2)
    with pytest.raises(InputError, match="in 2 updates none came"):
        trained(editor(folder, 1.0), [prompts(i) for i in range(4)], 4, tmp_path)

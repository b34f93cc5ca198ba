"""Rewards are found while sampling goes on, here or behind HTTP; one of no weight is watched beside the others."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from micro import Brightness, micro_folder
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards import remote
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.remote import Remote, serve
from lightning_modules.rewards.weighted import Weighted, of_task
from lightning_modules.rollouts.algorithms import DiffusionNFT
from lightning_modules.rollouts.settings import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_folder(tmp_path_factory.mktemp("micro") / "folder"))


def prompts(count: int = 4) -> ImageBatch:
    draw = torch.Generator().manual_seed(0)
    return ImageBatch(
        tasks=["edit"] * count,
        keys=[f"k{i}" for i in range(count)],
        sample_ids=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=[f"make it {i}" for i in range(count)],
        target=torch.rand(count, 3, 32, 32, generator=draw) * 2 - 1,
        references=torch.rand(count, 1, 3, 32, 32, generator=draw) * 2 - 1,
    )


def collected(folder: str, rewards: dict[str, Weighted], monkeypatch: pytest.MonkeyPatch, sampled=None):
    """The rollouts of one batch of two micro-batches, and what was logged."""
    sampling = Sampling(group_size=3, groups=4, micro_groups=2, num_inference_steps=2)
    module = ReinforceModule(folder, rewards, DiffusionNFT(), sampling=sampling)
    module.configure_model()
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    monkeypatch.setattr(module, "draw_uniform", lambda purpose: 0.0)
    if sampled is not None:
        sample = module.sample
        module.sample = lambda batch: (sample(batch), sampled())[0]  # type: ignore[method-assign]
    return module.collect(prompts()), logged


def test_sampling_goes_on_while_pictures_are_scored(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both_sampled, count = threading.Event(), []

    class Waits(Brightness):
        """Answers only once the second micro-batch was sampled."""

        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            assert both_sampled.wait(60)
            return super().score(pictures, requests)

    def sampled() -> None:
        count.append(1)
        if len(count) == 2:
            both_sampled.set()

    found, logged = collected(folder, {"slow": Weighted(Waits())}, monkeypatch, sampled)
    assert len(count) == 2 and logged["rollouts/unscored"] == 0
    assert [key for rollout in found for key in rollout.keys] == ["k0", "k1", "k2", "k3"]


def test_a_reward_that_takes_the_cores_is_waited_for(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    class Counted(Brightness):
        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            scored.append(len(pictures))
            return super().score(pictures, requests)

    before: list[int] = []
    rewards = {"near": Weighted(Counted(), beside=False)}
    collected(folder, rewards, monkeypatch, lambda: before.append(len(scored)))
    assert before == [0, 1] and scored == [6, 6]


def test_a_reward_behind_http_gives_the_same_rollouts(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.TOKEN, "open sesame")
    server = serve(Brightness(), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        far = Remote(f"http://127.0.0.1:{server.server_port}/score")
        found, _ = collected(folder, {"bright": Weighted(far)}, monkeypatch)
    finally:
        server.shutdown()
        server.server_close()
    expected, _ = collected(folder, {"bright": Weighted(Brightness())}, monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys and torch.equal(one.trajectory.x0, other.trajectory.x0)
        assert torch.allclose(one.rewards["bright"], other.rewards["bright"], atol=0.5 / 255)


def test_a_reward_of_no_weight_is_logged_and_changes_nothing(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            raise RuntimeError("no")

    class Dark:
        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            return (1 - pictures.flatten(1).mean(dim=1)).tolist()

    plain = {"bright": Weighted(Brightness(), 2.0)}
    expected, before = collected(folder, plain, monkeypatch)
    watched = {**plain, "dark": Weighted(Dark(), 0.0), "broken": Weighted(Broken(), 0.0)}
    found, logged = collected(folder, watched, monkeypatch)
    assert before == {name: value for name, value in logged.items() if name != "reward/edit/dark"}
    assert logged["reward/edit/bright"] + logged["reward/edit/dark"] == pytest.approx(1)
    assert logged["reward/edit"] == pytest.approx(2 * logged["reward/edit/bright"])
    for one, other in zip(found, expected, strict=True):
        assert one.rewards.keys() == {"bright"} and torch.equal(one.rewards["bright"], other.rewards["bright"])


def test_a_task_needs_a_reward_that_counts() -> None:
    with pytest.raises(InputError, match="no reward judges the task 'edit'"):
        of_task(
            {"watched": Weighted(Brightness(), 0.0), "other": Weighted(Brightness(), 1.0, ["text_to_image"])}, "edit"
        )
    with pytest.raises(InputError, match="finite"):
        Weighted(Brightness(), float("nan"))

"""What an update is made of: published recipes by hand, and what the transformer was really asked."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro import built
from rl import SAMPLING, made, prompts, trained

from data_pipeline.errors import InputError
from lightning_modules.networks.adapters import Lora
from lightning_modules.rollouts.algorithms import AWM, GRPO, DiffusionNFT, Window
from lightning_modules.rollouts.arithmetic import resolve
from lightning_modules.rollouts.settings import Regularisation, Sampling

FLOW_GRPO = GRPO("flow", noise=0.7, unit="gaussian", clip=1e-4, window=Window(9, (0, 9)))
GUIDED = Sampling(guidance_scale=4.5)
OLD = {"old_rate": 0.25}


@pytest.mark.parametrize(
    ("sampling", "algorithm", "regularisation", "to_sample", "to_train"),
    [
        (GUIDED, FLOW_GRPO, Regularisation(latent_kl=0.04), 20, 54),  # Flow-GRPO as published
        (Sampling(), GRPO(), Regularisation(), 10, 6),  # its fast variant
        (Sampling(), GRPO(), Regularisation(velocity_kl=1e-3), 10, 9),
        (Sampling(), DiffusionNFT(9), Regularisation(velocity_kl=1e-4, **OLD), 10, 36),  # DiffusionNFT as published
        (Sampling(), DiffusionNFT(4), Regularisation(**OLD), 10, 12),
        (Sampling(num_inference_steps=14), AWM(6), Regularisation(velocity_kl=1e-3, ema_kl=1.0), 14, 24),
    ],
)
def test_published_recipes_cost_what_their_code_does_with_adapters(
    sampling, algorithm, regularisation, to_sample: int, to_train: int
) -> None:
    found = resolve(sampling, algorithm, regularisation, adapters=True)
    assert (found.to_sample, found.to_train) == (to_sample, to_train)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": Lora(rank=2), "regularisation": Regularisation(**OLD)},
        {
            "sampling": replace(SAMPLING, guidance_scale=3.0),
            "regularisation": Regularisation(velocity_kl=0.1, ema_kl=0.1),
        },
        {"recompute": True, "regularisation": Regularisation(supervised=0.5)},
        {"recompute": True, "lora": Lora(rank=2), "sampling": replace(SAMPLING, guidance_scale=3.0)},
    ],
    ids=["plain", "lora", "guided", "recompute", "all"],
)
def test_counted_evaluations_are_those_that_were_made(changes: dict, tmp_path: Path) -> None:
    module = made(str(built()), DiffusionNFT(2), **changes)
    module.configure_model()
    passes = {"forward": 0, "backward": 0}

    def norm(_: object, args: tuple) -> None:
        passes["forward"] += len(args[0])  # of a block's first layer, called again where activations are recomputed

    def transformer(_: object, args: tuple, kwargs: dict) -> None:
        passes["backward"] += len(kwargs["hidden_states"]) * torch.is_grad_enabled()

    module.transformer.transformer_blocks[0].norm1.register_forward_pre_hook(norm)
    module.transformer.register_forward_pre_hook(transformer, with_kwargs=True)
    trained(module, [prompts(i) for i in range(2)], 2, tmp_path)
    made_in_all = passes["forward"] + passes["backward"] * (1 if "lora" in changes else 2)
    cost = module.arithmetic
    predicted = module.pictures * cost.to_sample + module.trained * cost.to_train + 2 * 4 * cost.to_supervise
    assert module.evaluations == made_in_all == predicted
    assert module.pictures == 2 * cost.sampled == 24


def test_a_batch_is_shared_out_from_one_device_up() -> None:
    def paper(devices: int, micro_groups: int, prompts: int):
        sampling = Sampling(16, 16, micro_groups, 10, 4.5)
        return resolve(sampling, FLOW_GRPO, Regularisation(latent_kl=0.04), True, devices=devices, prompts=prompts)

    for devices, micro_groups, batch, micro_batches in ((1, 4, 16, 4), (1, 1, 1, 16), (8, 1, 2, 2), (16, 1, 1, 1)):
        found = paper(devices, micro_groups, batch)
        assert found.micro_batches == micro_batches and found.groups == 16 // devices
        assert found.sampled == 256  # the paper's global batch, however many devices share it
    assert paper(1, 4, 12).sampled == 24 * 16  # the second batch is sampled whole
    assert "256 sampled" in paper(8, 1, 2).table() and "74.0 a picture" in paper(8, 1, 2).table()


@pytest.mark.parametrize(
    ("settings", "devices", "batch", "message"),
    [
        (Sampling(groups=6, micro_groups=4), 1, None, "nearest are groups 4 or 8, or micro_groups 3"),
        (Sampling(groups=3, micro_groups=4), 1, None, "nearest are groups 4, or micro_groups 3"),
        (Sampling(groups=8, micro_groups=4), 8, None, "x devices 8; nearest are groups 32, or micro_groups 1"),
        (Sampling(groups=8, micro_groups=4), 3, None, "nearest are groups 12$"),
        (Sampling(groups=8, micro_groups=4), 1, 10, "nearest is a batch_size of 8 or 12"),
        (Sampling(groups=8, micro_groups=4), 1, 2, "nearest is a batch_size of 4$"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(
    settings, devices: int, batch: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve(settings, AWM(), Regularisation(), devices=devices, prompts=batch)


def test_a_run_says_what_an_update_is_made_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trained(made(str(built())), [prompts(0)], 1, tmp_path)
    assert "an update, devices 1:" in caplog.text and "8 sampled and 12 learned" not in caplog.text
    assert "groups x pictures: 2 x 3; 2 a device or more" in caplog.text

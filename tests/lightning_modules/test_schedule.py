"""AdamW on masters of bfloat16 weights, 8-bit moments, and what a checkpoint of them restores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import Parameter

from data_pipeline.errors import InputError
from lightning_modules.schedule import AdamW, MasterAdamW, adamw, chunks

SETTINGS = AdamW(lr=1e-3, weight_decay=0.1, warmup_steps=0)


def parameters(dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (8, 6), "bias": (6,)}
    return [
        (name, Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)))
        for name, shape in shapes.items()
    ]


def stepped(named: list[tuple[str, Parameter]], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()


def test_masters_are_bit_for_bit_those_of_float32_training() -> None:
    low, high = parameters(torch.bfloat16), parameters(torch.float32)
    (a, _), (b, _) = adamw(low, SETTINGS, 100), adamw(high, SETTINGS, 100)
    assert isinstance(a, MasterAdamW)
    a.CHUNK = 10  # one parameter at a time
    stepped(low, a, 0, 20)
    stepped(high, b, 0, 20)
    for (_, p), (_, q) in zip(low, high, strict=True):
        assert torch.equal(a.state[p]["master"], q)
        assert torch.equal(p, q.bfloat16())


def test_small_steps_are_not_lost() -> None:
    named = [("weight", Parameter(torch.ones(4, 4, dtype=torch.bfloat16)))]
    optimizer, _ = adamw(named, AdamW(lr=1e-4, weight_decay=0.0, warmup_steps=0), 10_000)
    for _ in range(100):
        named[0][1].grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimizer.step()
    # Each step is a 40th of bfloat16's last place at 1, and would be rounded away.
    torch.testing.assert_close(named[0][1].float(), torch.full((4, 4), 0.99), atol=4e-3, rtol=0)


def test_a_restored_state_goes_on_exactly() -> None:
    whole, part = parameters(torch.bfloat16), parameters(torch.bfloat16)
    (a, _), (b, _) = adamw(whole, SETTINGS, 100), adamw(part, SETTINGS, 100)
    stepped(whole, a, 0, 10)
    stepped(part, b, 0, 5)
    resumed = [(name, Parameter(p.detach().clone())) for name, p in part]
    c, _ = adamw(resumed, SETTINGS, 100)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    stepped(resumed, c, 5, 10)
    for (_, p), (_, q) in zip(whole, resumed, strict=True):
        assert torch.equal(p, q) and torch.equal(a.state[p]["master"], c.state[q]["master"])
        assert c.state[q]["exp_avg"].dtype == torch.float32


def test_chunks_are_whole_and_in_order() -> None:
    tensors = [torch.zeros(n) for n in (3, 3, 9, 1, 1)]
    assert [[len(t) for t in chunk] for chunk in chunks(tensors, 6)] == [[3, 3], [9], [1, 1]]


def test_eight_bits_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.schedule.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torchao"):
        AdamW(bits=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_moments_step_and_follow_the_schedule(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao.optim", reason="torchao is optional (extra quant)")
    named = [("weight", Parameter(torch.ones(128, 64, dtype=dtype)))]
    optimizer, schedule = adamw(named, AdamW(lr=1e-2, warmup_steps=4, weight_decay=0.0, bits=8), 10)
    named[0][1].grad = torch.ones(128, 64, dtype=dtype)
    rate = float(optimizer.param_groups[0]["lr"])
    optimizer.step()
    schedule.step()
    assert named[0][1].float().mean() < 1 and float(optimizer.param_groups[0]["lr"]) == pytest.approx(2 * rate)
    assert optimizer.state[named[0][1]]["exp_avg"].codes.dtype == torch.uint8


def test_a_rate_that_is_no_number_and_a_run_without_steps_are_refused() -> None:
    for rate in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="lr and eps must be above 0"):
            AdamW(lr=rate)
    with pytest.raises(InputError, match="steps is 0"):
        adamw([("weight", torch.nn.Parameter(torch.ones(2)))], AdamW(), 0)

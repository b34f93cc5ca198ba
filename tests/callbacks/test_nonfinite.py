from pathlib import Path

import pytest
import torch
from toy import ToyBatch, ToyLoader, ToyModule, fingerprint, toy_trainer

from callbacks import EMA, NonFiniteError, NonFiniteGuard
from callbacks.nonfinite import all_finite


def fail(folder: Path, value: float, at: int, **options) -> tuple[ToyModule, EMA, str]:
    def poison(batch: ToyBatch) -> None:
        if f"s{at}" in batch.keys:
            batch.x[0, 0] = value

    module, ema = ToyModule(), EMA(0.9)
    trainer = toy_trainer(folder, [NonFiniteGuard(), ema], **options)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(module, ToyLoader(poison=poison))
    assert all(torch.isfinite(s["momentum_buffer"]).all() for s in trainer.optimizers[0].state.values())
    assert trainer.global_step == len(module.history) // trainer.accumulate_grad_batches
    return module, ema, str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_before_the_optimizer_and_names_step_parameters_and_samples(tmp_path: Path, value: float) -> None:
    module, ema, message = fail(tmp_path, value, at=12)
    assert torch.equal(module.layer.weight, module.history[2]) and len(module.history) == 3
    assert all(torch.isfinite(t).all() for t in ema.shadow.values())
    assert "after 3 optimizer steps" in message
    assert "layer.weight" in message and "frozen" not in message
    assert "loss nan of edit s12 (12), s13 (13), s14 (14), s15 (15)" in message  # inf - inf is nan


def test_names_all_micro_batches_of_the_step_and_no_earlier_ones(tmp_path: Path) -> None:
    _, _, message = fail(tmp_path, float("nan"), at=12, accumulate_grad_batches=2)
    assert "after 1 optimizer steps" in message
    assert "edit s8 (8)" in message and "loss nan of edit s12 (12)" in message
    assert "s4 (4)" not in message and "s16 (16)" not in message


def test_changes_nothing_in_a_healthy_run(tmp_path: Path) -> None:
    with_guard, without = ToyModule(), ToyModule()
    toy_trainer(tmp_path / "a", [NonFiniteGuard()]).fit(with_guard, ToyLoader())
    toy_trainer(tmp_path / "b", []).fit(without, ToyLoader())
    assert fingerprint(with_guard.state_dict()) == fingerprint(without.state_dict())


def test_gradients_whose_norm_overflows_are_finite(tmp_path: Path) -> None:
    class Steep(ToyModule):
        def training_step(self, batch: ToyBatch, batch_idx: int) -> torch.Tensor:
            return 1e30 * super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.layer.parameters(), lr=1e-35)

    module = Steep()
    toy_trainer(tmp_path, [NonFiniteGuard()], max_steps=2).fit(module, ToyLoader())
    assert len(module.history) == 2 and torch.isinf(module.gradient_norm())


def test_large_finite_values_pass_and_one_bad_element_does_not() -> None:
    large = [torch.full((3,), 1e30), torch.ones(2, dtype=torch.bfloat16), torch.tensor(2.0), torch.ones(0)]
    assert all_finite(large)
    assert not all_finite([*large, torch.tensor([1.0, float("nan")])])
    assert not all_finite([torch.tensor([1.0, float("-inf")]), *large])
    assert all_finite([])

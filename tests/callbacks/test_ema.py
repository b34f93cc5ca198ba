from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from toy import ToyLoader, ToyModule, fingerprint, toy_trainer

from callbacks import EMA, Checkpoint
from callbacks.ema import averaged
from data_pipeline.errors import InputError


def run(folder: Path, ema: EMA, module: ToyModule, *others: Callback, ckpt: Path | None = None, **options):
    trainer = toy_trainer(folder, [ema, *others], **options)
    trainer.fit(module, ToyLoader(), ckpt_path=ckpt)
    return trainer


def test_equals_average_computed_by_hand(tmp_path: Path) -> None:
    ema, module = EMA(decay=0.9, warmup=False), ToyModule()
    expected = module.layer.weight.detach().clone()
    run(tmp_path, ema, module, max_steps=5)
    for weight in module.history:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(ema.shadow["layer.weight"], expected)
    assert set(ema.shadow) == {"layer.weight", "layer.bias"}
    assert ema.updates == 5


def test_warmup_follows_one_plus_n_over_ten_plus_n(tmp_path: Path) -> None:
    ema, module = EMA(decay=0.15, warmup=True), ToyModule()
    expected = module.layer.weight.detach().clone()
    run(tmp_path, ema, module, max_steps=3)
    for decay, weight in zip([0.1, 0.15, 0.15], module.history, strict=True):  # 1/10, then 2/11 and 3/12 exceed 0.15
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.shadow["layer.weight"], expected)


def test_one_update_per_optimizer_step_under_accumulation(tmp_path: Path) -> None:
    ema, module = EMA(0.9, warmup=False), ToyModule()
    expected = module.layer.weight.detach().clone()
    run(tmp_path, ema, module, max_steps=3, accumulate_grad_batches=4)
    for weight in module.history[3::4]:
        expected = 0.9 * expected + 0.1 * weight
    assert len(module.history) == 12 and ema.updates == 3
    torch.testing.assert_close(ema.shadow["layer.weight"], expected)


class Manual(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward((self.frozen(self.layer(batch.x)) - 1).square().mean())
            optimizer.step()
            self.history.append(self.layer.weight.detach().clone())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def test_every_step_of_manual_optimization_is_averaged(tmp_path: Path) -> None:
    ema, module = EMA(0.9, warmup=False), Manual()
    expected = module.layer.weight.detach().clone()
    run(tmp_path, ema, module, max_steps=6)
    for weight in module.history:
        expected = 0.9 * expected + 0.1 * weight
    assert len(module.history) == 6 and ema.updates == 6
    torch.testing.assert_close(ema.shadow["layer.weight"], expected)


def test_high_decay_moves_for_bfloat16_weights(tmp_path: Path) -> None:
    ema, module = EMA(decay=0.9999, warmup=False), ToyModule(dtype=torch.bfloat16)
    start = module.layer.weight.detach().float()
    run(tmp_path, ema, module, max_steps=20)
    moved, target = ema.shadow["layer.weight"] - start, module.history[-1].float() - start
    assert ema.shadow["layer.weight"].dtype == torch.float32
    assert moved.abs().max() > 0
    assert (moved.sign() == target.sign())[target.abs() > 0.1].all()


def test_swap_is_exact_nests_and_survives_errors(tmp_path: Path) -> None:
    ema, module = EMA(0.9), ToyModule()
    trainer = run(tmp_path, ema, module)
    raw = fingerprint(module.state_dict())
    with averaged(trainer, module):
        assert torch.equal(module.layer.weight, ema.shadow["layer.weight"])
        with ema.swapped(module):
            assert torch.equal(module.layer.weight, ema.shadow["layer.weight"])
        assert torch.equal(module.layer.weight, ema.shadow["layer.weight"])
    assert fingerprint(module.state_dict()) == raw
    with pytest.raises(KeyError), ema.swapped(module):
        raise KeyError
    assert fingerprint(module.state_dict()) == raw


def test_full_precision_swap_exports_what_bfloat16_cannot_hold(tmp_path: Path) -> None:
    ema, module = EMA(0.9), ToyModule(dtype=torch.bfloat16)
    run(tmp_path, ema, module)
    raw = fingerprint(module.state_dict())
    with ema.swapped(module, full_precision=True):
        assert torch.equal(module.layer.weight, ema.shadow["layer.weight"])
        assert module.layer.weight.dtype == torch.float32
    assert fingerprint(module.state_dict()) == raw


def test_validation_and_test_see_the_average_and_training_goes_on_from_raw(tmp_path: Path) -> None:
    plain, watched, ema = ToyModule(), ToyModule(), EMA(0.9)
    toy_trainer(tmp_path / "a", []).fit(plain, ToyLoader())
    trainer = toy_trainer(tmp_path / "b", [ema], val_check_interval=3, limit_val_batches=1)
    trainer.fit(watched, ToyLoader(), ToyLoader())
    assert torch.equal(watched.validated, ema.shadow["layer.weight"])
    assert all(torch.equal(a, b) for a, b in zip(plain.history, watched.history, strict=True))
    trainer.test(watched, ToyLoader(2), verbose=False)
    assert torch.equal(watched.validated, ema.shadow["layer.weight"])
    assert torch.equal(watched.layer.weight, watched.history[-1])


def test_checkpoint_holds_raw_weights_and_the_average_once_and_restores_bits(tmp_path: Path) -> None:
    whole, part, resumed = EMA(0.9), EMA(0.9), EMA(0.9)
    module = ToyModule()
    run(tmp_path / "whole", whole, module, max_steps=7)
    run(tmp_path / "part", part, ToyModule(), Checkpoint(3), max_steps=3)
    path = tmp_path / "part/version_0/checkpoints/step_00000003.ckpt"
    saved = torch.load(path, weights_only=True)
    assert torch.equal(saved["state_dict"]["layer.weight"], module.history[2])
    assert fingerprint(saved["callbacks"]["EMA"]["shadow"]) == fingerprint(part.shadow)
    run(tmp_path / "resumed", resumed, ToyModule(), Checkpoint(100), ckpt=path, max_steps=7)
    assert fingerprint(resumed.shadow) == fingerprint(whole.shadow)
    assert resumed.updates == whole.updates == 7


def test_validate_from_a_checkpoint_uses_its_average(tmp_path: Path) -> None:
    ema = EMA(0.9)
    run(tmp_path, ema, ToyModule(), Checkpoint(3), max_steps=3)
    fresh, module = EMA(0.9), ToyModule()
    path = tmp_path / "version_0/checkpoints/step_00000003.ckpt"
    toy_trainer(tmp_path, [fresh, Checkpoint(3)]).validate(module, ToyLoader(1), ckpt_path=path, verbose=False)
    assert torch.equal(module.validated, ema.shadow["layer.weight"])
    assert torch.equal(module.layer.weight, torch.load(path, weights_only=True)["state_dict"]["layer.weight"])


def test_a_checkpoint_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    ema = EMA()
    ema.load_state_dict({"updates": 1, "shadow": {"layer.weight": torch.zeros(9, 9), "gone": torch.zeros(1)}})
    expected = r"missing \['layer.bias'\], unexpected \['gone'\].*\['layer.weight'\]"
    with pytest.raises(InputError, match=expected), ema.swapped(ToyModule()):
        pass


def test_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"is 1\.0"):
        EMA(decay=1.0)


def test_sharded_parameters_average_like_whole_ones() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))

        def shard(_: str, layer: torch.nn.Module, mesh: object) -> None:
            for name, p in list(layer.named_parameters(recurse=False)):
                sharded = distribute_tensor(p.detach(), mesh, [Shard(0)])
                layer.register_parameter(name, torch.nn.Parameter(sharded, requires_grad=p.requires_grad))

        whole, sharded, states = ToyModule(), ToyModule(), []
        distribute_module(sharded, mesh, shard)
        for module in (whole, sharded):
            ema = EMA(0.5, warmup=False)
            ema._prepare(module)
            with torch.no_grad():
                module.layer.weight.mul_(2)
            ema._update()
            states.append(ema.state_dict()["shadow"])
            with ema.swapped(module):
                pass
        assert isinstance(sharded.layer.weight, DTensor)
        assert fingerprint(states[0]) == fingerprint(states[1])
        restored = EMA(0.5)
        restored.load_state_dict({"updates": 1, "shadow": states[0]})
        restored._prepare(sharded)
        assert isinstance(restored.shadow["layer.weight"], DTensor)
        assert fingerprint(restored.state_dict()["shadow"]) == fingerprint(states[0])
    finally:
        dist.destroy_process_group()

"""What plan says is what is: FLOPs against counted ones, bytes against those of a run, activations against hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from micro import built
from rl import Stream, prompts
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from callbacks import EMA
from lightning_modules.kontext import KontextModule
from lightning_modules.needs.images import Pictures
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute
from lightning_modules.networks.footprint import Geometry, SavedTensors, outline, saved_bytes
from lightning_modules.networks.kontext_transformer import KontextTransformer
from lightning_modules.networks.published import SD35_MEDIUM
from lightning_modules.planning import Machine, Plan, Run, largest_batch, moments_bytes, shard_of
from lightning_modules.schedule import AdamW

GIB = 2**30
LORA = Lora(rank=4, alpha=8)
PLAIN, LOW = Compute(), Compute("bfloat16", "bfloat16")


def run(module: Any, size: int = 64, trainer: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run's numbers, as of a config."""
    common = {"ratio": {"text_to_image": 1, "edit": 1}, "batch_size": 4, "batch_tokens": None, "size_multiple": 32}
    return Run(module, trainer or {"max_steps": 10}, image_size=size, ema=True, keep=2, **{**common, **changes})


def full_size(compute: Compute = LOW, lora: Lora | None = None) -> Plan:
    """SD3.5-Medium at 512 x 512, whose weights are not here."""
    return Plan(run(KontextModule("weights/absent", lora=lora, compute=compute), 512, batch_size=8))


def sd35(lora: Lora | None = None) -> tuple[KontextTransformer, dict[str, Geometry]]:
    """SD3.5-Medium on the meta device, and a sample of each set."""
    pictures = Pictures(Path("weights/absent"), run(None, 512))
    return outline(SD35_MEDIUM, LOW, lora), pictures.samples(pictures.text_tokens(None))


@pytest.mark.parametrize("name", ["text_to_image", "edit"])
@pytest.mark.parametrize("lora", [None, Lora()])
def test_flops_are_the_counted_ones(name: str, lora: Lora | None) -> None:
    plan, (transformer, geometries) = full_size(lora=lora), sd35(lora)
    config, geometry = transformer.config, geometries[name]
    low = {"dtype": torch.bfloat16, "device": "meta"}
    latents = torch.empty(1, config.in_channels, *geometry.target, **low)
    with FlopCounterMode(display=False) as counter:
        velocity = transformer(
            hidden_states=latents,
            ref_hidden_states=latents if geometry.references else None,
            encoder_hidden_states=torch.empty(1, geometry.text, config.joint_attention_dim, **low),
            pooled_projections=torch.empty(1, config.pooled_projection_dim, **low),
            timestep=torch.empty(1, device="meta"),
        ).sample
        velocity.sum().backward()
    assert plan.loads[name].flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_sd35_mediums_roofline() -> None:
    """7.33 TFLOP a text-to-image sample at 512 x 512 with 333 text tokens, 14.70 an edit; 3.25 and 5.84 GiB kept."""
    plan, (transformer, geometries) = full_size(), sd35()
    assert plan.trained == 2_243_171_520 and geometries["edit"].text == 333
    assert plan.loads["text_to_image"].flops == pytest.approx(7.33e12, rel=2e-3)
    assert plan.loads["edit"].flops == pytest.approx(14.70e12, rel=2e-3)
    assert plan.rate("text_to_image") == pytest.approx(48.5, abs=0.1) and plan.rate("edit") == pytest.approx(
        24.2, abs=0.1
    )
    each = [saved_bytes(transformer, geometry, 1, False) / GIB for geometry in geometries.values()]
    assert each == pytest.approx([3.25, 5.84], abs=0.01)
    states = plan.states
    assert states["transformer"] == states["gradients"] == 2 * 2_243_171_520
    assert states["position table"] == 4 * 226_492_416
    assert plan.needs.assumed and plan.peak < 139 * GIB


def micro(compute: Compute = PLAIN, memory: float = 139.0, **changes: Any) -> Plan:
    """The micro model, so small that counting it takes no time."""
    return Plan(run(KontextModule(str(built()), compute=compute), **changes), Machine(memory=memory))


def test_the_largest_batch_is_the_last_that_fits() -> None:
    memory = 2 * micro(batch_size=64).peak / GIB
    room = largest_batch(micro(memory=memory))["edit"]
    assert 64 < room < largest_batch(micro(memory=memory))["text_to_image"]
    assert micro(batch_size=room).peak <= memory * GIB < micro(batch_size=room + 1).peak


def test_what_is_computed_again_takes_its_time() -> None:
    plain, again, half = (micro(Compute(recompute=what)) for what in (False, True, 1))
    assert again.rate("edit") == pytest.approx(plain.rate("edit") * 3 / 4)
    assert half.rate("edit") == pytest.approx(plain.rate("edit") * 3 / 3.5)
    assert again.loads["edit"].flops == plain.loads["edit"].flops
    assert again.peak < half.peak < plain.peak


@pytest.mark.parametrize(
    ("compute", "lora", "autocast"),
    [
        (Compute(), None, False),
        (Compute("bfloat16"), None, False),
        (Compute(), None, True),
        (Compute(recompute=True), None, False),
        (Compute(recompute="cheap"), None, False),
        (Compute(recompute=1), None, False),
        (Compute(), LORA, False),
        (Compute("bfloat16"), LORA, False),
    ],
)
@pytest.mark.parametrize("references", [0, 2])
def test_activations_are_those_that_autograd_saves(
    compute: Compute, lora: Lora | None, autocast: bool, references: int
) -> None:
    module = KontextModule(str(built()), lora=lora, compute=compute)
    module.configure_model()
    transformer, config, count = module.transformer, module.transformer.config, 3
    geometry = Geometry((8, 8), ((8, 8), (4, 8))[:references], 14)
    latents = torch.randn(count, config.in_channels, 8, 8)
    counter = SavedTensors([*transformer.parameters(), *transformer.buffers()])
    pictures = [torch.randn(config.in_channels, *size) for size in geometry.references]
    with counter.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        transformer(
            hidden_states=latents,
            ref_hidden_states=[pictures] * count if references else None,
            encoder_hidden_states=torch.randn(count, 14, config.joint_attention_dim),
            pooled_projections=torch.randn(count, config.pooled_projection_dim),
            timestep=torch.rand(count),
        ).sample.float().square().mean()
    made = outline(dict(config), compute, lora)
    assert saved_bytes(made, geometry, count, autocast) == pytest.approx(counter.bytes, rel=0.1)


@pytest.mark.parametrize("compute", [Compute(), Compute("bfloat16")])
@pytest.mark.parametrize("lora", [None, LORA])
def test_bytes_of_states_are_exact(compute: Compute, lora: Lora | None, tmp_path: Path) -> None:
    module, ema = KontextModule(str(built()), steps=2, lora=lora, compute=compute), EMA()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[ema],
    )  # fmt: skip
    trainer.fit(module, DataLoader(Stream([prompts(0), prompts(1)]), batch_size=None))
    module.flow_matching_loss(prompts(2)).backward()
    plan = Plan(run(KontextModule(str(built()), lora=lora, compute=compute)))
    optimizer = trainer.optimizers[0]
    state = [value for values in optimizer.state.values() for value in values.values()]
    idle = [p for _, p in module.trainable_parameters() if p not in optimizer.state]  # of the text's last output
    found = {
        "transformer": sum(p.nbytes for p in module.transformer.parameters()),
        "position table": sum(b.nbytes for b in module.transformer.buffers()),
        "gradients": sum(p.grad.nbytes if p.grad is not None else p.nbytes for _, p in module.trainable_parameters()),
        "optimiser": sum(value.nbytes for value in state),
        "average (EMA)": sum(value.nbytes for value in ema.shadow.values()),
        "text encoders": sum(
            p.nbytes for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
            for p in {id(p): p for p in getattr(module.pipeline(), name).parameters()}.values()
        ),
        "autoencoder": sum(p.nbytes for p in module.pipeline().vae.parameters()),
    }  # fmt: skip
    assert not idle and plan.states == found


def test_encoders_that_nothing_asks_for_are_counted_apart(tmp_path: Path) -> None:
    """As a run with full caches holds them: see test_encodings."""
    module = KontextModule(str(built()), text_cache=str(tmp_path / "texts"))
    plan, plain = Plan(run(module, cached=True)), Plan(run(KontextModule(str(built()))))
    parts = plain.states["text encoders"] + plain.states["autoencoder"]
    assert plan.peak == plain.peak and (plan.unasked, plain.unasked) == (parts, 0)
    [line] = [line for line in plan.lines() if "peak, caches full" in line]
    assert line.split("peak, caches full")[1].split()[0] == f"{(plan.peak - parts) / GIB:.2f}"
    assert "without text encoders and autoencoder" in line and not any("caches full" in each for each in plain.lines())


def test_a_run_on_more_devices_is_faster_and_sharded_states_are_smaller() -> None:
    class ShardedStrategy:
        class_path = "lightning_modules.strategies.ShardedStrategy"

    one = micro()
    eight = micro(trainer={"devices": 8, "max_steps": 10, "strategy": ShardedStrategy()})
    assert eight.step_samples == 8 * one.step_samples and eight.seconds == one.seconds
    assert eight.states["optimiser"] == sum(4 + 8 * shard_of(t, 8) for t in eight.moved) < one.states["optimiser"] / 6
    assert [shard_of(torch.empty(10, 3, device="meta"), n) for n in (1, 2, 4, 16)] == [30, 15, 9, 3]
    assert eight.checkpoint_bytes == one.checkpoint_bytes


def test_text_says_whether_it_fits() -> None:
    assert any("fits in 139 GiB" in line for line in micro().lines())
    assert any("does NOT fit" in line for line in micro(memory=1e-3).lines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_moments_are_counted_as_torchao_makes_them(dtype: torch.dtype) -> None:
    """Whole blocks of 256, a rest, and too few numbers."""
    torchao = pytest.importorskip("torchao.optim", reason="torchao is optional (extra quant)")
    shapes = [(128, 64), (65, 65), (4096,), (16, 16)]
    parameters = [torch.nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torchao.AdamW8bit(parameters)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    for parameter in parameters:
        held = sum(bytes_of(value) for value in optimizer.state[parameter].values())
        assert held == moments_bytes(parameter.numel(), 8, dtype == torch.bfloat16), parameter.shape
    plan = Plan(run(KontextModule(str(built()), optimizer=AdamW(bits=8))))
    assert plan.states["optimiser"] == sum(moments_bytes(t.numel(), 8, False) for t in plan.moved)


def bytes_of(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those that one of torchao's consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])

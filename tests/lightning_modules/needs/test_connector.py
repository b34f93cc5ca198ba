"""What plan says of queries and connectors is what is: FLOPs counted, bytes of a run, activations of hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rl
import torch
from counting import counted_flops
from micro import built, built_vlm, micro_metaquery
from rl import Stream, prompts
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from callbacks import EMA
from lightning_modules.connector import Connector, ConnectorModule
from lightning_modules.needs import connector
from lightning_modules.needs.images import Pictures
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute
from lightning_modules.networks.footprint import SavedTensors, image_inputs, outline
from lightning_modules.networks.outlines import QueriedStep, conditioner_outline, vlm_outline
from lightning_modules.networks.published import QWEN25_VL_7B, SD35_MEDIUM
from lightning_modules.networks.vlm import ROUND, Reading
from lightning_modules.planning import GIB, Plan, Run

LOW = Compute("bfloat16", "bfloat16")
SIZES = Connector(num_queries=16, width=32, inner=48, layers=2, heads=2)
STAGES: dict[str, dict[str, Any]] = {
    "stage 1": {"train": ["connector"]},
    "stage 3": {"train": ["connector", "transformer"]},
    "transformer alone": {"train": ["transformer"]},
    "low precision": {"train": ["connector"], "compute": LOW},
    "recomputed": {"train": ["connector", "transformer"], "compute": Compute(recompute=True)},
    "fused layers": {"train": ["connector"], "reading": Reading(layers=[-3, -2, -1])},
    "adapters": {"train": ["connector"], "vlm_lora": Lora(4, 8, ["q_proj", "v_proj"])},
    "text as the target": {"train": ["connector"], "target": "text"},
    "light head": {"train": ["connector"], "light_head": 1},
}


def made(name: str) -> ConnectorModule:
    return ConnectorModule(str(built()), str(built_vlm()), connector=SIZES, steps=2, **STAGES[name])


def run(module: Any, count: int = 3, size: int = 32, **changes: Any) -> Run:
    common = {"ratio": {"edit": 1}, "batch_size": count, "batch_tokens": None, "size_multiple": 16}
    trainer = changes.pop("trainer", {"max_steps": 2})
    return Run(module, trainer, image_size=size, ema=True, keep=2, **{**common, **changes})


def planned(module: ConnectorModule, batch: Any, monkeypatch: pytest.MonkeyPatch, **trainer: Any) -> Plan:
    """With the length that the batch's conversations have; adapters read them padded to a multiple of 8."""
    learns = module.vlm_lora is not None
    read = module.pipeline().read if learns else module._queries.prefixes
    lengths = [each["cache"].shape[-2] for each in read(batch.prompts, batch.pixels())]
    mean = round(sum(-(-n // ROUND) * ROUND if learns else n for n in lengths) / len(lengths))
    monkeypatch.setattr(connector, "TEXT", mean - (int(32 * 28 / 32) // 28) ** 2)  # a picture of 32 x 32 is one token
    return Plan(run(module, len(batch), trainer={"max_steps": 2, **trainer}))


@pytest.mark.parametrize(
    ("train", "name"),
    [
        (["connector", "transformer"], "edit"),
        *(
            pytest.param(train, name, marks=pytest.mark.slow)  # a dozen seconds each
            for train in (["connector"], ["transformer"], ["connector", "transformer"])
            for name in ("text_to_image", "edit")
            if (len(train), name) != (2, "edit")
        ),
    ],
)
def test_full_size_flops_are_the_counted_ones(train: list[Any], name: str) -> None:
    module = ConnectorModule("weights/absent", "weights/absent_vlm", train=train, compute=LOW)
    config = run(module, 8, 512, ratio={name: 1})
    pictures = Pictures(Path("weights/absent"), config)
    vlm = vlm_outline(QWEN25_VL_7B, Reading(), torch.bfloat16, None)
    transformer = outline(SD35_MEDIUM, LOW, None, train="transformer" in train)
    sizes = connector.conditioner_config(module, None, vlm, transformer)
    step = QueriedStep(transformer, conditioner_outline(sizes, LOW, "connector" in train), vlm, reads=False)
    geometry, prefix = pictures.samples(256)[name], connector.TEXT + 256 * (name == "edit")
    found = counted_flops(step, lambda: {"prefix": prefix, "images": image_inputs(transformer.config, geometry, 1)})
    assert Plan(config).loads[name].flops == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(
    "name", ["stage 1", "stage 3", "transformer alone", "low precision", "fused layers", "text as the target"]
)
def test_flops_are_those_that_a_run_reports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(name)
    module.configure_model()
    batch = module.latent_encoder().encode_batch(prompts(0, "edit", 3))
    plan = planned(module, batch, monkeypatch)
    module.flow_matching_loss(batch)
    assert 3 * plan.loads["edit"].flops == pytest.approx(module.training_flops(batch), rel=1e-6)


def test_flops_to_read_are_the_counted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made("stage 1")
    module.configure_model()
    batch = prompts(0, "edit", 3)
    plan = planned(module, batch, monkeypatch)
    module.pipeline().vlm.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.pipeline().read(batch.prompts[:1], batch.pixels()[:1], 1)
    assert plan.loads["edit"].again == pytest.approx(counter.get_total_flops(), rel=0.02)


ONCE = ("low precision", "light head")  # the weights say the precision, or another stage is alike under autocast


@pytest.mark.parametrize("autocast, name", [(a, n) for a in (False, True) for n in STAGES if not (a and n in ONCE)])
def test_activations_are_those_that_autograd_saves(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(name)
    module.configure_model()
    batch = module.latent_encoder().encode_batch(prompts(0, "edit", 3))
    plan = planned(module, batch, monkeypatch, precision="bf16-mixed" if autocast else "32-true")
    pipeline = module.pipeline()
    prefix = pipeline.vlm.prefix
    monkeypatch.setattr(pipeline.vlm, "prefix", lambda *own: prefix(*own[:3], 1))  # each is read alone, as on a GPU
    parts = pipeline.transformer, pipeline.conditioner, pipeline.vlm
    counter = SavedTensors([t for part in parts for t in (*part.parameters(), *part.buffers())])
    with counter.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module.flow_matching_loss(batch)
    assert plan.activations["edit"] == pytest.approx(counter.bytes, rel=0.1)


@pytest.mark.parametrize("name", ["stage 1", "stage 3", "low precision", "adapters"])
def test_bytes_of_states_are_exact(name: str, tmp_path: Path) -> None:
    module, ema = made(name), EMA()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[ema], gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Stream([prompts(0), prompts(1)]), batch_size=None))
    plan, pipeline = Plan(run(made(name))), module.pipeline()
    learned = [p for _, p in module.trainable_parameters()]
    found = {
        "transformer": sum(p.nbytes for p in pipeline.transformer.parameters()),
        "position table": sum(b.nbytes for b in pipeline.transformer.buffers()),
        "queries and connector": sum(p.nbytes for p in pipeline.conditioner.parameters()),
        "vision-language model": sum(p.nbytes for p in pipeline.vlm.parameters()),
        "autoencoder": sum(p.nbytes for p in pipeline.vae.parameters()),
        "gradients": sum(p.nbytes for p in learned),
        "average (EMA)": sum(value.nbytes for value in ema.shadow.values()),
    }
    assert {part: plan.states[part] for part in found} == found
    state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
    idle = sum(
        p.nbytes * (2 if p.dtype == torch.float32 else 6) + 4 for p in learned if p not in trainer.optimizers[0].state
    )
    assert plan.optimiser_bytes == sum(value.nbytes for value in state) + idle


def test_full_size_is_planned_without_weights() -> None:
    """Qwen2.5-VL-7B has 8.29 billion parameters, the released connector 1.0 with its projections, SD3.5-Medium 2.24."""
    module = ConnectorModule("weights/absent", "weights/absent_vlm", compute=LOW)
    plan = Plan(run(module, 8, 512, ratio={"text_to_image": 1, "edit": 1}))
    sizes = {part.name: part.numbers for part in plan.needs.parts}
    assert sizes["vision-language model"] == 8_292_166_656 and sizes["transformer"] == 2_243_171_520
    assert plan.trained == sizes["queries and connector"] and len(plan.needs.assumed) == 3
    assert plan.loads["edit"].again > plan.loads["text_to_image"].again > 0
    assert plan.states["vision-language model"] == 2 * 8_292_166_656 and plan.peak < 139 * GIB
    kept = Plan(run(ConnectorModule("weights/absent", "weights/absent_vlm", feature_cache="features"), 8, 512))
    assert kept.loads["edit"].again == 0


def test_an_earlier_conditioner_is_planned_as_it_is(tmp_path: Path) -> None:
    folder = str(micro_metaquery(tmp_path / "metaquery"))
    module = ConnectorModule(folder, train=["transformer"])
    plan = Plan(run(module))
    module.configure_model()
    sizes = {part.name: part.numbers for part in plan.needs.parts}
    assert sizes["queries and connector"] == sum(p.numel() for p in module.conditioner.parameters())
    absent = Plan(run(ConnectorModule(str(built()), str(built_vlm()), conditioner="runs/none/export")))
    assert any("runs/none/export is not here" in text for text in absent.needs.assumed)


def test_reinforcement_of_a_metaquery_model_is_planned(tmp_path: Path) -> None:
    folder = str(micro_metaquery(tmp_path / "metaquery"))
    module = rl.made(folder)
    plan = Plan(run(module))
    module.configure_model()
    pipeline = module.pipeline()
    sizes = {part.name: part.numbers for part in plan.needs.parts}
    for name, part in (("conditioner", pipeline.conditioner), ("vlm", pipeline.vlm)):
        assert sizes[name] == sum(p.numel() for p in part.parameters())
    assert sizes["text encoders"] == 0 and plan.peak > 0

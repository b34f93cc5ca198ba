"""What plan says of edit rewards is what is: FLOPs counted, bytes of a run, activations of hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro import built, tiny_vlm
from rl import prompts
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import InputError
from lightning_modules.edit_reward import EditRewardModule
from lightning_modules.needs import rewards
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.edit_readers import Tower
from lightning_modules.networks.footprint import SavedTensors
from lightning_modules.planning import Plan, Run

TOWER = Tower(arguments={"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]}, image_size=32, width=16, layers=1, heads=2)
LORA = Lora(4, 8, ["self_attn.q_proj", "self_attn.v_proj"])


def run(module: Any, size: int = 32, **trainer: Any) -> Run:
    return Run(module, {"max_steps": 2, **trainer}, size, {"edit": 1.0}, 4, None, 32, ema=False, keep=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_vlm(tmp_path_factory.mktemp("vlm") / "vlm"))


def made(folder: str, kind: str) -> EditRewardModule:
    if kind == "tower":
        return EditRewardModule(str(built()), TOWER)
    changes: dict[str, Any] = {"lora": {"lora": LORA}, "frozen": {"frozen": ["visual"]}}.get(kind.split()[0], {})
    return EditRewardModule(folder, gradient_checkpointing="recomputed" in kind, **changes)


def learned(module: EditRewardModule, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Inputs of a batch, and the plan for instructions as long as its own."""
    module.configure_model()
    batch = prompts(0, "edit", 4)
    shown = [[*own, target] for own, target in zip(batch.references, batch.target, strict=True)]
    inputs = module.regressor.prepare(batch.prompts, [[p / 2 + 0.5 for p in pictures] for pictures in shown])
    if module.tower is None:
        pictures = int(inputs["image_grid_thw"].prod(dim=1).sum()) // 4 // 4
        monkeypatch.setattr(rewards, "TEXT", inputs["input_ids"].shape[1] - pictures)
    return inputs, Plan(run(module))


@pytest.mark.parametrize("kind", ["lora", "frozen tower", "tower"])
def test_flops_are_the_counted_ones(folder: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(folder, kind)
    inputs, plan = learned(module, monkeypatch)
    if kind != "tower":
        module.regressor.reader.model.set_attn_implementation("eager")
    own = 0.0
    if kind == "tower":
        with FlopCounterMode(display=False) as texts, torch.no_grad():
            module.regressor.reader.encoder(inputs["input_ids"], inputs["attention_mask"])
        own = texts.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        module.regressor(inputs).sum().backward()
    assert 4 * plan.loads["edit"].flops == pytest.approx(counter.get_total_flops() - own, rel=0.02)


@pytest.mark.parametrize("kind", ["lora", "lora recomputed", "frozen tower", "tower"])
def test_activations_are_those_that_autograd_saves(folder: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(folder, kind)
    inputs, plan = learned(module, monkeypatch)
    if "recomputed" in kind:
        module.regressor.train()
    counter = SavedTensors([*module.parameters(), *module.buffers()])
    with counter.hooks():
        module.regressor(inputs)
    assert plan.activations["edit"] == pytest.approx(counter.bytes, rel=0.1)


@pytest.mark.parametrize("kind", ["lora", "frozen tower", "tower"])
def test_bytes_of_states_are_exact(folder: str, kind: str) -> None:
    module = made(folder, kind)
    plan = Plan(run(module))
    module.configure_model()
    every, moved = list(module.parameters()), [p for _, p in module.trainable_parameters()]
    assert sum(part.bytes for part in plan.needs.parts) == sum(p.nbytes for p in every)
    assert plan.states["gradients"] == sum(p.nbytes for p in moved)
    assert plan.optimiser_bytes == sum(8 * p.numel() + 4 for p in moved)


def test_full_size_is_planned_without_weights_and_a_trained_tower_is_refused(folder: str) -> None:
    targets = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    module = EditRewardModule("models/none", lora=Lora(64, 128, targets), gradient_checkpointing=True)
    plan = Plan(run(module, 512, precision="bf16-mixed"))
    sizes = {part.name: part.numbers for part in plan.needs.parts}
    assert sizes["vision tower"] == pytest.approx(677e6, rel=0.01)
    assert plan.trained == 28 * 64 * (4 * 3584 + 2 * (3584 + 512)) + 2 * 3584 + 2
    assert plan.states["language model"] > 2 * 7.0e9 and any("models/none is not here" in t for t in plan.needs.assumed)
    with pytest.raises(InputError, match="name visual in frozen"):
        Plan(run(EditRewardModule(folder)))

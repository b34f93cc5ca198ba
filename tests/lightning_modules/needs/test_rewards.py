"""What plan says of edit rewards is what is: FLOPs counted, bytes of a run, activations of hooks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counted_flops
from micro import built, tiny_vlm
from rl import prompts
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from data_pipeline.errors import InputError
from lightning_modules.edit_reward import EditRewardModule
from lightning_modules.needs import rewards
from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.edit_readers import Tower
from lightning_modules.networks.flops import qwen_vision_flops
from lightning_modules.networks.footprint import SavedTensors
from lightning_modules.networks.outlines import RatedStep, vlm_outline
from lightning_modules.networks.published import QWEN25_VL_7B
from lightning_modules.networks.vlm import Reading
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


def longest(module: EditRewardModule) -> dict[str, torch.Tensor]:
    """Texts as long as a tower reads them, which is what is planned."""
    size = module.regressor.reader.tokenizer.model_max_length
    return {name: torch.ones(4, size, dtype=torch.long) for name in ("input_ids", "attention_mask")}


def learned(module: EditRewardModule, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Inputs of a batch, and the plan for instructions as long as its own."""
    module.configure_model()
    batch = prompts(0, "edit", 4)
    shown = [[*own, target] for own, target in zip(batch.references, batch.target, strict=True)]
    inputs = module.regressor.prepare(batch.prompts, [[p / 2 + 0.5 for p in pictures] for pictures in shown])
    if module.tower is not None:
        inputs |= longest(module)
    else:
        pictures = int(inputs["image_grid_thw"].prod(dim=1).sum()) // 4 // 4
        monkeypatch.setattr(rewards, "TEXT", inputs["input_ids"].shape[1] - pictures)
    return inputs, Plan(run(module))


@pytest.mark.parametrize("lora", [LORA, None])
def test_flops_are_the_counted_ones(lora: Lora | None, tmp_path: Path) -> None:
    """At the published widths, two layers deep, where nothing but a config is needed."""
    text = {**QWEN25_VL_7B["text_config"], "num_hidden_layers": 2}
    config = {**QWEN25_VL_7B, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = Plan(run(EditRewardModule(str(tmp_path), lora=lora, frozen=["visual"]), 512))
    model = vlm_outline(config, Reading(), torch.bfloat16, None).model.model
    if lora is None:
        model.language_model.requires_grad_(True)
    else:
        with torch.device("meta"):
            add_lora(model, lora, 0)
    load, vision = plan.loads["edit"], model.config.vision_config
    assert load.tokens == rewards.TEXT + 2 * 18 * 18
    found = counted_flops(RatedStep(model.language_model), lambda: {"count": 1, "tokens": load.tokens})
    assert load.flops - 2 * qwen_vision_flops(vision, 36, 36) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("grid", [(8, 8), (20, 12)])
def test_flops_of_the_vision_tower_are_the_counted_ones(grid: tuple[int, int]) -> None:
    sizes = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 80}
    config = Qwen2_5_VLVisionConfig(**sizes, patch_size=14, window_size=112, fullatt_block_indexes=[1])
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="eager")
    patches = torch.randn(grid[0] * grid[1], 3 * 2 * 14**2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(patches, torch.tensor([[1, *grid]]))
    assert qwen_vision_flops(config, *grid) == pytest.approx(counter.get_total_flops(), rel=0.02)


def convolution_backward_flops(gradient: Any, _: Any, weight: Any, *rest: Any, **__: Any) -> int:
    """To inputs and weights, each as forward; torch's own formula counts a grouped one as if it had no groups."""
    wanted = rest[-1][:2]  # inputs, weights
    return 2 * math.prod(weight) * gradient[0] * math.prod(gradient[2:]) * sum(wanted)


GROUPED = {torch.ops.aten.convolution_backward: convolution_backward_flops}


def test_flops_of_a_small_tower_are_the_counted_ones() -> None:
    module = EditRewardModule(str(built()), TOWER)
    module.configure_model()
    batch = prompts(0, "edit", 4)
    shown = [[*own, target] for own, target in zip(batch.references, batch.target, strict=True)]
    inputs = module.regressor.prepare(batch.prompts, shown) | longest(module)
    with FlopCounterMode(display=False) as texts, torch.no_grad():
        module.regressor.reader.encoder(inputs["input_ids"], inputs["attention_mask"])
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        module.regressor(inputs).sum().backward()
    found = counter.get_total_flops() - texts.get_total_flops()
    assert 4 * Plan(run(module)).loads["edit"].flops == pytest.approx(found, rel=0.02)


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
    with pytest.raises(InputError, match="vision tower is frozen, as lora or visual in frozen"):
        Plan(run(EditRewardModule(folder)))

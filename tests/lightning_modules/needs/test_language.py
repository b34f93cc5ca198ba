"""What plan says of R1V is what is: FLOPs counted, bytes of a run, activations of hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from chains import asked, grpo
from chains import folder as r1v_folder
from counting import counted_flops
from micro_r1v import part, question_shards

from data_pipeline.chat_datamodule import ChatDataModule
from lightning_modules.losses.token_policy import log_probs
from lightning_modules.losses.tokens import before_learned
from lightning_modules.needs.language import Outlined
from lightning_modules.networks.footprint import SavedTensors
from lightning_modules.networks.loading import read_json
from lightning_modules.networks.published import INTERNVIT_6B, QWEN25_32B
from lightning_modules.planning import GIB, Plan, Run
from lightning_modules.reasoning import R1VModule
from lightning_modules.schedule import AdamW

ALL = ["projector", "language", "vision"]


def module(**changes: Any) -> R1VModule:
    settings = {"vision": str(part("tower")), "language": str(part("reasoner")), "context": 256, "max_tiles": 1}
    return R1VModule(**{**settings, "optimizer": AdamW(warmup_steps=0), "steps": 2, **changes})


def run(own: Any, count: int = 4, **trainer: Any) -> Run:
    return Run(own, {"max_steps": 2, **trainer}, 0, {"conversations": 1.0}, count, None, 1, ema=False, keep=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(question_shards(tmp_path_factory.mktemp("chat") / "shards"))


def served(shards: str) -> ChatDataModule:
    found = ChatDataModule([shards], batch_size=4, steps=2, val_batches=0)
    found.setup("fit")
    return found


def outlined(train: list[str], recompute: bool = False) -> Outlined:
    tower, words = (read_json(part(name) / "config.json") for name in ("tower", "reasoner"))
    return Outlined.of(tower, words, 1, run(None), train, recompute)


@pytest.mark.parametrize("train", [["projector"], ["projector", "language"], ALL], ids="+".join)
def test_flops_are_the_counted_ones(train: list[str]) -> None:
    """At the published widths, a few layers deep."""
    tower, words = {**INTERNVIT_6B, "num_hidden_layers": 3}, {**QWEN25_32B, "num_hidden_layers": 3}
    model = Outlined.of(tower, words, 1, run(None), train, False)
    arguments = {"rows": 1, "length": 2048, "tiles": 1, "side": 448, "tokens": 256, "learned": 2047}
    found = counted_flops(model.step, lambda: arguments)
    if "vision" not in train:  # whose features are given
        found += counted_flops(model.step.vision, lambda: {"pixels": torch.empty(1, 3, 448, 448).bfloat16()}, False)
    assert model.trained_flops(2048, 1)[0] == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("train", [["projector"], ALL], ids=["projector", "all"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_saves(train: list[str], recompute: bool, shards: str) -> None:
    own = module(train=train, gradient_checkpointing=recompute)
    own.configure_model()
    own.model.language.train(recompute)
    rows = own.rows(next(iter(served(shards).train_dataloader())))
    counter = SavedTensors([*own.model.parameters(), *own.model.buffers()])
    with counter.hooks():
        own.loss(rows)
    count, length = rows.input_ids.shape
    assert count == 1 and int(rows.attention_mask.max()) > 1  # several in a row, which do not see one another
    learned = int(before_learned(rows.labels).sum())
    found = outlined(train, recompute).kept(length, len(rows.tiles), learned, count)
    assert found == pytest.approx(counter.bytes, rel=0.1)


def test_activations_of_answers_are_those_that_autograd_saves() -> None:
    own = grpo(gradient_checkpointing=True)
    own.configure_model()
    own.log = lambda *_, **__: None
    questions = own.questions(asked(0, 2))
    answers = own.sample(questions)
    batch = own.padded([answers[0], answers[4]])  # one to each question
    own.model.language.train(True)
    counter = SavedTensors([*own.model.parameters(), *own.model.buffers()])
    with counter.hooks():
        new = log_probs(own.logits(batch), batch.tokens)
    count, length = len(new), batch.prompts.input_ids.shape[1] + batch.tokens.shape[1]
    config = read_json(Path(r1v_folder()) / "config.json")
    made = Outlined.of(config["vision_config"], config["llm_config"], 1, run(None), ["projector"], True)
    assert len(batch.prompts.tiles) == count
    found = made.kept(length, 1, batch.tokens.shape[1], count)
    assert found == pytest.approx(counter.bytes, rel=0.1)


@pytest.mark.parametrize("train", [["projector"], ALL], ids=["projector", "all"])
def test_bytes_of_states_are_exact(train: list[str], shards: str, tmp_path: Path) -> None:
    own = module(train=train)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(own, datamodule=served(shards))
    plan = Plan(run(module(train=train)))
    parts = {"vision tower": own.model.vision, "projector": own.model.projector, "language model": own.model.language}
    state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
    found = {name: sum(p.nbytes for p in each.parameters()) for name, each in parts.items()}
    found["gradients"] = sum(p.nbytes for _, p in own.trainable_parameters())
    found["optimiser"] = sum(value.nbytes for value in state)
    assert plan.states == found


def test_full_size_is_planned_without_weights() -> None:
    """Qwen2.5-32B has 32.76 billion parameters, InternViT-6B 5.54, R1V's projector 0.09."""
    own = R1VModule("models/none", "models/no_language", context=4096, gradient_checkpointing=True)
    plan = Plan(run(own, 1))
    sizes = {part.name: part.numbers for part in plan.needs.parts}
    assert sizes["language model"] == 32_763_876_352 and sizes["vision tower"] == pytest.approx(5.54e9, rel=2e-3)
    assert plan.trained == sizes["projector"] == 2 * 12800 + 12800 * 5120 + 5120 + 5120**2 + 5120
    assert plan.states["language model"] == 2 * 32_763_876_352 and plan.peak < 139 * GIB
    language, tower = 4 * 4096 * 32.0e9, 13 * 1025 * 2 * 5.54e9  # forward and to inputs; 13 tiles, forward alone
    attention = 3 * 4 * 64 * 4096**2 * 5120  # of the language model, forward once and backward twice
    assert plan.loads["conversations"].flops == pytest.approx(language + tower + attention, rel=0.02)
    assert len(plan.needs.assumed) == 3 and any("tokens/s" in line for line in plan.lines())


def test_batches_of_tokens_are_planned_by_rows() -> None:
    own = module(context=1024)
    made = Outlined.of(*(read_json(part(n) / "config.json") for n in ("tower", "reasoner")), 1, run(None), ALL, False)
    rows = Plan(replace(run(own, 1), batch_tokens=2048)).loads["conversations"]
    length = min(1024, made.seen + 1024)
    assert (rows.together, rows.batch) == (2, 2048 // length)
    assert Plan(replace(run(own, 1), batch_tokens=2048)).peak == Plan(run(own, 2)).peak


def test_answers_are_planned_with_what_sampling_holds_and_reads() -> None:
    plan = Plan(run(grpo(), 2))
    load, sampling = plan.loads["conversations"], grpo().sampling
    assert plan.step_samples == sampling.groups * sampling.group_size and load.together == sampling.micro_answers
    assert load.streamed > sampling.max_new_tokens * plan.states["language model"] / sampling.group_size
    [(name, size)] = plan.needs.meanwhile.items()
    assert "keys and values of 4 answers" in name and size == 4 * 128 * 2 * 2 * 32 * 4  # layers, both, width, float32
    assert plan.peak >= sum(plan.states.values()) + size

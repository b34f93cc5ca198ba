"""A reward learned from a judge's scores: what it learns from, what it reports, and the reward that its export is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from micro import judged_shards, micro_folder, tiny_vlm
from torch.utils.data import DataLoader

from callbacks import EMA, Export
from data_pipeline.batches import ImageBatch
from data_pipeline.datamodule import ShardDataModule
from data_pipeline.errors import InputError
from lightning_modules.edit_reward import EditRewardModule
from lightning_modules.evaluation.agreement import agreement
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.edit_readers import Tower
from lightning_modules.rewards.learned import LearnedEditReward
from lightning_modules.rewards.protocol import Request
from lightning_modules.schedule import AdamW

TOWER = Tower(arguments={"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]}, image_size=32, width=16, layers=1, heads=2)
BOTH = {"instruction": "judge_instruction", "preservation": "judge_preservation"}
FAST = AdamW(lr=3e-3, warmup_steps=0, weight_decay=0.0)


def batch(number: int, count: int = 8) -> ImageBatch:
    """Edits whose targets are between blue and red: how red is how well the instruction was followed, out of 10."""
    generator = torch.Generator().manual_seed(number)
    levels = torch.rand(count, generator=generator)
    colours = torch.stack([levels, torch.zeros(count), 1 - levels], dim=1)
    return ImageBatch(
        tasks=["edit"] * count,
        keys=[f"k{number}-{i}" for i in range(count)],
        sample_ids=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=["make it red"] * count,
        target=(2 * colours - 1)[:, :, None, None].expand(-1, 3, 32, 32).clone(),
        references=torch.zeros(count, 1, 3, 32, 32),
        metadata=[{"judge_instruction": 10 * level, "judge_preservation": 5} for level in levels.tolist()],
    )


def trainer(root: Path, steps: int, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_steps=steps, default_root_dir=root, **{**quiet, **options})


def loader(*numbers: int) -> DataLoader:
    return DataLoader([batch(n) for n in numbers], batch_size=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_folder(tmp_path_factory.mktemp("micro") / "folder"))


def test_what_is_learned_agrees_with_the_judge_and_its_export_is_a_reward(folder: str, tmp_path: Path) -> None:
    module = EditRewardModule(folder, TOWER, BOTH, highest=10.0, optimizer=FAST, steps=100)
    run = trainer(tmp_path, 100, callbacks=[EMA(0.9), Export()], gradient_clip_val=1.0, max_epochs=-1)
    run.fit(module, loader(*range(40)), loader(*range(100, 104)))
    metrics = run.callback_metrics
    assert metrics["val/spearman_instruction"] > 0.9 and metrics["val/pairwise_instruction"] > 0.9
    assert metrics["val/pearson_reward"] > 0.9 and metrics["val/loss"] < 0.02
    reward, held_out = LearnedEditReward(str(tmp_path / "export"), batch_size=3), batch(200)
    requests = [Request(p, tuple(r / 2 + 0.5)) for p, r in zip(held_out.prompts, held_out.references, strict=True)]
    scores = reward.score(held_out.target / 2 + 0.5, requests)
    wanted = [facts["judge_instruction"] / 20 for facts in held_out.metadata]
    assert scores == pytest.approx(wanted, abs=0.15)
    alone = LearnedEditReward(str(tmp_path / "export"), ["preservation"])
    assert alone.score(held_out.target / 2 + 0.5, requests) == pytest.approx([0.5] * 8, abs=0.1)


def test_validation_reports_what_agreement_says_of_each_dimension_and_of_their_product(folder: str, tmp_path) -> None:
    module = EditRewardModule(folder, TOWER, BOTH, highest=10.0)
    data = [batch(n) for n in range(3)]
    data = [replace(b, metadata=[f | {"group": str(i % 2)} for i, f in enumerate(b.metadata)]) for b in data]
    module.configure_model()
    torch.nn.init.normal_(module.regressor.head.weight, std=0.1)
    run = trainer(tmp_path, 1)
    (found,) = run.validate(module, DataLoader(data, batch_size=None), verbose=False)
    module.eval()
    with torch.no_grad():
        predicted = torch.cat([module.predict(b) for b in data])
    judged = torch.cat([module.judged(b) for b in data])
    groups = [facts["group"] for b in data for facts in b.metadata]
    for name, columns in {
        "instruction": (predicted[:, 0], judged[:, 0]),
        "reward": (predicted.clamp(0, 1).prod(1), judged.prod(1)),
    }.items():
        for metric, value in agreement(*columns, groups).items():
            assert found[f"val/{metric}_{name}"] == pytest.approx(value, abs=1e-5), metric


def test_shards_of_ones_own_edits_are_trained_on_and_held_out_scenes_validated_on(folder: str, tmp_path: Path) -> None:
    data = ShardDataModule(
        [str(judged_shards(tmp_path / "shards", 32, 2))],
        batch_size=4,
        val_batches=1,
        steps=3,
        index_root=str(tmp_path / "index"),
    )
    module = EditRewardModule(folder, replace(TOWER, image_size=64), steps=3)
    seen: list[ImageBatch] = []
    predict = module.predict
    module.predict = lambda b: (seen.append(b), predict(b))[1]  # type: ignore[method-assign]
    run = trainer(tmp_path, 3, val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    assert [len(b) for b in seen] == [4] * 4 and {b.task for b in seen} == {"edit"}
    held_out = {facts["group"] for facts in seen[-1].metadata}
    assert held_out == {"edit-0000030", "edit-0000031"}  # a sixteenth, at the end
    assert not held_out & {facts["group"] for b in seen[:-1] for facts in b.metadata}
    assert "val/spearman_reward" in run.callback_metrics


def test_adapters_of_a_vision_language_model_are_all_that_is_trained_and_saved(tmp_path: Path) -> None:
    module = EditRewardModule(
        str(tiny_vlm(tmp_path / "vlm")),
        dimensions=BOTH,
        highest=10.0,
        lora=Lora(2, 4, ["q_proj", "v_proj"]),
        gradient_checkpointing=True,
        optimizer=FAST,
    )
    module.configure_model()
    calls: list[bool] = []
    language = module.regressor.reader.model.get_decoder()
    language.layers[0].mlp.register_forward_pre_hook(lambda layer, _: calls.append(layer.training))
    run = trainer(tmp_path, 2, callbacks=[Export()])
    run.fit(module, loader(0, 1))
    assert calls == [True] * 4  # twice a step: activations are computed again
    names = {name for name, _ in module.trainable_parameters()}
    assert names and all("lora_" in name or name.startswith("regressor.head") for name in names)
    moved = [name for name, p in module.trainable_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == 4  # queries and values of both layers, through recomputed activations
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names
    scores = LearnedEditReward(str(tmp_path / "export")).score(
        torch.rand(1, 3, 64, 64), [Request("a", (torch.rand(3, 64, 64),))]
    )
    assert len(scores) == 1 and 0 <= scores[0] <= 1


def test_parts_of_a_vision_language_model_can_be_frozen(tmp_path: Path) -> None:
    module = EditRewardModule(str(tiny_vlm(tmp_path / "vlm")), frozen=["visual"])
    module.configure_model()
    names = {name for name, _ in module.trainable_parameters()}
    assert names and not any("visual" in name for name in names)
    module.predict(batch(0, 2)).sum().backward()


def test_what_has_no_score_and_what_cannot_be_is_named(folder: str, tmp_path: Path) -> None:
    module = EditRewardModule(folder, TOWER, BOTH, highest=1.0)
    with pytest.raises(InputError, match=r"k0-0 has .*judge_preservation': 5.*expected scores from 0 to 1"):
        module.judged(batch(0))
    with pytest.raises(InputError, match="judge_instruction': None"):
        module.judged(replace(batch(0), metadata=[{}] * 8))
    module.configure_model()
    with pytest.raises(InputError, match="expected edits"):
        module.predict(replace(batch(0), references=None))
    with pytest.raises(InputError, match="not for a tower"):
        EditRewardModule(folder, TOWER, frozen=["visual"])
    with pytest.raises(InputError, match="above 0"):
        EditRewardModule(folder, TOWER, highest=0)
    module.regressor.save_pretrained(tmp_path / "export")
    asked = Request("a", (torch.zeros(3, 32, 32),))
    with pytest.raises(InputError, match="instruction, preservation, and not quality"):
        LearnedEditReward(str(tmp_path / "export"), ["quality"]).score(torch.zeros(1, 3, 32, 32), [asked])
    with pytest.raises(InputError, match="without a picture to edit"):
        LearnedEditReward(str(tmp_path / "export")).score(torch.zeros(1, 3, 32, 32), [Request("a cat")])

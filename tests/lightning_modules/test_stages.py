"""Reinforcement of two tasks in one run, and what a stage is held to: its own start, or that of an earlier stage."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from micro import Brightness, micro_folder
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.planning import Plan, Run
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards.weighted import Weighted
from lightning_modules.rollouts.algorithms import DiffusionNFT
from lightning_modules.rollouts.records import Rollout
from lightning_modules.rollouts.settings import Regularisation, Sampling
from lightning_modules.schedule import AdamW


def prompts(number: int, task: str, count: int = 3) -> ImageBatch:
    generator = torch.Generator().manual_seed(number)
    references = torch.rand(count, 1, 3, 32, 32, generator=generator) * 2 - 1
    return ImageBatch(
        tasks=[task] * count,
        keys=[f"{task}-{number}-{i}" for i in range(count)],
        sample_ids=torch.arange(count) + 10 * number,
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=[f"make it {i}" for i in range(count)],
        target=torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1,
        references=references if task == "edit" else None,
    )


class Alternating(IterableDataset):
    """Batches of prompts of either task in turn."""

    def __iter__(self):
        return (prompts(i, ("edit", "text_to_image")[i % 2]) for i in range(100))


def made(folder: Path, **changes: object) -> ReinforceModule:
    settings = {
        "sampling": Sampling(group_size=2, groups=4, micro_groups=2, num_inference_steps=2),
        "optimizer": AdamW(lr=1e-3, warmup_steps=0, weight_decay=0.0),
        "steps": 20,
        **changes,
    }
    return ReinforceModule(str(folder), {"bright": Weighted(Brightness())}, DiffusionNFT(), **settings)


def trained(module: ReinforceModule, steps: int, root: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, default_root_dir=root,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Alternating(), batch_size=None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_folder(tmp_path_factory.mktemp("stages") / "start")


def test_one_run_learns_from_groups_of_both_tasks(folder: Path, tmp_path: Path) -> None:
    module, updates, logged = made(folder), [], set()
    improve = module.improve

    def noted(rollouts: list[Rollout], batch: ImageBatch) -> None:
        updates.append([(rollout.task, rollout.references is not None, len(rollout.keys)) for rollout in rollouts])
        improve(rollouts, batch)

    module.improve, module.log = noted, lambda name, *_, **__: logged.add(name)
    trained(module, 2, tmp_path)
    # Three groups of each task are two batches of two, and one of each is left out: no batch is of two tasks.
    assert updates == [[("edit", True, 2), ("text_to_image", False, 2)]] * 2
    assert {"reward/edit", "reward/text_to_image", "pictures/edit_diversity"} <= logged
    assert module.pictures == 2 * 2 * 3 * 2 and module.evaluations == 24 * 2 + 16 * 4 * 3


def test_a_stage_is_held_to_its_start_or_to_an_earlier_ones(folder: Path, tmp_path: Path) -> None:
    first = made(folder)
    trained(first, 2, tmp_path)
    first.pipeline().save_pretrained(tmp_path / "stage1")
    start = dict(KontextTransformer.from_pretrained(folder, subfolder="transformer").named_parameters())
    merged = dict(KontextTransformer.from_pretrained(tmp_path / "stage1", subfolder="transformer").named_parameters())
    for reference, wanted in ((None, merged), (str(folder), start)):
        held = made(tmp_path / "stage1", regularisation=Regularisation(velocity_kl=0.1, reference=reference))
        held.configure_model()
        copy = held.snapshots.copies["reference"]
        assert all(torch.equal(weights, wanted[n.removeprefix("transformer.")]) for n, weights in copy.items())
    assert not torch.equal(start["proj_out.weight"], merged["proj_out.weight"])
    # Held to the model before stage 1, stage 2 begins away from it and comes nearer.
    strayed: list[float] = []
    held.log = lambda name, value, **_: strayed.append(float(value)) if name == "train/velocity_kl" else None
    held.regularisation.velocity_kl = 1e4
    trained(held, 8, tmp_path)
    assert strayed[0] > 0 and max(strayed[-2:]) < 0.7 * strayed[0]


def as_stored(name: str) -> str:
    """The name in a checkpoint folder of a weight that adapters are added to."""
    return name.removeprefix("transformer.").replace(".base_layer.", ".")


def test_adapters_are_held_to_another_folder_whose_weights_are_in_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    first = made(folder)
    trained(first, 2, tmp_path)
    first.pipeline().save_pretrained(tmp_path / "stage1")
    settings = Regularisation(velocity_kl=0.1, reference=str(folder))
    held = made(tmp_path / "stage1", lora=Lora(2, 4), regularisation=settings)
    held.configure_model()
    start, merged = (
        KontextTransformer.from_pretrained(path, subfolder="transformer") for path in (folder, tmp_path / "stage1")
    )
    config, generator = start.config, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([500.0]),
    }

    @torch.no_grad()
    def velocity(transformer: torch.nn.Module) -> torch.Tensor:
        return transformer(**inputs, return_dict=False)[0]

    def reference_is_the_folders() -> bool:
        """Bit for bit, and for an equal velocity, up to rounding: a file's weights lie otherwise in memory."""
        copy, wanted = held.snapshots.copies["reference"], dict(start.named_parameters())
        pairs = [(w, wanted[as_stored(n)]) for n, w in copy.items() if as_stored(n) in wanted]
        with held.snapshots.using("reference"):
            found = velocity(held.transformer)
        assert len(pairs) == len(wanted)
        return all(torch.equal(w, p) for w, p in pairs) and torch.allclose(found, velocity(start), atol=1e-5)

    assert reference_is_the_folders()
    assert torch.equal(velocity(held.transformer), velocity(merged))
    strayed: list[float] = []
    held.log = lambda name, value, **_: strayed.append(float(value)) if name == "train/velocity_kl" else None
    trained(held, 1, tmp_path)
    assert reference_is_the_folders()
    assert strayed[0] > 0 and not torch.equal(velocity(held.transformer), velocity(merged))
    saved: dict = {"state_dict": held.state_dict()}
    held.on_save_checkpoint(saved)
    names = saved["reinforce"]["copies"]["reference"]
    assert names.keys() == saved["state_dict"].keys() and all("lora_" in name for name in names)
    held.on_load_checkpoint(saved)
    assert reference_is_the_folders()


@pytest.mark.parametrize("layers", [1, -1])
@pytest.mark.parametrize("lora", [None, Lora(2, 4)])
def test_a_reference_of_more_or_fewer_layers_is_refused(
    layers: int, lora: Lora | None, folder: Path, tmp_path: Path
) -> None:
    other = micro_folder(tmp_path / "other")
    config = KontextTransformer.from_pretrained(other, subfolder="transformer").config
    assert config.num_layers > 1
    deep = KontextTransformer.from_config({**config, "num_layers": config.num_layers + layers})
    deep.save_pretrained(other / "transformer")
    module = made(folder, lora=lora, regularisation=Regularisation(velocity_kl=0.1, reference=str(other)))
    with pytest.raises(CheckpointError, match="another architecture"):
        module.configure_model()


def test_a_reference_beside_adapters_is_planned_in_the_precision_that_it_has(folder: Path) -> None:
    settings = Regularisation(velocity_kl=0.1, reference=str(folder))
    module = made(folder, lora=Lora(2, 4), frozen="bfloat16", regularisation=settings)
    sizes = {"ratio": {"edit": 1}, "batch_size": 2, "batch_tokens": None, "size_multiple": 16}
    plan = Plan(Run(module, {"max_steps": 10}, image_size=32, ema=False, keep=1, **sizes))
    module.configure_model()
    held = sum(w.nbytes for name, w in module.snapshots.copies["reference"].items() if "lora_" not in name)
    table = sum(b.nbytes for b in module.transformer.buffers())  # which a reference that is no copy has too
    assert plan.states["other transformers"] == held + table


def test_references_that_are_of_no_use_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of no use without"):
        Regularisation(reference="runs/base")
    with pytest.raises(InputError, match="a connector's is what it was"):
        made(folder, train_connector=True, regularisation=Regularisation(velocity_kl=0.1, reference=str(folder)))
    module = made(folder, regularisation=Regularisation(velocity_kl=0.1, reference=str(tmp_path)))
    with pytest.raises(CheckpointError, match="model_index"):
        module.configure_model()
    module = made(folder)
    module.configure_model()
    with pytest.raises(CheckpointError, match="another architecture"):
        module.snapshots.put("reference", {"transformer.proj_out.weight": torch.zeros(2, 2)})

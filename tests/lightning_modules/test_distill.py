"""Distillation on micro folders: what is compared with whom, where, and how a run goes on after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from micro import micro_folder
from rl import prompts
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.distill import DistillModule, States, Teacher
from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.footprint import SavedTensors
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.planning import Plan, Run
from lightning_modules.samplers import ode, timesteps
from lightning_modules.schedule import AdamW

samples = partial(prompts, count=3)
LORA = Lora(rank=4, alpha=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The student's start, and two experts with weights of their own."""
    root = tmp_path_factory.mktemp("experts")
    found = {"start": str(micro_folder(root / "start"))}
    for seed, name in enumerate(("editor", "painter"), 1):
        found[name] = str(micro_folder(root / name))
        transformer = KontextTransformer.from_pretrained(found[name], subfolder="transformer")
        torch.manual_seed(seed)
        for p in transformer.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        transformer.save_pretrained(Path(found[name]) / "transformer")
    return found


def made(folders: dict[str, str], teachers: dict[str, Teacher] | None = None, **changes: object) -> DistillModule:
    of_task = {"edit": Teacher(folders["editor"]), "text_to_image": Teacher(folders["painter"])}
    settings = {"optimizer": AdamW(lr=3e-3, warmup_steps=0, weight_decay=0.0), "steps": 10, **changes}
    module = DistillModule(folders["start"], teachers or of_task, **settings)
    module.configure_model()
    module.configure_optimizers()
    module.log = lambda *_, **__: None
    return module


class Stream(IterableDataset):
    """Batches without a length, which Lightning would count a resumed run's batches against."""

    def __init__(self, batches: Sequence[ImageBatch]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def trained(module: DistillModule, batches: Sequence[ImageBatch], steps: int, root: Path, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, gradient_clip_val=1.0, default_root_dir=root,
        enable_model_summary=False, **quiet,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Stream(batches), batch_size=None), **options)
    return trainer


@pytest.mark.parametrize("source", ["data", "student"])
@pytest.mark.parametrize("task", ["edit", "text_to_image"])
def test_of_oneself_there_is_nothing_to_learn(folders: dict[str, str], source: str, task: str) -> None:
    own = {name: Teacher(folders["start"]) for name in ("edit", "text_to_image")}
    module = made(folders, own, states=States(source))
    assert module.training_step(samples(0, task), 0) == 0
    guided = made(folders, {task: Teacher(folders["start"], 3.0)}, states=States(source))
    assert guided.training_step(samples(0, task), 0) > 0


def test_the_target_is_the_guided_velocity_of_the_tasks_teacher(folders: dict[str, str]) -> None:
    module = made(folders, {"edit": Teacher(folders["editor"], 2.0, "bad"), "text_to_image": Teacher(folders["start"])})
    batch = module._encoder.encode_batch(samples(0))
    student = module.student(batch)
    x, sigma = module.data_states(batch)
    found = module.target(student, x, sigma, batch)
    teacher = KontextPipeline.from_pretrained(folders["editor"])
    with torch.no_grad():
        velocities = [
            teacher.transformer(
                hidden_states=x,
                ref_hidden_states=student.references[:, 0],
                encoder_hidden_states=sequence,
                pooled_projections=pooled,
                timestep=1000 * sigma,
                return_dict=False,
            )[0]
            for sequence, pooled in (teacher.encode_unique(batch.prompts), teacher.encode_unique(["bad"] * 3))
        ]
    wanted = velocities[1] + 2.0 * (velocities[0] - velocities[1])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_student_alone(folders: dict[str, str]) -> None:
    module = made(folders)
    for task in ("edit", "text_to_image"):
        module.training_step(samples(0, task), 0).backward()
    assert all(p.grad is not None for _, p in module.trainable_parameters() if p.ndim > 1)
    assert all(p.grad is None and not p.requires_grad for t in module._frozen.values() for p in t.parameters())
    assert len(module._frozen) == 2 and not any("frozen" in name for name in module.state_dict())


def test_each_task_comes_to_its_own_expert(folders: dict[str, str], tmp_path: Path) -> None:
    module = made(folders, steps=40)
    before = [module.training_step(samples(100, task), 0).item() for task in ("edit", "text_to_image")]
    trained(module, [samples(i, ("edit", "text_to_image")[i % 2]) for i in range(40)], 40, tmp_path)
    after = [module.training_step(samples(100, task), 0).item() for task in ("edit", "text_to_image")]
    assert all(b < 0.85 * a for a, b in zip(before, after, strict=True))


def test_own_states_lie_on_the_way_of_the_students_sampler(folders: dict[str, str]) -> None:
    module, taken = made(folders, states=States("student", num_inference_steps=3)), set()
    config = module.pipeline().scheduler.config
    sigmas = timesteps.schedule(3, config.shift, config.num_train_timesteps)
    for number in range(8):
        batch = module._encoder.encode_batch(samples(number, count=2))
        student, spent = module.student(batch), module.evaluations
        x, sigma = module.own_states(student, batch)
        step = (module.evaluations - spent) // 2
        noise = module.draw(torch.randn, tuple(x.shape[1:]), "start", batch)
        with torch.no_grad():
            assert torch.equal(ode.euler(student, x, sigmas[step:]), ode.euler(student, noise, sigmas))
        assert (sigma == sigmas[step]).all()
        taken.add(step)
    assert taken == {0, 1, 2}


def test_cost_is_counted_in_forward_passes(folders: dict[str, str]) -> None:
    module = made(folders, {"edit": Teacher(folders["editor"], 2.0), "text_to_image": Teacher(folders["painter"])})
    module.training_step(samples(0), 0)
    assert module.evaluations == 3 * (1 + 2 + 2)
    module.training_step(samples(1, "text_to_image"), 0)
    assert module.evaluations == 15 + 3 * (1 + 2 + 1)
    for changes, backward in (({"lora": LORA}, 1), ({"recompute": True}, 3), ({"lora": LORA, "recompute": True}, 2)):
        other = made(folders, **changes)
        other.training_step(samples(1, "text_to_image"), 0)
        assert other.evaluations == 3 * (1 + backward + 1)
        assert other.workload().evaluations == 1 + backward + 1 - other.compute.recompute  # which plan adds


def test_adapters_alone_are_trained_and_begin_where_the_student_does(folders: dict[str, str], tmp_path: Path) -> None:
    own = {"edit": Teacher(folders["start"])}
    module = made(folders, own, lora=LORA)
    assert module.training_step(samples(0), 0) == 0
    assert all(".lora_" in name for name, _ in module.trainable_parameters())
    module = made(folders, lora=LORA)
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    before = module.training_step(samples(100), 0).item()
    trained(module, [samples(i) for i in range(10)], 10, tmp_path)
    assert module.training_step(samples(100), 0).item() < before
    assert all(torch.equal(p, frozen[name]) for name, p in module.named_parameters() if name in frozen)


def test_recomputed_activations_are_the_same_and_not_kept(folders: dict[str, str]) -> None:
    found = []
    for recompute in (False, True):
        module = made(folders, recompute=recompute)
        counter = SavedTensors(module.transformer.parameters())
        with counter.hooks():
            loss = module.training_step(samples(0), 0)
        loss.backward()
        gradients = {name: p.grad for name, p in module.trainable_parameters()}
        found.append((loss.item(), gradients, counter.bytes))
    (plain, gradients, kept), (again, others, fewer) = found
    assert plain == again and fewer < 0.5 * kept
    torch.testing.assert_close(others, gradients)


def test_teachers_and_text_encoders_are_of_the_frozen_precision(folders: dict[str, str]) -> None:
    exact, module = made(folders), made(folders, frozen="bfloat16")
    for teacher in module._frozen.values():
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in teacher.parameters())
        assert all(table.dtype == torch.float32 for table in teacher.buffers())
    assert all(p.dtype == torch.bfloat16 for p in module.pipeline().text_encoder_3.parameters())
    assert all(p.dtype == torch.float32 for _, p in module.trainable_parameters())
    batch = exact._encoder.encode_batch(samples(0))
    x, sigma = exact.data_states(batch)
    low, high = (m.target(m.student(batch), x, sigma, batch) for m in (module, exact))
    assert low.dtype == torch.float32 and 0 < (low - high).abs().max() < 0.05 * high.abs().max()


@pytest.mark.parametrize("changes", [{}, {"frozen": "bfloat16"}, {"lora": LORA}, {"recompute": True}])
def test_plan_says_what_a_run_holds_and_keeps(folders: dict[str, str], changes: dict[str, object]) -> None:
    module = made(folders, {"edit": Teacher(folders["editor"], 2.0)}, **changes)
    sizes = {"ratio": {"edit": 1}, "batch_size": 3, "batch_tokens": None, "size_multiple": 16}
    plan = Plan(Run(module, {"max_steps": 10}, image_size=32, ema=True, keep=2, **sizes))
    of = {"transformer": [module.transformer], "other transformers": list(module._frozen.values())}
    held = {name: sum(p.nbytes for t in each for p in t.parameters()) for name, each in of.items()}
    held["position table"] = sum(b.nbytes for b in module.transformer.buffers())
    held["other transformers"] += sum(b.nbytes for t in module._frozen.values() for b in t.buffers())
    assert {name: plan.states[name] for name in held} == held
    assert plan.trained == sum(p.numel() for _, p in module.trainable_parameters())
    counter = SavedTensors([*module.transformer.parameters(), *module.transformer.buffers()])
    with counter.hooks():
        module.training_step(module._encoder.encode_batch(samples(0)), 0)
    assert plan.activations["edit"] == pytest.approx(counter.bytes, rel=0.15)


@pytest.mark.parametrize(
    "changes", [{}, {"states": States("student")}, {"lora": LORA, "recompute": True, "frozen": "bfloat16"}]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    folders: dict[str, str], changes: dict[str, object], tmp_path: Path
) -> None:
    batches = [samples(i, ("edit", "text_to_image")[i % 2], count=2) for i in range(4)]
    whole = made(folders, **changes)
    trained(whole, batches, 4, tmp_path)
    first, second = made(folders, **changes), made(folders, **changes)
    trained(first, batches, 2, tmp_path).save_checkpoint(tmp_path / "stopped.ckpt")
    kept = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == {name for name, _ in whole.trainable_parameters()}
    trained(second, batches[2:], 4, tmp_path, ckpt_path=tmp_path / "stopped.ckpt", weights_only=False)
    assert all(torch.equal(w, second.state_dict()[n]) for n, w in whole.state_dict().items())
    assert whole.evaluations == second.evaluations > 0


def test_mistakes_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no teacher of the task 'text_to_image'; there are edit"):
        made(folders, {"edit": Teacher(folders["editor"])}).training_step(samples(0, "text_to_image"), 0)
    with pytest.raises(CheckpointError, match="nowhere"):
        made(folders, {"edit": Teacher(str(tmp_path / "nowhere"))})
    with pytest.raises(InputError, match="at least 1"):
        States("student", num_inference_steps=0)
    module = made(folders)
    small, wide = torch.zeros(3, 32, 32), torch.zeros(3, 32, 64)
    uneven = samples(0, count=2)
    uneven.references = [[small], [wide, small]]
    with pytest.raises(InputError, match="equally many"):
        module.training_step(uneven, 0)

"""The stage module on a micro folder: what it draws, trains, drops and logs."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from micro import micro_folder
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import draw
from lightning_modules.kontext import Dropout, KontextModule, Timesteps
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.samplers import path


def batch(task: str = "edit", references: object = "one", size: int = 32, count: int = 3) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    if references == "one":
        references = torch.rand(count, 1, 3, size, size, generator=generator) * 2 - 1
    return ImageBatch(
        tasks=[task] * count,
        keys=[f"k{i}" for i in range(count)],
        sample_ids=torch.arange(count) + 7,
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=[f"make it {i}" for i in range(count)],
        target=target,
        references=references,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_folder(tmp_path_factory.mktemp("micro") / "folder"))


@pytest.fixture
def module(folder: str) -> KontextModule:
    made = KontextModule(folder, steps=10)
    made.configure_model()
    return made


def test_only_the_transformer_trains(module: KontextModule) -> None:
    module.flow_matching_loss(batch()).backward()
    names = [name for name, _ in module.trainable_parameters()]
    assert names and all(name.startswith("transformer.") for name in names)
    assert all(torch.isfinite(p.grad).all() for _, p in module.trainable_parameters() if p.grad is not None)
    assert all(p.grad is None for p in module.pipeline().vae.parameters())
    assert sum(p.numel() for _, p in module.trainable_parameters()) <= 100_000


def test_compiling_ahead_leaves_no_trace(module: KontextModule) -> None:
    module.trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    random, weights = torch.get_rng_state(), [p.detach().clone() for p in module.parameters()]
    module.compile_for(batch())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))


def test_the_loss_is_the_velocity_regression(module: KontextModule) -> None:
    data = batch()
    x0, references = module.encode(data)
    noise = draw(torch.randn, tuple(x0.shape[1:]), 0, "noise", data.epochs, data.sample_ids)
    sigma = module.draw_sigma(data)
    sequence, pooled = module.pipeline().encode_unique(data.prompts)
    v = module.transformer(
        hidden_states=path.interpolate(x0, noise, sigma),
        ref_hidden_states=references,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        timestep=1000 * sigma,
    ).sample
    expected = (v - (noise - x0)).square().mean()
    torch.testing.assert_close(module.flow_matching_loss(data), expected)


def test_draws_depend_on_the_sample_and_not_on_its_neighbours(module: KontextModule) -> None:
    whole, alone = batch(), batch().sample(1)
    assert torch.equal(module.draw_sigma(whole)[1:2], module.draw_sigma(alone))
    for a, b in zip(module.encode(whole), module.encode(alone), strict=True):
        torch.testing.assert_close(a[1:2], b, atol=1e-5, rtol=1e-5)


def test_sigma_follows_its_distribution(folder: str) -> None:
    many = ImageBatch(
        ["edit"] * 4000, [""] * 4000, torch.arange(4000), torch.zeros(4000, dtype=torch.int64), [], torch.zeros(())
    )
    sigma = KontextModule(folder, timesteps=Timesteps(mean=0.8)).draw_sigma(many)
    assert torch.logit(sigma).mean() == pytest.approx(0.8, abs=0.06)
    assert torch.logit(sigma).std() == pytest.approx(1.0, abs=0.05)
    by_task = KontextModule(folder, timesteps=Timesteps(mean={"text_to_image": 0.8, "edit": 2.0})).draw_sigma(many)
    assert torch.logit(by_task).mean() == pytest.approx(2.0, abs=0.06)
    uniform = KontextModule(folder, timesteps=Timesteps("uniform", shift=3.0)).draw_sigma(many)
    assert (uniform < 3 * 0.5 / 2).float().mean() == pytest.approx(0.5, abs=0.03)
    assert sigma.dtype == torch.float32


def test_captions_and_references_are_dropped_as_told(folder: str) -> None:
    made = KontextModule(folder, dropout=Dropout(caption={"edit": 1.0}, reference=1.0))
    made.configure_model()
    sequence, pooled = made.embed(batch())
    empty, empty_pooled = made.pipeline().encode_unique([""])
    torch.testing.assert_close(sequence, empty.expand_as(sequence))
    torch.testing.assert_close(pooled, empty_pooled.expand_as(pooled))
    assert made.encode(batch())[1] is None


def test_several_references_of_several_sizes_train(module: KontextModule) -> None:
    small, wide = torch.zeros(3, 16, 16), torch.zeros(3, 16, 32)
    references = [[small], [], [wide, small]]
    loss = module.flow_matching_loss(batch(references=references))
    assert torch.isfinite(loss)
    two = torch.zeros(3, 2, 3, 32, 32)
    assert torch.isfinite(module.flow_matching_loss(batch(references=two)))


def test_task_weights_scale_the_loss(folder: str, module: KontextModule) -> None:
    weighted = KontextModule(folder, task_weights={"edit": 3.0})
    weighted.configure_model()
    torch.testing.assert_close(weighted.flow_matching_loss(batch()), 3 * module.flow_matching_loss(batch()))


def test_a_prompt_gives_the_same_bits_next_to_any_other(module: KontextModule) -> None:
    module.embed(batch())
    seen = batch().sample(2)
    fresh = KontextModule(module.pretrained)
    fresh.configure_model()
    for a, b in zip(module.embed(seen), fresh.embed(seen), strict=True):
        assert torch.equal(a, b)


def test_encoded_batches_train_as_pixels_do(module: KontextModule) -> None:
    data = batch()
    encoded = module.latent_encoder().encode_batch(data)
    assert encoded.encoded and encoded.target.shape == (3, 4, 8, 8) and encoded.references.shape == (3, 1, 4, 8, 8)
    assert torch.equal(module.flow_matching_loss(encoded), module.flow_matching_loss(data))
    assert module.training_flops(encoded) == module.training_flops(data)


@pytest.mark.parametrize("references", ["one", None])
def test_flops_by_hand_equal_counted_ones(module: KontextModule, references: object) -> None:
    data = batch(references=references, size=64)
    x0, refs = module.encode(data)
    sequence, pooled = module.embed(data)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        module.transformer.to("meta")(
            hidden_states=x0.to("meta"),
            ref_hidden_states=None if refs is None else refs.to("meta"),
            encoder_hidden_states=sequence.to("meta"),
            pooled_projections=pooled.to("meta"),
            timestep=torch.zeros(3),
        )
    assert module.training_flops(data) == pytest.approx(3 * counter.get_total_flops(), rel=0.02)


def test_a_wrong_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        KontextModule(str(tmp_path / "nowhere")).configure_model()
    module = KontextModule(str(micro_folder(tmp_path / "folder")))
    (tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae holds no"):
        module.configure_model()


def test_a_shorter_text_sequence_is_kept_by_the_export(folder: str, tmp_path: Path) -> None:
    module = KontextModule(folder, max_sequence_length=4)
    module.configure_model()
    pipeline = module.pipeline()
    assert module.embed(batch())[0].shape[1] == pipeline.text_tokens == pipeline.tokenizer_max_length + 4
    pipeline.save_pretrained(tmp_path)
    assert KontextPipeline.from_pretrained(tmp_path).t5_tokens == 4


@pytest.mark.parametrize("length", [0, 15])
def test_a_text_sequence_longer_than_the_folder_takes_is_refused(folder: str, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"max_sequence_length is {length}; this folder's T5 takes 1 to 14"):
        KontextModule(folder, max_sequence_length=length).configure_model()


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_equals_the_librarys(module: KontextModule, limit: float) -> None:
    module.configure_optimizers()
    module.flow_matching_loss(batch()).backward()
    parameters = [p for _, p in module.trainable_parameters()]
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    module.configure_gradient_clipping(torch.optim.SGD(parameters), limit)
    found = [p.grad for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, (p.grad for p in parameters), strict=True))

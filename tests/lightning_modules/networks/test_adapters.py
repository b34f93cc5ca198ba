"""LoRA on the supervised stage: what trains, what is off when it is off, what is merged, and what diffusers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from micro import built
from rl import prompts, trained

from callbacks import EMA
from lightning_modules.kontext import KontextModule
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute, attend_in_float32
from lightning_modules.networks.flops import attention_flops
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.schedule import AdamW

LORA = Lora(rank=4, alpha=8)
PLAIN = Compute()


def module(compute: Compute = PLAIN, lora: Lora | None = LORA) -> KontextModule:
    return KontextModule(str(built()), 4, 0, AdamW(lr=1e-2, warmup_steps=0), lora=lora, compute=compute)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KontextModule:
    made = module(Compute(request.param))
    folder = tmp_path_factory.mktemp("tuned")
    trained(made, [prompts(i, "edit" if i % 2 else "text_to_image") for i in range(4)], 4, folder, [EMA(0.5)])
    return made


def velocity(transformer: object, seed: int = 0) -> torch.Tensor:
    generator, config = torch.Generator().manual_seed(seed), transformer.config
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        return transformer(
            hidden_states=draw(1, config.in_channels, 8, 8),
            encoder_hidden_states=draw(1, 5, config.joint_attention_dim),
            pooled_projections=draw(1, config.pooled_projection_dim),
            timestep=torch.tensor([500.0]),
            ref_hidden_states=draw(1, config.in_channels, 8, 8),
        ).sample


def test_only_adapters_train_and_cost_two_passes(tuned: KontextModule) -> None:
    names = [name for name, _ in tuned.trainable_parameters()]
    assert names and all(".lora_" in name for name in names)
    assert tuned.evaluations == 2 * 4 * 4
    full = module(lora=None)
    full.configure_model()
    tokens = 2 * (32 / full.pipeline().vae_scale_factor / full.transformer.config.patch_size) ** 2
    attention = attention_flops(full.transformer.config, tokens, full.pipeline().text_tokens)
    wanted = full.training_flops(prompts(0)) * 2 / 3 + len(prompts(0)) * attention
    assert tuned.training_flops(prompts(0)) == pytest.approx(wanted)


def test_adapters_off_give_the_base_bit_for_bit(tuned: KontextModule) -> None:
    base = module(tuned.compute, lora=None)
    base.configure_model()
    if tuned.compute.weights == "bfloat16":
        attend_in_float32(base.transformer, base.device)  # as the run did on a CPU
    assert not torch.equal(velocity(tuned.transformer), velocity(base.transformer))
    tuned.transformer.disable_adapters()
    try:
        assert torch.equal(velocity(tuned.transformer), velocity(base.transformer))
    finally:
        tuned.transformer.enable_adapters()


def test_the_export_is_merged_and_its_adapters_load_in_diffusers(tuned: KontextModule, tmp_path: Path) -> None:
    tuned.pipeline().save_pretrained(tmp_path)
    merged = KontextPipeline.from_pretrained(tmp_path).transformer
    wanted, tolerance = velocity(tuned.transformer).float(), 1e-4 if tuned.compute.weights == "float32" else 5e-2
    torch.testing.assert_close(velocity(merged), wanted, atol=tolerance, rtol=tolerance)
    stock = StableDiffusion3Pipeline.from_pretrained(built())
    stock.load_lora_weights(str(tmp_path / "lora"))
    fused = {n: t for n, t in stock.transformer.state_dict().items() if ".lora_" in n}
    own = {n: t for n, t in tuned.transformer.state_dict().items() if ".lora_" in n}
    assert len(fused) == len(own) > 0
    renamed = {n.replace(".default_0.", ".default."): t for n, t in fused.items()}
    assert all(torch.equal(renamed[n], t.to(renamed[n])) for n, t in own.items())


def test_a_checkpoint_holds_adapters_alone_and_resumes(tmp_path: Path) -> None:
    batches = [prompts(i) for i in range(4)]
    whole, part, resumed = module(), module(), module()
    trained(whole, batches, 4, tmp_path / "whole")
    path = tmp_path / "part.ckpt"
    trained(part, batches[:2], 2, tmp_path / "part").save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(".lora_" in name for name in state)
    trained(resumed, batches[2:], 4, tmp_path / "resumed", resume=path)
    for (name, p), (_, q) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_targets_that_are_not_there_are_named() -> None:
    made = module(lora=Lora(targets=["nowhere"]))
    with pytest.raises(CheckpointError, match="no layer of this transformer is named"):
        made.configure_model()

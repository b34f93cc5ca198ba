"""The Kontext transformer: the release's arithmetic, any number of references, stock folders both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.published import SD35_MEDIUM

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}


@pytest.fixture(scope="module")
def stock() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**CONFIG).eval()
    for p in model.parameters():  # adaLN-zero and norms at their defaults would hide errors
        torch.nn.init.normal_(p, 0.02 if p.ndim == 1 else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def ours(stock: SD3Transformer2DModel) -> KontextTransformer:
    model = KontextTransformer(**CONFIG).eval()
    model.load_state_dict(stock.state_dict())
    return model


def inputs(count: int = 3, height: int = 8, width: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(count, 4, height, width, generator=g),
        "encoder_hidden_states": torch.randn(count, 5, 12, generator=g),
        "pooled_projections": torch.randn(count, 10, generator=g),
        "timestep": torch.rand(count, generator=g) * 1000,
    }


def row(values: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: value[i : i + 1] for name, value in values.items()}


def test_without_reference_it_is_stock_sd3(stock: SD3Transformer2DModel, ours: KontextTransformer) -> None:
    with torch.no_grad():
        expected, found = stock(**inputs()).sample, ours(**inputs()).sample
    assert (expected - found).abs().max() / expected.abs().max() < 1e-6
    assert set(stock.state_dict()) == set(ours.state_dict())


def released_forward(model: SD3Transformer2DModel, reference: torch.Tensor, values: dict) -> torch.Tensor:
    """The release as described: one table for both, [reference, target], one timestep, target tokens out.

    Runs stock blocks and stock attention, which need no mask here.
    """
    x = values["hidden_states"]
    target = model.pos_embed(x)
    image = torch.cat([model.pos_embed(reference), target], dim=1)
    temb = model.time_text_embed(values["timestep"], values["pooled_projections"])
    text = model.context_embedder(values["encoder_hidden_states"])
    for block in model.transformer_blocks:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
    out = model.proj_out(model.norm_out(image[:, target.shape[1] :], temb))
    b, c, h, w = x.shape
    out = out.reshape(b, h // 2, w // 2, 2, 2, c)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(b, c, h, w)


def test_one_reference_equals_the_release(stock: SD3Transformer2DModel, ours: KontextTransformer) -> None:
    reference = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = released_forward(stock, reference, inputs())
        found = ours(**inputs(), ref_hidden_states=reference).sample
        listed = ours(**inputs(), ref_hidden_states=[[r] for r in reference]).sample
        without = ours(**inputs()).sample
    assert (expected - found).abs().max() / expected.abs().max() < 1e-6
    assert torch.equal(found, listed)
    assert (found - without).abs().max() > 1e-3


def test_a_batch_of_0_1_and_2_references_equals_each_sample_alone(ours: KontextTransformer) -> None:
    g = torch.Generator().manual_seed(3)
    references = [
        [],
        [torch.randn(4, 8, 12, generator=g)],
        [torch.randn(4, 4, 6, generator=g), torch.randn(4, 10, 2, generator=g)],
    ]
    with torch.no_grad():
        together = ours(**inputs(), ref_hidden_states=references).sample
        for i, images in enumerate(references):
            alone = ours(**row(inputs(), i), ref_hidden_states=[images]).sample
            assert (together[i] - alone[0]).abs().max() / alone.abs().max() < 1e-5
        none = ours(**row(inputs(), 0)).sample
    assert (together[0] - none[0]).abs().max() < 1e-5


def test_equal_references_need_no_mask(ours: KontextTransformer) -> None:
    g = torch.Generator().manual_seed(3)
    references = [[torch.randn(4, 4, 4, generator=g), torch.randn(4, 2, 6, generator=g)] for _ in range(3)]
    target = ours.embed(inputs()["hidden_states"])
    tokens, mask = ours.embed_references(references, target)
    assert mask is None and tokens.shape == (3, 4 + 3, 16)
    tokens, mask = ours.embed_references([[], references[0], []], target)
    assert mask.shape == (3, 7 + target.shape[1]) and mask[1].all() and not mask[0, :7].any()


def test_order_of_references_is_immaterial_but_their_content_is_not(ours: KontextTransformer) -> None:
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 4, 4, generator=g), torch.randn(4, 4, 4, generator=g)
    with torch.no_grad():
        ab, ba, aa = (ours(**row(inputs(), 0), ref_hidden_states=[r]).sample for r in ([a, b], [b, a], [a, a]))
    assert (ab - ba).abs().max() < 1e-5 < (ab - aa).abs().max()


def test_gradients_reach_parameters_and_references(ours: KontextTransformer) -> None:
    reference = torch.randn(3, 4, 8, 12, requires_grad=True)
    ours(**inputs(), ref_hidden_states=reference).sample.square().mean().backward()
    assert reference.grad.abs().sum() > 0
    last = "transformer_blocks.2.attn"
    unused = {n for n, p in ours.named_parameters() if p.grad is None}
    assert not unused - {f"{last}.to_add_out.weight", f"{last}.to_add_out.bias"}
    ours.zero_grad()


def test_checkpointing_gives_the_same_gradients(ours: KontextTransformer) -> None:
    def gradient() -> torch.Tensor:
        ours.zero_grad()
        ours(**inputs(), ref_hidden_states=[[torch.ones(4, 2, 2)], [], []]).sample.square().mean().backward()
        return ours.proj_out.weight.grad.clone()

    plain = gradient()
    ours.enable_gradient_checkpointing()
    checkpointed = gradient()
    ours.disable_gradient_checkpointing()
    torch.testing.assert_close(plain, checkpointed)


def test_sd35_medium_has_2243171520_parameters() -> None:
    with torch.device("meta"):
        model = KontextTransformer(**SD35_MEDIUM)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_243_171_520
    assert model.pos_embed.pos_embed.numel() == 226_492_416


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "SD3Transformer2DKontextModel"])
def test_stock_and_skywork_folders_load_and_ours_load_there(
    name: str, stock: SD3Transformer2DModel, ours: KontextTransformer, tmp_path: Path
) -> None:
    stock.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(config.read_text().replace("SD3Transformer2DModel", name))
    loaded = KontextTransformer.from_pretrained(tmp_path / "theirs").eval()
    assert isinstance(loaded, KontextTransformer)
    loaded.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    back = SD3Transformer2DModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(ours(**inputs()).sample, loaded(**inputs()).sample)
        assert torch.equal(stock(**inputs()).sample, back(**inputs()).sample)


def test_a_sharded_folder_loads(ours: KontextTransformer, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = KontextTransformer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), loaded.parameters(), strict=True))
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: .*index.json names"):
        KontextTransformer.from_pretrained(tmp_path)


def damage(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights.pop("proj_out.bias")
    weights["proj_out.weight"] = weights["proj_out.weight"][:3].clone()
    weights["surprise"] = torch.zeros(1)
    return weights


def test_every_wrong_key_is_named(ours: KontextTransformer, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(CheckpointError) as error:
        KontextTransformer.from_pretrained(tmp_path)
    message = str(error.value)
    assert "1 missing: proj_out.bias" in message
    assert "1 unexpected: surprise" in message
    assert "proj_out.weight is [3, 16], expected [16, 16]" in message


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}'), "describes a Flux"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100), "not a safetensors file"),
        (lambda f: truncate(f / "diffusion_pytorch_model.safetensors"), "copy it again"),
        (lambda f: pickled(f), "can run code when loaded"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(spoil, expected: str, ours: KontextTransformer, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        KontextTransformer.from_pretrained(tmp_path)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def pickled(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("size", [(7, 8), (8, 26)])
def test_a_size_that_does_not_fit_is_named(size: tuple[int, int], ours: KontextTransformer) -> None:
    with pytest.raises(CheckpointError, match="multiples of its patch size 2 and at most 24"):
        ours(**inputs(1, *size))

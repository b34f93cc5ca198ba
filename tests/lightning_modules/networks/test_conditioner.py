"""The conditioner against torch's own encoder, its zero start, and the release's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_modules.networks import Conditioner
from lightning_modules.networks.loading import CheckpointError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
RELEASED = {**SIZES, "_attn_implementation": "flash_attention_2"}


def conditioner(seed: int = 0, **changes: object) -> Conditioner:
    torch.manual_seed(seed)
    settings = {"num_queries": 5, "llm_hidden_size": 12, "pooled_projection_dim": 6, "joint_attention_dim": 10}
    found = Conditioner(dict(RELEASED), **(settings | changes))
    for p in found.parameters():
        nn.init.normal_(p, std=0.3)
    return found


def reference(own: Conditioner, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The released forward pass, with torch's encoder layers in place of the release's."""
    state = own.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = linear(hidden, "projector_1")
    for i in range(SIZES["num_hidden_layers"]):
        name = f"connector.layers.{i}"
        gelu = nn.GELU(approximate="tanh")
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, gelu, 1e-6, batch_first=True, norm_first=True)
        parts = [f"{name}.self_attn.{p}_proj" for p in "qkv"]
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([state[f"{p}.weight"] for p in parts]),
                "self_attn.in_proj_bias": torch.cat([state[f"{p}.bias"] for p in parts]),
                **{f"self_attn.out_proj.{w}": state[f"{name}.self_attn.out_proj.{w}"] for w in ("weight", "bias")},
                **{f"linear{j}.{w}": state[f"{name}.mlp.fc{j}.{w}"] for j in (1, 2) for w in ("weight", "bias")},
                **{f"norm{j}.{w}": state[f"{name}.layer_norm{j}.{w}"] for j in (1, 2) for w in ("weight", "bias")},
            }
        )
        x = layer(x)
    return linear(x, "projector_3"), linear(x.mean(1), "projector_2")


def test_the_forward_pass_is_the_released_one() -> None:
    own, hidden = conditioner(), torch.randn(3, 5, 12)
    for found, expected in zip(own(hidden), reference(own, hidden), strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_new_one_conditions_on_nothing_and_learns_from_there() -> None:
    torch.manual_seed(0)
    own = Conditioner(dict(SIZES), 64, 32, 6, 10)
    sequence, pooled = own(torch.randn(2, 64, 32))
    assert not sequence.any() and not pooled.any()
    assert own.meta_queries.std().item() == pytest.approx(32**-0.5, rel=0.1)
    (sequence.square().sum() + sequence.sum() + pooled.sum()).backward()
    assert own.projector_3.weight.grad.any() and own.projector_2.weight.grad.any()


def test_a_released_folder_loads_and_is_written_back_as_it_was(tmp_path: Path) -> None:
    own = conditioner()
    folder = tmp_path / "release"
    folder.mkdir()
    config = {name: own.config[name] for name in own.config if not name.startswith("_") and name != "fused_layers"}
    written = {"_class_name": "StableDiffusion3Conditioner", **config}
    (folder / "config.json").write_text(json.dumps(written))
    save_file(own.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    Conditioner.from_pretrained(folder).save_pretrained(tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: back[name] for name in back if name not in ("_diffusers_version", "_name_or_path")} == written
    assert back["connector_config"]["_attn_implementation"] == "flash_attention_2"
    states = [load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder, tmp_path / "back")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_the_names_and_the_size_are_the_releases() -> None:
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 24, "num_attention_heads": 24}
    with torch.device("meta"):
        full = Conditioner(sizes)
    assert sum(p.numel() for p in full.connector.parameters()) == pytest.approx(887.1e6, rel=1e-3)
    names = set(full.state_dict())
    assert {"meta_queries", "projector_1.weight", "projector_2.bias", "projector_3.weight"} < names
    assert {"connector.layers.23.self_attn.out_proj.weight", "connector.layers.0.mlp.fc1.bias"} < names


def test_fused_layers_are_kept_by_the_folder(tmp_path: Path) -> None:
    own = conditioner(fused_layers=3)
    own.save_pretrained(tmp_path)
    back, hidden = Conditioner.from_pretrained(tmp_path), torch.randn(1, 5, 36)
    torch.testing.assert_close(back(hidden), own(hidden))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="takes hidden states of 12 channels, got 8"):
        conditioner()(torch.zeros(1, 5, 8))
    with pytest.raises(CheckpointError, match="lacks num_attention_heads"):
        Conditioner({"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="no multiple of 3 heads"):
        Conditioner(SIZES | {"num_attention_heads": 3})
    with pytest.raises(CheckpointError, match="hidden_act is relu"):
        Conditioner(SIZES | {"hidden_act": "relu"})
    conditioner().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "meta_queries"}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing: meta_queries"):
        Conditioner.from_pretrained(tmp_path)

"""Precision, recomputation and float8 of a transformer's blocks; reading one's own part of a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from micro import built
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_modules.networks import KontextTransformer, compile
from lightning_modules.networks.compute import (
    Compute,
    attend_in_float32,
    cast_weights,
    convert_float8,
    float8_blocks,
    recompute_blocks,
)
from lightning_modules.networks.loading import CheckpointError, stored_files
from lightning_modules.networks.sharding import load_sharded, read_shards


@pytest.fixture
def transformer() -> KontextTransformer:
    return KontextTransformer.from_pretrained(built() / "transformer").train()


def inputs(transformer: KontextTransformer) -> dict[str, torch.Tensor]:
    generator, config = torch.Generator().manual_seed(0), transformer.config
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    found = {"hidden_states": draw(2, config.in_channels, 8, 8), "timestep": torch.tensor([3.0, 700.0])}
    found |= {"encoder_hidden_states": draw(2, 5, config.joint_attention_dim)}
    found |= {"pooled_projections": draw(2, config.pooled_projection_dim)}
    found |= {"ref_hidden_states": draw(2, config.in_channels, 8, 8)}
    return found


def gradients(transformer: KontextTransformer) -> list[torch.Tensor]:
    transformer.zero_grad()
    transformer(**inputs(transformer)).sample.float().square().mean().backward()
    return [p.grad.clone() for p in transformer.parameters() if p.grad is not None]


def test_attention_alone_is_left_in_float32(transformer: KontextTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradients(transformer)
    attend_in_float32(transformer, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(gradients(transformer), exact, strict=True))
    seen, plain = set(), functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: torch.Tensor, **options: object) -> torch.Tensor:
        seen.add((query.dtype, torch.is_autocast_enabled("cpu")))
        return plain(query, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    with torch.autocast("cpu", torch.bfloat16):
        lower = gradients(transformer)
    assert seen == {(torch.float32, False)}
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(lower, exact, strict=True) if b.norm() > 1e-3]
    assert 1e-4 < max(errors) < 0.1


@pytest.mark.parametrize("what", [True, "cheap", 1])
def test_recomputed_gradients_are_the_same_bits(what: object, transformer: KontextTransformer) -> None:
    plain, names = gradients(transformer), list(transformer.state_dict())
    recompute_blocks(transformer, what)
    assert list(transformer.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(transformer), strict=True))


def test_blocks_that_recompute_are_compiled_a_graph_for_each_kind() -> None:
    """None of them runs as Python, which a checkpoint outside the block makes it do."""
    tests = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(tests / "compiled.py"), str(built())]
    found = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    results = json.loads(found.stdout.splitlines()[-1])
    assert [*results] == ["False", "True", "cheap"]
    for what, result in results.items():
        assert (result["eager"], result["graphs"]) == (0, 2) and result["error"] < 1e-4, what


@pytest.mark.parametrize("what", [3, -1])
def test_more_blocks_than_there_are_cannot_be_recomputed(what: int, transformer: KontextTransformer) -> None:
    with pytest.raises(CheckpointError, match="this transformer has 2 blocks"):
        recompute_blocks(transformer, what)


def test_bfloat16_weights_take_float32_inputs_and_exact_times(transformer: KontextTransformer) -> None:
    given, table = inputs(transformer), transformer.pos_embed.pos_embed.clone()
    exact = transformer(**given).sample
    cast_weights(transformer, torch.bfloat16)
    assert torch.equal(transformer.pos_embed.pos_embed, table)
    found = transformer(**given).sample
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)
    # 700 and 701 are one number in bfloat16.
    later = transformer(**{**given, "timestep": torch.tensor([3.0, 701.0])}).sample
    assert torch.equal(later[0], found[0]) and not torch.equal(later[1], found[1])


def test_float8_is_refused_where_there_is_none(
    transformer: KontextTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"compute capability 8\.9"):
        float8_blocks(transformer)


def test_float8_blocks_learn_with_names_as_they_were(transformer: KontextTransformer) -> None:
    pytest.importorskip("torchao.float8")
    exact, names = gradients(transformer), list(transformer.state_dict())
    convert_float8(transformer.transformer_blocks, emulate=True)
    found = gradients(transformer)
    assert list(transformer.state_dict()) == names
    assert any("Float8" in type(m).__name__ for m in transformer.modules())
    a, b = (torch.cat([g.flatten().float() for g in each]) for each in (exact, found))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98 and not torch.equal(a, b)


def test_a_rank_reads_its_own_rows(transformer: KontextTransformer) -> None:
    rank = 3
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        sharded = load_sharded(built(), mesh, Compute(), torch.device("cpu"))
        read = read_shards(built() / "transformer", sharded)
    finally:
        dist.destroy_process_group()
    whole = transformer.state_dict()
    for name, tensor in sharded.state_dict().items():
        if name == "pos_embed.pos_embed":
            assert torch.equal(tensor, whole[name])
            continue
        size = -(-len(whole[name]) // 4)
        assert torch.equal(tensor.to_local(), whole[name][rank * size : (rank + 1) * size]), name
    (file,) = stored_files(built() / "transformer")
    constant = whole["pos_embed.pos_embed"].nbytes
    assert read - constant <= 0.3 * (file.size - constant)


def test_a_download_that_is_not_complete_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").touch()
    with pytest.raises(CheckpointError, match=r"half downloaded: model\.safetensors\.part; download it again"):
        stored_files(tmp_path)


@pytest.mark.parametrize(
    ("gpu", "there", "missing"),
    [
        (False, {"g++"}, None),
        (False, {"gcc"}, "no C++ compiler"),
        (True, {"gcc"}, None),
        (True, set(), "no C compiler"),
    ],
)
def test_a_missing_compiler_is_named(
    gpu: bool, there: set[str], missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(compile.shutil, "which", lambda name: name if name in there else None)
    found = compile.missing_compiler()
    assert found is None if missing is None else found.startswith(missing)

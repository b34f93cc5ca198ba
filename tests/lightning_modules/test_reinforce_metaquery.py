"""Reinforcement of a Metaquery model: the transformer alone, or the connector too; conditions see the pictures."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from micro import built, built_vlm, micro_metaquery
from rl import SAMPLING, made, prompts, trained

from data_pipeline.errors import InputError
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines import MetaqueryPipeline
from lightning_modules.pipelines.opening import open_folder
from lightning_modules.rollouts.policy import Policy
from lightning_modules.rollouts.settings import Regularisation, Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_metaquery(tmp_path_factory.mktemp("metaquery") / "folder"))


def weights(pipeline: MetaqueryPipeline) -> dict[str, torch.Tensor]:
    parts = {"transformer": pipeline.transformer, "conditioner": pipeline.conditioner, "vlm": pipeline.vlm}
    return {f"{part}.{n}": p.detach().clone() for part, m in parts.items() for n, p in m.named_parameters()}


@pytest.mark.parametrize(("connector", "expected"), [(False, {"transformer"}), (True, {"transformer", "conditioner"})])
def test_what_learns_is_what_is_told(connector: bool, expected: set[str], folder: str, tmp_path: Path) -> None:
    module = made(folder, train_connector=connector)
    trained(module, [prompts(i, ("edit", "text_to_image")[i % 2]) for i in range(3)], 2, tmp_path)
    before, after = weights(MetaqueryPipeline.from_pretrained(folder)), weights(module.pipeline())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == expected and "conditioner.meta_queries" not in moved
    module.pipeline().save_pretrained(tmp_path / "export")
    exported = weights(MetaqueryPipeline.from_pretrained(tmp_path / "export"))
    assert all(torch.equal(exported[name], p) for name, p in after.items())


def test_both_ways_sample_the_same_pictures(folder: str) -> None:
    found = []
    for connector in (False, True):
        module = made(folder, train_connector=connector, sampling=Sampling(**{**vars(SAMPLING), "guidance_scale": 2.0}))
        module.configure_model()
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        with torch.no_grad():
            found.append(module.sample(prompts(0)))
    torch.testing.assert_close(found[0].trajectory.x0, found[1].trajectory.x0, atol=1e-5, rtol=1e-4)
    assert found[1].pooled.shape == (4, 0)


@torch.no_grad()
def test_the_negative_branch_sees_its_own_picture(folder: str) -> None:
    module = made(folder, sampling=Sampling(**{**vars(SAMPLING), "guidance_scale": 2.0}))
    module.configure_model()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    rollout = module.sample(prompts(0))
    pictures, negative = prompts(0).pixels(), module.sampling.negative_prompt
    expected = module.pipeline().condition(module.pipeline().read([negative] * 4, pictures))
    torch.testing.assert_close(rollout.negative, expected)
    assert not torch.allclose(rollout.negative[0][0], rollout.negative[0][1])
    # Groups taken apart, and put together again, keep theirs.
    again = type(rollout).join([rollout.select([2]), rollout.select([0])])
    x, sigma = torch.randn(6, *rollout.trajectory.x0.shape[1:]), torch.full((6,), 0.5)
    parts = [Policy.of(module.transformer, rollout.select([g]), 2.0)(x[:3], sigma[:3]) for g in (2, 0)]
    both = Policy.of(module.transformer, again, 2.0)(torch.cat([x[:3], x[:3]]), sigma)
    torch.testing.assert_close(both, torch.cat(parts), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_reinforced_is_named(folder: str, tmp_path: Path) -> None:
    blind = str(micro_metaquery(tmp_path / "blind", "vlm"))
    with pytest.raises(InputError, match="sees no picture to edit"):
        made(blind).configure_model()
    with pytest.raises(CheckpointError, match="train_connector needs a Metaquery model"):
        made(str(built()), train_connector=True).configure_model()
    with pytest.raises(InputError, match="a connector's is what it was"):
        made(folder, train_connector=True, regularisation=Regularisation(reference=folder, velocity_kl=0.1))
    assert made(folder, vlm=str(built_vlm())).configure_model() is None


def test_a_frozen_vlm_of_low_precision_knows_exactly_where_its_tokens_are(folder: str) -> None:
    vlm = open_folder(Path(folder), text_dtype=torch.bfloat16).vlm
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    frequencies = [buffer for name, buffer in vlm.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)

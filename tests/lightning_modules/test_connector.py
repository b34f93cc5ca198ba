"""The stages of Metaquery on a micro folder: what starts at zero, what trains, what is drawn, and how a run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from micro import built, built_vlm, micro_metaquery
from rl import Stream, prompts
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batches import ImageBatch
from data_pipeline.errors import InputError
from lightning_modules.connector import KEEP, Connector, ConnectorModule
from lightning_modules.kontext import Dropout
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.vlm import Reading
from lightning_modules.pipelines import MetaqueryPipeline

SIZES = Connector(num_queries=4, width=16, inner=24, layers=1, heads=2)


def batch(task: str = "edit", count: int = 3, seed: int = 0) -> ImageBatch:
    return prompts(seed, task, count)


def made(**changes: object) -> ConnectorModule:
    settings = {"pretrained": str(built()), "vlm": str(built_vlm()), "connector": SIZES, "steps": 10}
    module = ConnectorModule(**{**settings, **changes})
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_metaquery(tmp_path_factory.mktemp("metaquery") / "folder"))


def test_a_new_connector_leaves_the_conditions_at_zero() -> None:
    module = made()
    sequence, pooled = module.embed(batch())
    assert sequence.shape == (3, 4, 16) and not sequence.any() and not pooled.any()
    v = [
        module.transformer(torch.ones(1, 2, 8, 8), s, p, torch.ones(1)).sample
        for s, p in ((sequence[:1], pooled[:1]), (torch.zeros(1, 4, 16), torch.zeros(1, 16)))
    ]
    assert torch.equal(*v)


PARTS = {
    "stage 1": (["connector"], {"conditioner"}),
    "transformer alone": (["transformer"], {"transformer"}),
    "stage 3": (["connector", "transformer"], {"conditioner", "transformer"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_gradients_reach_only_what_a_stage_trains(name: str, folder: str) -> None:
    train, expected = PARTS[name]
    module = made(pretrained=folder, vlm=None, train=train)
    module.flow_matching_loss(batch()).backward()
    every = {**dict(module.named_parameters()), **dict(module.pipeline().vlm.named_parameters("vlm"))}
    reached = {n for n, p in every.items() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[0] for n in reached} == expected
    assert ("conditioner.meta_queries" in reached) == ("connector" in train)
    assert {n for n, _ in module.trainable_parameters()} >= reached


@pytest.mark.parametrize("reference", ["both", "vlm", "transformer"])
def test_references_reach_who_is_told(reference: str, folder: str) -> None:
    module = made(pretrained=folder, vlm=None, reference=reference)
    one, other = batch(), batch()
    other.references = other.references.flip(-1)
    differ = [not torch.allclose(a, b) for a, b in zip(module.embed(one), module.embed(other), strict=True)]
    assert all(differ) == (reference != "transformer") and any(differ) == (reference != "transformer")
    assert (module.encode(module.prepared(one))[1] is None) == (reference == "vlm")
    assert torch.isfinite(module.flow_matching_loss(one))


def test_moments_train_as_pixels_do_where_pixels_come_along(folder: str) -> None:
    module = made(pretrained=folder, vlm=None)
    encoded = module.latent_encoder().encode_batch(batch())
    assert encoded.encoded and torch.equal(module.flow_matching_loss(encoded), module.flow_matching_loss(batch()))
    with pytest.raises(InputError, match=r"set data.reference_pixels to true"):
        module.flow_matching_loss(replace(encoded, pictures=None))
    with pytest.raises(InputError, match="prompts have no target"):
        module.flow_matching_loss(replace(batch(), target=torch.zeros(3, 0, 32, 32)))


def test_a_batch_with_and_without_references_is_its_singles(folder: str) -> None:
    module = made(pretrained=folder, vlm=None)
    mixed = batch()
    mixed.references = [[mixed.references[0, 0]], [], [mixed.references[2, 0], torch.zeros(3, 16, 32)]]
    mixed.tasks[1] = "text_to_image"
    whole = module.embed(mixed)
    for i in range(3):
        for found, alone in zip(whole, module.embed(mixed.sample(i)), strict=True):
            torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(module.flow_matching_loss(mixed))


def test_some_edits_become_reconstructions(folder: str) -> None:
    module = made(pretrained=folder, vlm=None, reconstruction=0.5)
    many = module.prepared(batch(count=24))
    kept = [prompt == KEEP for prompt in many.prompts]
    assert 4 < sum(kept) < 20
    for i, one in enumerate(kept):
        assert torch.equal(many.target[i], many.references[i, 0]) == one
    module.eval()
    assert KEEP not in module.prepared(batch(count=24)).prompts
    assert module.train().prepared(batch("text_to_image")).prompts == batch().prompts


def test_captions_are_dropped_and_their_pictures_kept(folder: str) -> None:
    module = made(pretrained=folder, vlm=None, dropout=Dropout(caption={"edit": 1.0}))
    without = module.embed(module.prepared(batch()))
    expected = module.pipeline().condition(module.pipeline().read([""] * 3, batch().pixels()))
    torch.testing.assert_close(without, expected)


def test_a_light_head_has_the_outer_blocks(folder: str) -> None:
    module = made(train=["connector", "transformer"], light_head=1)
    assert len(module.transformer.transformer_blocks) == module.transformer.config.num_layers == 1
    assert torch.isfinite(module.flow_matching_loss(batch()))
    with pytest.raises(CheckpointError, match="light_head keeps 3 blocks; this transformer has 2"):
        made(light_head=3)


def test_adapters_in_the_vlm_learn_and_reach_the_export(folder: str, tmp_path: Path) -> None:
    lora = Lora(2, 4, ["language_model.layers.0.self_attn.v_proj", "language_model.layers.1.self_attn.v_proj"])
    module = made(pretrained=folder, vlm=None, train=[], vlm_lora=lora)
    module.flow_matching_loss(batch()).backward()
    names = [n for n, p in module.trainable_parameters() if p.grad is not None and p.grad.any()]
    assert names and all("lora_B" in n for n in names)
    with torch.no_grad():
        for _, p in module.trainable_parameters():
            p.add_(0.3)
    module.pipeline().save_pretrained(tmp_path / "export")
    found, own = MetaqueryPipeline.from_pretrained(tmp_path / "export"), module.pipeline()
    texts = ["a red circle"]
    torch.testing.assert_close(found.condition(found.read(texts, None)), own.condition(own.read(texts, None)))


@pytest.mark.parametrize("task", ["edit", "text_to_image"])
def test_with_the_texts_own_conditions_their_velocity_is_met(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(target="text")
    assert module.flow_matching_loss(batch(task)) > 0
    monkeypatch.setattr(module, "embed", lambda own: module._texts(own.prompts))
    assert module.flow_matching_loss(batch(task)) == 0


COSTS = {
    "connector": {"train": ["connector"]},
    "both": {"train": ["connector", "transformer"]},
    "connector, to what texts give": {"train": ["connector"], "target": "text"},
}


@pytest.mark.parametrize("name", COSTS)
def test_flops_by_hand_equal_counted_ones(name: str) -> None:
    module = made(**COSTS[name])
    data = batch()
    module.flow_matching_loss(data)  # reads the prompts
    with FlopCounterMode(display=False) as counter:
        module.flow_matching_loss(data).backward()
    frozen = FlopCounterMode(display=False)
    with frozen, torch.no_grad():
        module.prepared(data)
    counted = counter.get_total_flops() - frozen.get_total_flops()
    # Queries go back through the language model without its weights, and so through its attention at its full cost.
    assert module.training_flops(data) == pytest.approx(counted, rel=0.1)


def trained(start: int, stop: int, root: Path, folder: str) -> ConnectorModule:
    """Trains on the batches from `start` to `stop`, from the checkpoint at `start` where that is not 0."""
    module = ConnectorModule(folder, train=["connector"], steps=4)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=stop, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
    )  # fmt: skip
    batches = [batch(("edit", "text_to_image")[i % 2], seed=i) for i in range(start, stop)]
    before = root / f"{start}.ckpt" if start else None
    trainer.fit(module, DataLoader(Stream(batches), batch_size=None), ckpt_path=before, weights_only=True)
    trainer.save_checkpoint(root / f"{stop}.ckpt")
    return module


def test_a_run_resumes_bit_for_bit_and_keeps_no_frozen_weights(folder: str, tmp_path: Path) -> None:
    whole = trained(0, 4, tmp_path / "whole", folder)
    trained(0, 2, tmp_path, folder)
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert state["state_dict"] and all(name.startswith("conditioner.") for name in state["state_dict"])
    again = trained(2, 4, tmp_path, folder)
    for (name, p), (_, q) in zip(again.trainable_parameters(), whole.trainable_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_second_stage_goes_on_with_the_firsts_conditioner(folder: str) -> None:
    module = made(vlm=None, conditioner=folder, train=["connector", "transformer"])
    own = MetaqueryPipeline.from_pretrained(folder)
    assert torch.equal(module.conditioner.meta_queries, own.conditioner.meta_queries)
    again = made(pretrained=folder, vlm=None)
    assert torch.equal(again.conditioner.meta_queries, own.conditioner.meta_queries)


def test_equal_seeds_make_equal_connectors() -> None:
    one, same, other = (made(seed=seed).conditioner.meta_queries for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_queries_start_at_the_norm_that_is_asked_for() -> None:
    one, long = (made(connector=replace(SIZES, query_norm=n)).conditioner.meta_queries for n in (1.0, 2.5))
    assert torch.equal(long, 2.5 * one) and 0.5 < one.norm(dim=1).mean() < 1.5


def test_fewer_queries_and_more_layers_by_config() -> None:
    module = made(connector=replace(SIZES, num_queries=2), reading=Reading("1d", [-3, -1]))
    assert module.embed(batch())[0].shape == (3, 2, 16)
    assert module.conditioner.projector_1.in_features == 64


MISTAKES = {
    "nothing to train": ({"train": []}, InputError, "train is empty"),
    "a share above 1": ({"reconstruction": 2.0}, InputError, "reconstruction is a share"),
    "a cache of what changes": (
        {"vlm_lora": Lora(2, 2), "feature_cache": "x"},
        InputError,
        "leave it out, or vlm_lora",
    ),
    "no VLM anywhere": ({"vlm": None}, CheckpointError, "no vision-language model at"),
    "no conditioner there": ({"conditioner": "nowhere"}, CheckpointError, "nowhere is no folder"),
    "a teacher that changes": ({"target": "text", "train": ["transformer"]}, InputError, "frozen transformer"),
    "queries of no length": ({"connector": {"query_norm": 0.0}}, InputError, "query_norm is above 0"),
    "a task's name": ({"task_weights": {"edt": 1.0}}, InputError, "names edt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    changes, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        made(**{name: Connector(**value) if name == "connector" else value for name, value in changes.items()})

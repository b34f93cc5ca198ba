"""Edits drawn by a model: of the seed and the key alone, at settings that are told, and never anything but edits."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from micro import micro_folder
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.records import EditRecord, PromptRecord, Rejected
from data_pipeline.scenes import edit_record, text_image_record
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.sampled_edits import SampledEdits

RECORDS = [edit_record(1, 0, number, "train") for number in range(5)]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> SampledEdits:
    folder = micro_folder(tmp_path_factory.mktemp("micro") / "folder")
    return SampledEdits(str(folder), 64, [0.5, 1.0, 2.0], [1, 2], "")


def shown(record: EditRecord) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.target.data))).astype(float)


def test_a_picture_is_of_its_key_alone_whatever_else_is_in_the_batch(step: SampledEdits) -> None:
    together = step.rewrite(RECORDS)
    for record, found in zip(RECORDS, together, strict=True):
        (alone,) = step.rewrite([record])
        assert np.abs(shown(alone) - shown(found)).max() <= 1  # sums over batches round otherwise
        assert found == replace(record, target=found.target, metadata=found.metadata)
        assert found.metadata.items() > record.metadata.items()
    settings = {(r.metadata["guidance_scale"], r.metadata["num_inference_steps"]) for r in together}
    assert len(settings) > 1 and settings <= {(s, n) for s in (0.5, 1.0, 2.0) for n in (1, 2)}


def test_copies_of_a_record_are_drawn_anew(step: SampledEdits) -> None:
    first, second = step.rewrite([replace(RECORDS[0], key=key) for key in ("a-0", "a-1")])
    assert np.abs(shown(first) - shown(second)).max() > 5


def test_prompts_with_sources_become_edits_and_all_else_is_rejected(step: SampledEdits) -> None:
    edit = RECORDS[1]
    prompt = PromptRecord(edit.key, edit.instruction, edit.sources, "here", "CC0-1.0", "val", {"a": 1})
    caption, bare = text_image_record(1, 0, 0, "train"), PromptRecord("p", "a cat")
    found = step.rewrite([caption, prompt, bare])
    assert [r.reason for r in found if isinstance(r, Rejected)] == ["no edit"] * 2
    assert found[1].sources == edit.sources and found[1].split == "val" and found[1].metadata["a"] == 1
    assert np.array_equal(shown(found[1]), shown(step.rewrite([edit])[0]))


def test_several_sources_are_drawn_alike(step: SampledEdits) -> None:
    two = replace(RECORDS[0], sources=(*RECORDS[0].sources, RECORDS[1].target))
    together, alone = step.rewrite([two, *RECORDS[1:]])[0], step.rewrite([two])[0]
    assert np.abs(shown(together) - shown(alone)).max() <= 1


def test_weights_are_named_and_missing_ones_too(step: SampledEdits, tmp_path: Path) -> None:
    assert step.fingerprint.startswith("transformer@")
    pipeline = KontextPipeline.from_pretrained(step.pretrained)
    pipeline.transformer.proj_out.weight.data += 1
    pipeline.save_pretrained(tmp_path / "other")
    assert SampledEdits(str(tmp_path / "other")).fingerprint != step.fingerprint
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        SampledEdits(str(tmp_path / "nowhere")).fingerprint  # noqa: B018
    with pytest.raises(InputError, match="at least one guidance scale"):
        SampledEdits("", guidance_scales=[])

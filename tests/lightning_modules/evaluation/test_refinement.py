"""Success before and after generate, plan, edit: before is the benchmark's own number, and edits are judged anew."""

from __future__ import annotations

import random

import numpy as np
import pytest
from micro import micro_metaquery
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.scenes.captions import random_caption
from data_pipeline.scenes.renderer import render
from lightning_modules.evaluation import refinement as module
from lightning_modules.evaluation.refinement import refinement
from lightning_modules.evaluation.scenes import SceneBenchmark, held_out, score_captions
from lightning_modules.pipelines import MetaqueryPipeline

SETTINGS = SceneBenchmark(
    count=6, num_inference_steps=1, guidance_scales=(1.0,), tasks=("text_to_image",), batch_size=4
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> MetaqueryPipeline:
    return MetaqueryPipeline.from_pretrained(micro_metaquery(tmp_path_factory.mktemp("metaquery") / "folder"))


def test_an_untrained_model_is_measured_before_and_after(pipeline: MetaqueryPipeline) -> None:
    found = refinement(pipeline, SETTINGS, rounds=1)
    captions, _ = held_out(SETTINGS)
    assert found["before"] == score_captions(pipeline, captions, SETTINGS, 1.0)
    assert len(found["after"]) == 6 and found == refinement(pipeline, SETTINGS, rounds=1)
    with pytest.raises(InputError, match="rounds of refinement are 0"):
        refinement(pipeline, SETTINGS, rounds=0)


def test_what_edits_mend_and_spoil_is_seen(pipeline: MetaqueryPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    drawn = {caption.text: (scene, caption) for scene, caption in (random_caption(rng, 1, "val") for _ in range(6))}
    right = {text: render(scene) for text, (scene, _) in drawn.items()}
    captions = [caption for _, caption in drawn.values()]
    wrong, others = captions[0].text, len(captions) - 1

    def generated(_: object, prompts: list[str], *more: object) -> np.ndarray:
        return np.stack([right[prompt] * (prompt != wrong) for prompt in prompts]).astype(np.float64)

    def refined(_: object, prompts: list[str], pictures: list[Image.Image], *more: object, **sampling: object) -> list:
        assert [p.getbbox() is None for p in pictures] == [prompt == wrong for prompt in prompts]
        return [Image.fromarray(right[prompt]) if prompt == wrong else Image.new("RGB", (64, 64)) for prompt in prompts]

    monkeypatch.setattr(module, "held_out", lambda _: (captions, []))
    monkeypatch.setattr(module, "generate", generated)
    monkeypatch.setattr(module, "refine", refined)
    assert refinement(pipeline, SETTINGS) == {"before": [0] + [1] * others, "after": [1] + [0] * others}

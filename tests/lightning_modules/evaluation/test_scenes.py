"""The benchmark asks for what its settings say."""

from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.scenes import benchmark
from data_pipeline.scenes.renderer import render
from lightning_modules.evaluation.scenes import SceneBenchmark, evaluate


class Draughtsman:
    """A pipeline that does every edit it knows, and draws nothing for a caption."""

    def __init__(self, level: int, count: int) -> None:
        _, edits = benchmark(level, count, 0)
        self.targets = {edit.instruction: render(edit.target) for edit in edits}
        self.sides: list[int] = []

    def __call__(self, prompts: list[str], *, image: Any, height: int, width: int, **_: Any) -> list[np.ndarray]:
        self.sides.append(height)
        blank = np.full((height, width, 3), 255)
        return [np.stack([self.targets.get(prompt, blank) if image else blank for prompt in prompts]) / 255]


def test_captions_may_be_of_another_level_and_of_few_tasks() -> None:
    settings = SceneBenchmark(1, 12, guidance_scales=(1.0,), caption_level=2, caption_tasks=("counting",))
    pipeline: Any = Draughtsman(1, 12)
    metrics = evaluate(pipeline, settings)
    assert pipeline.sides == [96, 64]
    assert {name for name in metrics if name.startswith("t2i")} == {"t2i_success", "t2i_success_counting"}
    assert metrics["t2i_success"] == 0
    assert metrics["preservation"] > 0.9  # instructions may be alike, so not every picture is the one wanted


@pytest.mark.parametrize("wrong", [{"caption_level": 9}, {"caption_tasks": ()}, {"caption_tasks": ("colors",)}])
def test_captions_that_nobody_holds_out_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"benchmark\.(level|caption_tasks)"):
        SceneBenchmark(**wrong)

"""Every recipe of configs/data: headed by its command, built from classes of this project only, and sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.executors.local import Local
from data_pipeline.recipe import Recipe, load_recipe, load_scoring, load_selection
from data_pipeline.score import score
from data_pipeline.select import Selection
from data_pipeline.sources import Scenes
from data_pipeline.steps.quality import Quality

FOLDER = Path(__file__).parents[2] / "configs" / "data"
SELECTIONS = sorted(FOLDER.glob("select*.yaml"))
SCORED = ("score_text_image", "score_edit", "judge_edit", "score_chains", "score_chains_scenes", "grade_chains")
SCORINGS = [FOLDER / f"{name}.yaml" for name in SCORED]
RECIPES = sorted(set(FOLDER.glob("*.yaml")) - {*SELECTIONS, *SCORINGS})


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_headed_by_its_command_and_loads(path: Path) -> None:
    command = path.read_text().splitlines()[0]
    assert command.startswith(f"# python -m data_pipeline build -c configs/data/{path.name} ") and "--output" in command
    overrides = ["--source.path", "somewhere"] if "--source.path" in command else []
    recipe = load_recipe(path, overrides)
    assert recipe.records_per_shard >= 1
    if path.stem in ("edit", "text_image", "prompts", "reasoning"):  # whose input nobody has looked at
        assert 0 < recipe.max_rejected < 0.5


@pytest.mark.parametrize("path", SELECTIONS, ids=lambda p: p.stem)
def test_rules_are_headed_by_their_command_and_load(path: Path) -> None:
    assert path.read_text().startswith("# python -m data_pipeline select ")
    assert isinstance(load_selection(path), Selection)
    assert load_selection(path, ["--rules.where", "[words >= 9]"]).where == ["words >= 9"]


@pytest.mark.parametrize("path", SCORINGS, ids=lambda p: p.stem)
def test_scores_are_headed_by_their_command_and_load(path: Path) -> None:
    command = path.read_text().splitlines()[0]
    assert command.startswith("# python -m data_pipeline score ") and f"-c configs/data/{path.name}" in command
    assert load_scoring(path)


@pytest.mark.parametrize("name", ["score_text_image", "score_edit"])
def test_a_recipe_whose_models_are_missing_says_which(name: str, tmp_path: Path) -> None:
    Recipe(Scenes(1, 2, 2, 0)).build(tmp_path / "out")
    with pytest.raises(InputError, match="models/clip-vit-large-patch14"):
        score(tmp_path / "out", load_scoring(FOLDER / f"{name}.yaml"), Local())


SIMILARITY = "data_pipeline.steps.similarity.Similarity"


@pytest.mark.parametrize(
    ("embedder", "expected"),
    [
        ("antigravity.Any", "expected class_path and init_args"),
        ("{class_path: antigravity.Any}", "must start with"),
        ("{class_path: lightning_modules.pipelines.scorers.Path}", "no class of this package"),
        ("{class_path: lightning_modules.pipelines.scorers.LinearRater}", "embedder"),
        ("{class_path: lightning_modules.pipelines.scorers.ClipEmbedder, init_args: {folders: x}}", "folders"),
        ("3", "expected class_path and init_args"),
    ],
)
def test_a_model_is_one_of_this_project_with_the_right_settings(embedder: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "source: {class_path: data_pipeline.sources.Scenes}\n"
        f"steps: [{{class_path: {SIMILARITY}, init_args: {{embedder: {embedder}}}}}]"
    )
    with pytest.raises(InputError, match=expected):
        load_recipe(tmp_path / "r.yaml")


def test_what_decides_no_output_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    def settings(**changes: object) -> dict:
        endpoint = {"url": "http://127.0.0.1:1/v1", "model": "m", "seconds": 9, **changes}
        (tmp_path / "r.yaml").write_text(
            "source: {class_path: data_pipeline.sources.Scenes}\n"
            f"steps: [{{class_path: data_pipeline.steps.judge.VlmJudge, init_args: {{endpoint: {endpoint}}}}}]"
        )
        return load_recipe(tmp_path / "r.yaml").settings

    assert settings(url="http://127.0.0.1:2/v1", threads=2) == settings()
    assert settings(model="n") != settings()


def test_a_score_that_two_steps_write_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two steps write the score column min_side"):
        Recipe(Scenes(1, 2, 2, 0), [Quality(), Quality()]).build(tmp_path / "out")
    assert not (tmp_path / "out").exists()

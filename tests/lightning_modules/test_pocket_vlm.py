"""The pocket VLM: built once, the same for equal recipes, learns, and understands what a bar says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro import VLM_RECIPE, built_vlm

from data_pipeline.scenes import visual_questions
from lightning_modules import pocket_vlm
from lightning_modules.evaluation.understanding import score_answers
from lightning_modules.networks.vlm import Vlm
from lightning_modules.pipelines.metaquery import MetaqueryPipeline


def test_a_path_is_left_alone_and_pocket_is_built_once(tmp_path: Path) -> None:
    assert pocket_vlm.vlm_folder("some/folder") == Path("some/folder")
    folder = pocket_vlm.vlm_folder("pocket", tmp_path, VLM_RECIPE)
    assert (folder / "model.safetensors").read_bytes() == (built_vlm() / "model.safetensors").read_bytes()
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    assert pocket_vlm.vlm_folder("pocket", tmp_path, VLM_RECIPE) == folder
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob("*")}


def test_teaching_lowers_the_loss(tmp_path: Path) -> None:
    recipe = replace(VLM_RECIPE, steps=25, batch=16, lr=0.05)
    pocket_vlm.build_vlm(tmp_path, recipe)
    before, after = Vlm.from_pretrained(built_vlm()), Vlm.from_pretrained(tmp_path)
    asked = visual_questions.benchmark(1, 14, 1)
    with torch.no_grad():
        losses = [pocket_vlm.answer_loss(v, [pocket_vlm.example(v, q) for q in asked]) for v in (before, after)]
    assert losses[1] < losses[0] - 1, losses


@torch.no_grad()
def test_the_loss_is_that_of_answers_alone() -> None:
    vlm = Vlm.from_pretrained(built_vlm())
    found = [pocket_vlm.example(vlm, q) for q in visual_questions.benchmark(1, 7, 0)]
    singles, counts = [pocket_vlm.answer_loss(vlm, [each]) for each in found], [len(e.ids) - e.asked for e in found]
    expected = sum(loss * count for loss, count in zip(singles, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(pocket_vlm.answer_loss(vlm, found), expected)


def test_answers_are_scored_word_for_word() -> None:
    asked = visual_questions.benchmark(1, 14, 0)
    waiting = iter(asked)

    class Knowing:
        def ask(self, question, image, max_new_tokens):
            own = [next(waiting) for _ in question]
            assert question == [q.text for q in own]
            assert all((i is None) == (q.scene is None) for q, i in zip(own, image, strict=True))
            return [q.answer if q.kind != "count" else "many" for q in own]

    assert score_answers(Knowing(), asked, 5) == [float(q.kind != "count") for q in asked]


@pytest.mark.slow
def test_the_pocket_vlm_understands_held_out_scenes() -> None:
    folder = pocket_vlm.vlm_folder("pocket", Path(__file__).parents[2] / "pocket")
    vlm = Vlm.from_pretrained(folder)

    class Asked:
        ask = MetaqueryPipeline.ask

    asked = Asked()
    asked.vlm = vlm
    scores = score_answers(asked, visual_questions.benchmark(1, 700, 0), 100)
    print(f"understanding {sum(scores) / len(scores):.3f}")
    assert sum(scores) / len(scores) >= 0.85

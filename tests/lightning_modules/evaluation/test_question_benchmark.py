from __future__ import annotations

import pytest
import torch
from micro_r1v import micro_r1v

from data_pipeline.errors import InputError
from data_pipeline.scenes.questions import written
from lightning_modules.evaluation import questions
from lightning_modules.evaluation.questions import MODES, QuestionBenchmark, answer_of, asked, held_out, means, outcomes

SMALL = QuestionBenchmark(questions=12, max_new_tokens=4, samples=5)


def test_outcomes_are_those_of_the_same_held_out_questions_in_every_mode() -> None:
    found = outcomes(micro_r1v(), SMALL)
    kinds = [question.kind for _, question in held_out(SMALL)]
    counted = {kind: kinds.count(kind) for kind in kinds}
    whole = {f"{what}_{mode}": 12 for what in ("right", "ended", "length") for mode in MODES}
    parts = {f"{what}_{m}_{kind}": n for what in ("right", "length") for m in MODES for kind, n in counted.items()}
    assert {name: len(values) for name, values in found.items()} == {**whole, **parts}
    assert sum(sum(found[f"length_blind_{kind}"]) for kind in counted) == sum(found["length_blind"])
    assert all(0 < length <= 4 for length in found["length_pictures"])
    assert outcomes(micro_r1v(), SMALL) == found
    assert all(scene.split == "val" for scene, _ in held_out(SMALL))
    assert means(found)["length_words"] == sum(found["length_words"]) / 12


def test_right_answers_are_right_in_any_manner(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = micro_r1v(), held_out(SMALL)
    end = model.tokenizer.eos_token_id

    def told(style: str) -> list[torch.Tensor]:
        texts = [written(question, style, scene).removeprefix("<think>\n") for scene, question in items]  # type: ignore[arg-type]
        return [torch.tensor([*model.tokenizer(t, add_special_tokens=False)["input_ids"], end]) for t in texts]

    for style in ("short", "steps", "chain"):
        monkeypatch.setattr(questions, "answers", lambda *_, style=style: told(style))
        found = outcomes(model, SMALL)
        assert found["right_pictures"] == [1.0] * 12 and found["ended_blind"] == [1.0] * 12
    monkeypatch.setattr(questions, "answers", lambda *_: told("describe"))
    assert sum(outcomes(model, SMALL)["right_words"]) < 12


def test_modes_differ_in_what_is_given() -> None:
    scene, question = held_out(SMALL)[0]
    assert asked(scene, question, "pictures") == f"<image>\n{question.text}"
    assert asked(scene, question, "blind") == question.text
    told = asked(scene, question, "words")
    assert told.endswith(f".\n{question.text}") and scene.objects[0].colour in told


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"benchmark\.modes"):
        QuestionBenchmark(modes=("smell",))
    with pytest.raises(InputError, match="counts of at least 1"):
        QuestionBenchmark(questions=0)
    assert answer_of("<think>\nred or blue\n</think>\nred") == "red"

"""Grades of conversations: what a judge and the ground truth say, and that iterations choose by them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import Server, chat, running
from micro_r1v import question_shards

from data_pipeline.__main__ import main
from data_pipeline.chat import chosen, load_chats, scores_of
from data_pipeline.chat_datamodule import ChatDataModule
from data_pipeline.endpoint import Endpoint
from data_pipeline.errors import InputError
from data_pipeline.executors.local import Local
from data_pipeline.recipe import Recipe
from data_pipeline.records import EncodedImage, ReasoningRecord, TextImageRecord
from data_pipeline.score import score
from data_pipeline.sources import SceneQuestions
from data_pipeline.steps.chain_grades import SceneChainGrades, VlmChainGrades, true_grade
from data_pipeline.steps.metadata import Metadata

PICTURE = EncodedImage(b"...", "png")
RECIPE = Path(__file__).parents[2] / "configs" / "data" / "grade_chains.yaml"


@pytest.fixture
def judge() -> Iterator[Server]:
    with running() as found:
        yield found


def record(said: str, **facts: object) -> ReasoningRecord:
    turns = (("user", "<image>what colour?"), ("assistant", said))
    return ReasoningRecord("r-1", (PICTURE,), turns, metadata=facts)


def endpoint(judge: Server) -> Endpoint:
    return Endpoint(judge.url, "m", retries=0, threads=2)


def test_a_judge_is_shown_question_and_answer_and_its_grade_is_a_column(judge: Server) -> None:
    judge.reply = lambda text, times: chat('{"reasoning": "fine", "grade": 4}')
    step = VlmChainGrades(endpoint(judge), name="quality")
    assert step.score([record('It is "red".', answer="red")]) == [{"quality": 4.0, "quality_note": None}]
    [question] = judge.texts()
    assert 'Right answer: "red"' in question and json.dumps('It is "red".') in question and "what colour?" in question
    assert judge.asked[0]["messages"][0]["content"][0]["type"] == "image_url"
    assert [c.name for c in step.columns()] == ["quality", "quality_note"]
    assert step.columns()[0].metadata[b"scorer"] == b"m"
    step.score([record("It is red.")])
    assert "Right answer" not in judge.texts()[1]
    turns = (("user", "<image>colour?"), ("assistant", "red."), ("user", "sure?"), ("assistant", "yes."))
    step.score([ReasoningRecord("r-2", (PICTURE,), turns)])
    assert json.dumps("user: <image>colour?\nassistant: red.\nuser: sure?") in judge.texts()[2]
    assert 'graded, with its reasoning: "yes."' in judge.texts()[2]
    with pytest.raises(InputError, match="name of a grade"):
        VlmChainGrades(endpoint(judge), name="A b")


@pytest.mark.parametrize("said", ["five", '{"grade": 6}', '{"grade": true}', '{"grade": 4.5}', '{"grade": "5"}', "{}"])
def test_nonsense_is_no_grade(judge: Server, said: str) -> None:
    judge.reply = lambda text, times: chat(said)
    [found] = VlmChainGrades(endpoint(judge)).score([record("red", answer="red")])
    assert found["score"] is None and found["score_note"]


def test_what_has_no_answer_is_not_asked_about(judge: Server) -> None:
    bare = ReasoningRecord("r-2", (PICTURE,), (("user", "<image>what?"),))
    found = VlmChainGrades(endpoint(judge), longest=10).score(
        [bare, record("x" * 11), TextImageRecord("t", PICTURE, "a")]
    )
    assert [row["score"] for row in found] == [None] * 3 and not judge.asked
    notes = [row["score_note"] for row in found]
    assert "does not end with an answer" in notes[0] and "11 characters" in notes[1] and "text_image" in notes[2]


def test_the_recipe_scores_shards_and_iterations_choose_by_it(
    judge: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From the recipe to what an iteration trains on; the records' own "score" no longer counts."""
    folder = question_shards(tmp_path / "shards", counts={"chain": 32}, flawed=0.5)
    before = {chat.record.key: chat for chat in load_chats([str(folder)], {}, {})}
    poor = [chat for chat in before.values() if chat.turns[1][1].endswith("{yes}")]
    told = {json.dumps(poor[0].turns[0][1])}  # of this one the judge says nothing that can be used

    def reply(text: str, times: int) -> tuple:
        if any(question in text for question in told):
            return chat("no idea")
        return chat(json.dumps({"grade": 1 if "{yes}" in text else 5}))

    judge.reply = reply
    recipe = tmp_path / RECIPE.name
    recipe.write_text(RECIPE.read_text().replace("http://127.0.0.1:8000/v1", judge.url))
    assert main(["score", str(folder), "-c", str(recipe), "--workers", "1"]) == 0
    assert "32 records" in (told_user := capsys.readouterr().out) and "no idea" in told_user
    chats = load_chats([str(folder)], {}, {})
    grades = {c.record.key: c.metadata["score"] for c in chats}
    assert set(grades.values()) == {None, 1.0, 5.0} and grades[poor[0].record.key] is None
    found = chosen(chats, "score", 4, {poor[1].record.sample_id})
    assert poor[1].record.key in {c.record.key for c in found} and len(found) == list(grades.values()).count(5.0) + 1
    data = ChatDataModule([str(folder)], batch_size=2, steps=2, minimum={"score": 4})
    data.setup("fit")
    assert len(data.train) + len(data.val) == list(grades.values()).count(5.0)


def test_a_score_that_nobody_could_give_is_an_error_with_its_reason(judge: Server, tmp_path: Path) -> None:
    folder = question_shards(tmp_path / "shards", counts={"chain": 16})
    judge.reply = lambda text, times: chat("never")
    score(folder, [VlmChainGrades(endpoint(judge))], Local())
    with pytest.raises(InputError, match=r"16 of 16 conversations have no number score.*never.*grade_chains.yaml"):
        chosen(load_chats([str(folder)], {}, {}), "score", 2, ())
    with pytest.raises(InputError, match=r"without a number score': 16"):
        load_chats([str(folder)], {"score": 2}, {})


def test_a_choice_that_leaves_nothing_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = question_shards(tmp_path / "shards", counts={"chain": 16})
    chats = load_chats([str(folder)], {"score": 5}, {})
    assert "data.minimum {'score': 5} chooses nothing" in caplog.text
    assert chosen(chats, "score", 5, ()) == chats
    assert "the score of 5 chooses nothing: all 16 conversations are trained on" in caplog.text


def test_what_a_column_repeats_of_the_metadata_stays_the_records_own(tmp_path: Path) -> None:
    steps = [Metadata({"answer": "number", "hops": "number"}), SceneChainGrades()]
    Recipe(SceneQuestions(1, {"chain": 8}), steps).build(tmp_path / "shards")
    assert {tuple(row) for row in scores_of(tmp_path / "shards").values()} == {("score", "score_note")}
    assert all(isinstance(c.metadata["answer"], str) for c in load_chats([str(tmp_path / "shards")], {}, {}))


@pytest.mark.parametrize("level", [1, 2])
def test_the_ground_truth_grades_as_flaws_were_made(level: int) -> None:
    """Those of another scene may be true of this one by chance, and an answer that is off topic too."""
    source = SceneQuestions(level, {"chain": 600}, flawed=0.8, seed=3)
    records = [source.record("chain", number, "train") for number in range(600)]
    found = [(r.metadata["score"], true_grade(r, r.turns[-1][1])) for r in records]
    for made, wanted in ((5, {5}), (4, {4}), (3, {3}), (1, {1})):
        assert {grade for score, grade in found if score == made} == wanted, made
    for made, low in ((2, {2}), (0, {0, 1, 2})):
        own = [grade for score, grade in found if score == made]
        assert len(own) > 50 and sum(grade in low for grade in own) > 0.8 * len(own), made


def test_chains_that_a_model_might_write_are_graded_by_what_they_see() -> None:
    scene = "1|white|0:red-circle-large|3:blue-square-large"
    facts = {"scene": scene, "answer": "red"}
    grades = {
        "<think>\ntop left, red circle.\n</think>\n\\boxed{red}": 5,
        "<think>\nred circle top left, blue square bottom right.\n</think>\n\\boxed{red}": 5,
        "<think>\ncircles: top left, 1.\n</think>\n\\boxed{red}": 5,
        "<think>\ncircles: bottom left, 1.\n</think>\n\\boxed{red}": 2,
        "<think>\ntop left, red cross.\n</think>\n\\boxed{red}": 2,
        "<think>\nred circle top right.\n</think>\n\\boxed{blue}": 0,
        "<think>\ntop left, red circle.\n</think>\n\\boxed{blue}": 1,
        "<think>\ntop left, red circle.\n</think>\nwell": 0,
        "<think>\nred circle top left.": 0,
    }
    for text, wanted in grades.items():
        assert true_grade(record(text, **facts), text) == wanted, text
    shuffled = [*grades]
    random.Random(0).shuffle(shuffled)
    found = SceneChainGrades().score([record(text, **facts) for text in shuffled])
    assert [row["score"] for row in found] == [grades[text] for text in shuffled]
    unknown = SceneChainGrades().score([record("red"), record("red", answer="red", scene="9|nothing|")])
    assert [row["score"] for row in unknown] == [None, None] and "cannot be read" in unknown[1]["score_note"]

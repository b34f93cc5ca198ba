"""AL-CoTD: scores of questions, the penalty that they lead to, and chains that are judged and mended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.endpoint import Unanswered
from data_pipeline.errors import InputError
from data_pipeline.executors.local import Local
from data_pipeline.index import load_index, read_member, sidecars
from data_pipeline.length_control import (
    SCORES,
    Brevity,
    LengthControl,
    end_bias,
    hard_third,
    hardness,
    normalised,
    penalty,
)
from data_pipeline.recipe import Recipe
from data_pipeline.records import EncodedImage, ReasoningRecord, Record, Rejected, TextImageRecord
from data_pipeline.score import score
from data_pipeline.sources import SceneQuestions, WebDataset
from data_pipeline.steps.chain_scores import CRITERIA, NAMES, SceneChainScores, VlmChainScores
from data_pipeline.steps.distill_chains import AnswerJudge, DistillChains, EndpointJudge, Generated, Judgement
from data_pipeline.steps.metadata import Metadata

PICTURE = EncodedImage(b"...", "png")
RIGHT = "a red circle.\n</think>\n\\boxed{red}"


@dataclass
class Said:
    """A stand-in for an endpoint: what it says to every question."""

    reply: Callable[[str], str]
    threads: int = 2
    model: str = "judge"
    max_tokens: int = 100
    asked: list[str] = field(default_factory=list)

    def ask(self, text: str, images: Sequence[EncodedImage] = ()) -> str:
        self.asked.append(text)
        return self.reply(text)


@dataclass
class Echo:
    """A generator that says the same to each record, and notes how brief it shall be."""

    said: str = RIGHT
    ended: bool = True
    fingerprint: str = "echo"
    brevities: list[Brevity] = field(default_factory=list)

    def generate(self, records: Sequence[Record], brevities: Sequence[Brevity]) -> list[Generated]:
        self.brevities += brevities
        return [Generated(self.said, 9, self.ended) for _ in records]


def record(own: str = "<think>\nred.\n</think>\n\\boxed{red}", **facts: object) -> ReasoningRecord:
    turns = (("user", "<image>what colour?"), ("assistant", own))
    return ReasoningRecord("r-1", (PICTURE,), turns, metadata={"answer": "red", **facts})


def test_the_penalty_by_hand() -> None:
    assert penalty(1, alpha=0.5) == 1
    assert penalty(0, alpha=0.5) == pytest.approx(math.exp(0.5))
    assert penalty(0, alpha=0.7) == 2  # ln 2 = 0.693 is the largest alpha that the limit never binds
    assert hardness((0.2, 0.5, 0.9), beta=2, gamma=3) == pytest.approx((0.2 + 2 * 0.5 + 3 * 0.9) / 6)
    assert penalty(0.65, alpha=0.4) == pytest.approx(math.exp(0.4 * 0.35))
    assert [normalised(v, 2, 6) for v in (1, 2, 3, 6, 7)] == [0, 0, 0.25, 1, 1] and normalised(5, 5, 5) == 0.5


def test_the_hard_third_has_no_bias() -> None:
    assert end_bias(0.25, 4.0, 0.5) == 2.0 and end_bias(0.5, 4.0, 0.5) == end_bias(0.9, 4.0, 0.5) == 0.0
    assert end_bias(0.0, 4.0, 0.5) == 4.0 and end_bias(0.0, 4.0, 0.0) == 0.0
    assert hard_third([3, 1, 2]) == 3 and hard_third([1, 2, 3, 4, 5, 6, 7]) == 6 and hard_third([2, 1]) == 1


def test_ratings_are_summed_and_kept_as_columns() -> None:
    ratings = {name: i for i, name in enumerate(NAMES, 1)}
    step = VlmChainScores(Said(lambda text: json.dumps(ratings)))
    found = step.score([record()])[0]
    assert set(found) == {c.name for c in step.columns()}
    assert (found["cot_vision"], found["cot_text"], found["cot_integration"]) == (1 + 2, 3 + 4 + 5, 6)
    assert found["cot_note"] is None and all(meaning in step.endpoint.asked[0] for meaning in CRITERIA["text"].values())


@pytest.mark.parametrize(
    ("reply", "note"),
    [
        ("I like it", "expected one JSON object"),
        (json.dumps(dict.fromkeys(NAMES, 11)), "expected a number from 0 to 10"),
        (json.dumps(dict.fromkeys(NAMES, True)), "expected a number"),
        (json.dumps(dict.fromkeys(NAMES[:-1], 1)), "integration is null"),
    ],
)
def test_nonsense_is_no_score(reply: str, note: str) -> None:
    found = VlmChainScores(Said(lambda text: reply)).score([record()])[0]
    assert note in found["cot_note"] and all(v is None for name, v in found.items() if name != "cot_note")


def test_other_records_have_no_score() -> None:
    caption = TextImageRecord("t-1", PICTURE, "a cat")
    for step in (VlmChainScores(Said(lambda text: "{}")), SceneChainScores()):
        assert step.score([caption])[0]["cot_note"]
    assert SceneChainScores().score([record()])[0]["cot_note"] == "no question about a scene"


def shards(path: Path, count: int = 40) -> Path:
    Recipe(SceneQuestions(1, {"chain": count}), records_per_shard=16).build(path)
    score(path, [SceneChainScores()], Local())
    return path


def test_lengths_are_controlled_by_what_was_scored(tmp_path: Path) -> None:
    folder = shards(tmp_path / "chains")
    rows = [row for path in sidecars(folder) for row in pq.read_table(path).to_pylist() if row["field"] == "json"]
    found = LengthControl(str(folder), alpha=0.5, end_bias=4.0).brevities()
    assert set(found) == {row["key"] for row in rows}
    ranges = {n: [row[f"cot_{n}"] for row in rows] for n in ("vision", "text", "integration")}
    for row in rows:
        scaled = [normalised(row[f"cot_{name}"], min(values), max(values)) for name, values in ranges.items()]
        assert found[row["key"]].penalty == penalty(hardness(scaled), alpha=0.5)
    penalties, biases = zip(*found.values(), strict=True)
    assert min(penalties) >= 1 and len(set(penalties)) > 5
    assert len(rows) / 3 <= biases.count(0.0) < len(rows) and 0 < max(biases) <= 4 and len(set(biases)) > 5
    assert set(LengthControl(str(folder), alpha=0.0).brevities().values()) == {Brevity(1.0, 0.0)}
    with pytest.raises(InputError, match="end_bias are at least 0"):
        LengthControl(str(folder), end_bias=-1.0)


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    """A table with other values in a column."""
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def rescored(folder: Path, null: Callable[[int], bool]) -> Path:
    """The index with scores that are null where `null` says, with a note."""
    for path in sidecars(folder):
        table = pq.read_table(path)
        for name in ("cot_vision", "cot_note"):
            there = table[name].to_pylist()
            values = ["HTTP 500" if name == "cot_note" else None if null(i) else v for i, v in enumerate(there)]
            table = replaced(table, name, values)
        pq.write_table(table, path)
    return folder


def test_scores_that_are_mostly_null_are_an_error_and_few_are_rejected_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(tmp_path / "chains", 16)
    step = DistillChains(Echo(), AnswerJudge(), LengthControl(str(rescored(folder, lambda i: i == 1))))
    found = step.rewrite([replace(record(), key=key) for key in ("chain-0000000", "chain-0000001", "r-1")])
    unknown = [each for each in found if isinstance(each, Rejected)]
    assert {each.reason for each in unknown} == {"no scores"} and len(unknown) == 2
    assert "have no scores of difficulty" in caplog.text
    with pytest.raises(InputError, match=r"16 of 16 records.*HTTP 500.*score_chains.yaml"):
        LengthControl(str(rescored(folder, lambda i: True))).brevities()


def test_scores_that_are_all_alike_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shards(tmp_path / "chains", 4)
    for path in sidecars(folder):
        table = pq.read_table(path)
        for name in SCORES:
            table = replaced(table, name, [3.0] * table.num_rows)
        pq.write_table(table, path)
    assert len(set(LengthControl(str(folder)).brevities().values())) == 1 and "one control for all" in caplog.text


def test_scores_must_be_there(tmp_path: Path) -> None:
    Recipe(SceneQuestions(1, {"chain": 4})).build(tmp_path / "plain")
    with pytest.raises(InputError, match=r"no column cot_vision.*score_chains.yaml"):
        LengthControl(str(tmp_path / "plain")).brevities()


def test_a_round_keeps_rewrites_and_rejects(tmp_path: Path) -> None:
    """The generator says "yes" to all: right for some questions about scenes, wrong for others."""
    folder = shards(tmp_path / "chains")
    generator = Echo("I see it.\n</think>\n\\boxed{yes}")
    step = DistillChains(generator, AnswerJudge(), LengthControl(str(folder), alpha=0.5, end_bias=4.0))
    columns = Metadata({"cot_penalty": "number", "cot_end_bias": "number", "cot_decision": "text"})
    Recipe(WebDataset(str(folder)), [step, columns]).build(tmp_path / "out")
    assert len(load_index(tmp_path / "out")) == 40 and len(set(generator.brevities)) > 5
    decisions = set()
    for found in load_index(tmp_path / "out"):
        facts = json.loads(read_member(found, "json"))
        decisions.add(facts["metadata"]["cot_decision"])
        assert (facts["metadata"]["cot_penalty"], facts["metadata"]["cot_end_bias"]) in generator.brevities
        said = facts["turns"][-1][1]
        assert said.startswith("<think>\n") and said.endswith(f"\\boxed{{{facts['metadata']['answer']}}}")
        assert ("I see it" in said) == (facts["metadata"]["cot_decision"] == "keep")
    assert decisions == {"keep", "rewrite"}


def test_what_was_cut_off_or_cannot_be_judged_is_rejected_by_name() -> None:
    def one(generator: Echo, judge: object, own: ReasoningRecord) -> Record | Rejected:
        return DistillChains(generator, judge).rewrite([own])[0]

    nonsense = EndpointJudge(Said(lambda text: "maybe"))
    cases = {
        "chain cut off": one(Echo(ended=False), AnswerJudge(), record()),
        "judge unusable": one(Echo(), nonsense, record()),
        "chain rejected": one(Echo("x</think>\\boxed{blue}"), AnswerJudge(), record("red")),
    }
    for reason, found in cases.items():
        assert isinstance(found, Rejected) and found.reason == reason
    refused = [
        AnswerJudge(minimum={"score": 5}).judge(record(score=4), "x</think>\\boxed{blue}"),
        AnswerJudge(minimum={"score": 5}).judge(record(), "x</think>\\boxed{blue}"),
        AnswerJudge().judge(record("<think>\n\n</think>\n\\boxed{red}"), "x</think>\\boxed{blue}"),
    ]
    assert [found.decision for found in refused] == ["reject"] * 3
    own = AnswerJudge(minimum={"score": 5}).judge(record(score=5), "x</think>\\boxed{blue}")
    assert own.decision == "rewrite" and own.chain == record().turns[-1][1]
    open_ended = one(Echo("no end of thoughts \\boxed{red}"), AnswerJudge(), record())
    assert isinstance(open_ended, Rejected) and open_ended.reason == "chain cut off"
    caption = DistillChains(Echo(), AnswerJudge()).rewrite([TextImageRecord("t-1", PICTURE, "a cat")])[0]
    assert isinstance(caption, Rejected) and caption.reason == "no conversation"


def test_a_new_chain_is_graded_anew_by_the_judge() -> None:
    old = record(score=0, hops=2)
    kept = DistillChains(Echo(), AnswerJudge(), graded="score").rewrite([old])[0]
    assert kept.metadata["score"] == 5 and kept.metadata["hops"] == 2
    bare = DistillChains(Echo("</think>\\boxed{red}"), AnswerJudge(), graded="score").rewrite([old])[0]
    assert bare.metadata["score"] == 3  # without thoughts
    asked = EndpointJudge(Said(lambda text: '{"decision": "keep", "grade": 4}'))
    assert DistillChains(Echo(), asked, graded="score").rewrite([old])[0].metadata["score"] == 4
    silent = EndpointJudge(Said(lambda text: '{"decision": "keep"}'))
    assert DistillChains(Echo(), silent, graded="score").rewrite([old])[0].reason == "judge unusable"
    assert DistillChains(Echo(), AnswerJudge()).rewrite([old])[0].metadata["score"] == 0


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ({"decision": "keep", "reasoning": ""}, Judgement("keep", RIGHT)),
        ({"decision": "reject", "reasoning": ""}, Judgement("reject", None, "by the judge")),
        (
            {"decision": "rewrite", "reasoning": "It is red."},
            Judgement("rewrite", "<think>\nIt is red.\n</think>\n\\boxed{red}"),
        ),
    ],
)
def test_a_judge_behind_an_endpoint_decides(reply: dict, wanted: Judgement) -> None:
    endpoint = Said(lambda text: json.dumps(reply))
    assert EndpointJudge(endpoint).judge(record(), RIGHT) == wanted
    assert 'Right answer: "red"' in endpoint.asked[0]


@pytest.mark.parametrize(
    "reply",
    [
        "no JSON",
        '{"decision": "perhaps"}',
        '{"decision": "rewrite"}',
        '{"decision": "rewrite", "reasoning": "  "}',
        '{"decision": "rewrite", "reasoning": "</think>\\\\boxed{blue}"}',
        '{"decision": ["keep"]}',
        '{"decision": "keep", "grade": 9}',
        '{"decision": "keep", "grade": true}',
    ],
)
def test_a_judge_that_answers_nonsense_has_said_nothing(reply: str) -> None:
    with pytest.raises(Unanswered):
        EndpointJudge(Said(lambda text: reply)).judge(record(), RIGHT)


def test_a_chain_without_an_answer_cannot_be_kept() -> None:
    judge = EndpointJudge(Said(lambda text: '{"decision": "keep"}'))
    with pytest.raises(Unanswered, match="no final answer"):
        judge.judge(record(), "It may be red or blue.\n</think>\nI cannot say")


def test_a_record_without_an_answer_cannot_be_judged() -> None:
    for judge in (AnswerJudge(), EndpointJudge(Said(lambda text: '{"decision": "keep"}'))):
        with pytest.raises(Unanswered, match="no answer"):
            judge.judge(record(answer=""), RIGHT)


def test_too_much_rejection_stops_a_round(tmp_path: Path) -> None:
    folder = shards(tmp_path / "chains", 16)
    recipe = Recipe(WebDataset(str(folder)), [DistillChains(Echo(ended=False), AnswerJudge())], max_rejected=0.5)
    with pytest.raises(InputError, match="chain cut off"):
        recipe.build(tmp_path / "out")

"""Verifiers against labelled answers, in threads, and against answers that are meant to stop them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.chains import Chain, boxes, final_answer, split
from data_pipeline.errors import InputError
from lightning_modules.rewards.answers import FAILURES, Accuracy, Format, Verdict, Verifier, soft_overlong
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.sandbox import Sandbox

ROWS = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()]
FORMULA = "x+\\frac{1}{2}"
HOSTILE = {
    "a tower": "9^{9^{9^9}}",
    "a larger tower": "2^{2^{100000}}",
    "a factorial": "1000000000!",
    "a product": "\\prod_{i=1}^{10000000} i",
    "parentheses": "(" * 3000 + "1" + ")" * 3000,
    "brackets": "\\[" * 900,
    "braces": "{" * 1500,
    "fractions": "\\frac{" * 300 + "1",
    "a polynomial": "x^{1000000}-1/(x-1)",
    "a sum": "\\sum_{k=1}^{10^{9}} \\frac{1}{k^2}",
    "functions": "\\sin(\\cos(" * 12 + "1" + "))" * 12,
    "Python": "__import__('os').system('touch /tmp/evaluated')",
}


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    found = Verifier()
    assert found.compare(FORMULA, "\\frac{1}{2} + x").reason == "right"  # its worker has started
    return found


def test_labelled_answers(verifier: Verifier) -> None:
    """All are judged as people do; math-verify alone, which knows no units and options, wrongly accepts 10 and refuses
    97 of these (tests/benchmarks/verify_answers.py)."""
    assert len(ROWS) == 657 and Counter(row["right"] for row in ROWS) == {True: 402, False: 255}
    wrong = []
    for row in ROWS:
        facts = row.get("kind", "auto"), row.get("choices"), row.get("tolerance")
        found = verifier.verify(row["text"], row["truth"], *facts)
        if found.value != float(row["right"]):
            wrong.append((row["category"], row["truth"], row["text"], found.reason))
    assert wrong == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_end_within_a_second(verifier: Verifier, name: str) -> None:
    started = time.perf_counter()
    found = verifier.verify(f"\\boxed{{{HOSTILE[name]}}}", FORMULA)
    assert time.perf_counter() - started < 1
    assert found.value in (0.0, None) and found.reason != "right"
    assert not Path("/tmp/evaluated").exists()
    assert verifier.compare("1 + x", "x+1").reason == "right"  # and the next answer is judged as before


def test_a_failure_is_a_failure_with_a_name() -> None:
    sandbox = Verifier(seconds=0.2)
    assert sandbox.compare("9^{9^{9^9}}", FORMULA) == Verdict(None, "timeout")
    assert sandbox.compare("x", "\\frac{1}{") == Verdict(None, "truth")
    assert sandbox.compare("(" * 90 + "x" + ")" * 90, FORMULA) == Verdict(None, "too_deep")
    assert sandbox.compare("twelve", "12 cm", "number") == Verdict(0.0, "unparsed")
    assert Verifier(unparsed="unknown").compare("twelve", "12 cm", "number") == Verdict(None, "unparsed")
    assert sandbox.verify("I do not know", "12") == Verdict(0.0, "no_answer")
    assert sandbox.verify(f"\\boxed{{{'1+' * 2000}1}}", "12") == Verdict(0.0, "too_long")


@pytest.mark.parametrize(
    ("truth", "kind", "choices"),
    [
        ("", "auto", None),
        (" . ", "auto", None),
        ("many", "number", None),
        ("K", "auto", {"A": "red", "B": "blue"}),
        ("green", "choice", {"A": "red", "B": "blue"}),
        ("\\frac{1}{", "math", None),
    ],
)
def test_an_answer_of_the_record_that_cannot_be_read_says_nothing_of_the_model(
    verifier: Verifier, truth: str, kind: str, choices: dict | None
) -> None:
    for said in ("\\boxed{7}", "\\boxed{x+1}"):
        assert verifier.verify(said, truth, kind, choices) == Verdict(None, "truth"), said
    if kind != "math":  # formulas are read only where there is one to compare
        assert verifier.verify("I do not know", truth, kind, choices) == Verdict(None, "truth")
    assert {"truth", "timeout", "crash"} <= set(FAILURES)


@pytest.mark.parametrize("failure", ["timeout", "crash", "memory", "too_deep"])
def test_a_comparison_that_fails_is_masked(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "compare", lambda *_: failure)
    request = Request("?", metadata={"answer": FORMULA})
    reward = Accuracy()
    assert reward.score(["\\boxed{y}", f"\\boxed{{{FORMULA}}}", "nothing"], [request] * 3) == [None, 1.0, 0.0]
    assert reward.counts == {failure: 1, "right": 1, "no_answer": 1} and failure in FAILURES


def test_every_thread_gets_the_right_verdict(verifier: Verifier) -> None:
    """math-verify's own limit is a signal, which only the main thread may ask for."""
    assert threading.current_thread() is threading.main_thread()
    pairs = [(f"{i}+x", f"x+{i % 7}", float(i == i % 7)) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: verifier.compare(pair[0], pair[1], "math").value, pairs))
    assert found == [wanted for *_, wanted in pairs]


def test_a_worker_that_dies_is_replaced() -> None:
    sandbox = Sandbox(workers=1)
    assert sandbox.compare("1+x", "x+1") == "right"
    worker = sandbox._idle.get()
    worker.process.kill()
    worker.process.wait()
    sandbox._idle.put(worker)
    assert sandbox.compare("1+x", "x+2") == "wrong"
    sandbox.close()


def test_boxes_are_found_with_their_braces() -> None:
    assert boxes("\\boxed{\\frac{1}{\\sqrt{2}}} and \\boxed{\\{1\\}}") == [(0, "\\frac{1}{\\sqrt{2}}"), (31, "\\{1\\}")]
    assert final_answer("\\boxed{\\boxed{\\frac{1}{2}}}") == "\\boxed{\\frac{1}{2}}"
    assert final_answer("\\boxed{4} or \\boxed{5}") == "4, 5"
    assert final_answer("<think>\\boxed{3}") is None and final_answer("\\boxed{3") is None
    assert split("a</think>b") == Chain("a", "b", True) and split("<think>a") == Chain("a", "", False)
    started = time.thread_time()  # the machine may be busy with other things
    for text in ("\\boxed{" * 20_000, "answer is " * 20_000, "\\boxed" * 20_000, "{" * 100_000):
        final_answer(text)
    assert time.thread_time() - started < 1


def test_accuracy_counts_its_reasons() -> None:
    request = Request("how many?", metadata={"answer": 3})
    reward = Accuracy()
    texts = ["</think>\\boxed{3}", "</think>\\boxed{4}", "</think>three or so"]
    assert reward.score(texts, [request] * 3) == [1.0, 0.0, 0.0]
    assert reward.counts == {"right": 1, "wrong": 1, "no_answer": 1}
    with pytest.raises(InputError, match='"answer"'):
        reward.score(["\\boxed{3}"], [Request("how many?")])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I count.\n</think>\n\\boxed{3}", 1),
        ("<think>\nI count.\n</think>\n\\boxed{3}", 1),
        ("\\boxed{3}", 0),
        ("I count. \\boxed{3}", 0),
        ("</think>\\boxed{3}", 0),
        ("a</think>b</think>\\boxed{3}", 0),
        ("a</think>three", 0),
        ("well <think>a</think>\\boxed{3}", 0),
    ],
)
def test_form(text: str, wanted: float) -> None:
    assert Format().score([text], [Request("")]) == [wanted]


def test_overlong_by_hand() -> None:
    assert [soft_overlong(n, 100, 20) for n in (80, 81, 90, 100, 200)] == [0, -0.05, -0.5, -1, -1]

"""Error rates of the verifier on labelled answers, beside math-verify alone.

python tests/benchmarks/verify_answers.py [--errors]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from lightning_modules.rewards.answers import Verifier

DATA = Path(__file__).parents[1] / "lightning_modules" / "rewards" / "answers.jsonl"


def labelled() -> list[dict]:
    """Answers as models write them, the record's answer, and whether a person would call them equal."""
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def ours(verifier: Verifier, row: dict) -> bool | None:
    facts = (row.get("kind", "auto"), row.get("choices"), row.get("tolerance"))
    value = verifier.verify(row["text"], row["truth"], *facts).value
    return None if value is None else value == 1


def alone(row: dict) -> bool | None:
    """math-verify as its README has it, the record's answer in dollars."""
    try:
        return bool(verify(parse(f"${row['truth']}$"), parse(row["text"])))
    except Exception:
        return None


def counted(judge: Callable[[dict], bool | None], show: bool = False) -> Counter[str]:
    """Right verdicts, both kinds of error, and failures."""
    found: Counter[str] = Counter()
    for row in labelled():
        said = judge(row)
        name = "failed" if said is None else "right" if said == row["right"] else "accepted" if said else "refused"
        found[name] += 1
        if show and name != "right":
            print(f"  {name}: {row['category']}: {row['truth']!r} from {row['text']!r}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", action="store_true", help="name each error")
    show = parser.parse_args().errors
    verifier = Verifier()
    total = len(labelled())
    for name, judge in {"ours": lambda row: ours(verifier, row), "math-verify alone": alone}.items():
        started = time.perf_counter()
        found = counted(judge, show)
        rates = ", ".join(
            f"{kind} {found[kind]} ({found[kind] / total:.1%})" for kind in ("accepted", "refused", "failed")
        )
        print(f"{name}: of {total} answers wrongly {rates}; {time.perf_counter() - started:.1f} s")

"""Compares mathematical answers in processes that nothing else depends on: one for each question, and then killed.

Run as a script by lightning_modules/rewards/sandbox.py. Reads one JSON object a line, {"truth", "said", "seconds"}, and
answers each with {"reason"}: "right", "wrong" or the name of a failure. Nothing here may import this project: it starts
in an isolated interpreter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from typing import NoReturn

MEMORY = 1 << 31  # bytes of address space of one comparison
# Comparisons that import what others need and fill caches that every child then has.
WARM = (
    ("(x+1)^2", "x^2+2x+1"),
    ("\\frac{\\sin 2x}{2}", "\\sin x \\cos x"),
    ("\\{1,2\\}", "[0,1)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
    ("x>3", "(3,\\infty)"),
)
NESTING = 60  # braces, brackets and parentheses inside each other; honest answers have a handful


def compare(truth: str, said: str) -> str:
    """Whether two LaTeX expressions are equal, by math-verify, from its LaTeX grammar alone.

    Its other grammar hands text to sympy's parser, which evaluates it as Python; it is never asked, and what the first
    one hands there, digits, is read by `number`.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]
    found = {}
    for name, text in (("truth", truth), ("unparsed", said)):
        found[name] = parse(f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)
        if not found[name]:
            return name
    same = verify(found["truth"], found["unparsed"], timeout_seconds=None, raise_on_error=True)
    return "right" if same else "wrong"


def refuse(*_: object) -> NoReturn:
    """In the place of what evaluates text as Python: out of reach of an answer."""
    raise PermissionError("eval")


def number(text: str, *_: object, **__: object) -> object:
    """In the place of sympy's parser: a decimal number or a name, and nothing else."""
    import sympy

    text = text.strip()
    if re.fullmatch(r"[A-Za-z_]\w{0,30}", text):
        return sympy.Symbol(text)
    if not re.fullmatch(r"[+-]?\d{1,1000}(?:\.\d{0,1000})?", text):
        raise PermissionError("eval")
    return sympy.Float(text) if "." in text else sympy.Integer(int(text))


def child(truth: str, said: str, seconds: float, out: int) -> NoReturn:
    """The comparison itself, in a process of its own under limits; ends that process."""
    reason = "crash"
    with contextlib.suppress(BaseException):
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            reason = compare(truth, said)
        except MemoryError:
            reason = "memory"
        except RecursionError:
            reason = "too_deep"
    os.write(out, reason.encode())
    os._exit(0)


def nesting(text: str) -> int:
    """How deep brackets of any kind stand inside each other."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest


def judged(truth: str, said: str, seconds: float) -> str:
    """The reason of one question, within its time."""
    if nesting(said) > NESTING:
        return "too_deep"
    source, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(truth, said, seconds, out)
    os.close(out)
    ready = select.select([source], [], [], seconds)[0]
    reason = os.read(source, 64).decode() if ready else "timeout"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(source)
    return reason or "crash"  # it ended without a word, as the system's own limits make it


def main() -> None:
    """Answers questions until there are none."""
    import sympy.parsing.sympy_parser

    logging.disable(logging.CRITICAL)
    for truth, said in WARM:  # before the parser is taken away, because what is imported now may need it
        compare(truth, said)
    sympy.parsing.sympy_parser.parse_expr = number
    sympy.parsing.sympy_parser.eval_expr = refuse
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        reason = judged(question["truth"], question["said"], question["seconds"])
        print(json.dumps({"reason": reason}), flush=True)


if __name__ == "__main__":
    main()

"""Mathematical comparison with a time limit that holds in every thread: in worker processes that may be killed."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import queue
import select
import subprocess
import sys
import threading
from pathlib import Path

from data_pipeline.errors import InputError

WORKER = Path(__file__).with_name("math_worker.py")
START = 120.0  # seconds that a worker may take to import what it needs
GRACE = 0.3  # seconds beyond the limit after which a worker itself is taken for dead


class Worker:
    """One process that compares answers, each in a child of its own. Used by one thread at a time."""

    def __init__(self) -> None:
        keep = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        command = [sys.executable, "-I", "-W", "ignore", str(WORKER)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=keep, text=True, bufsize=1, start_new_session=True, **pipes)  # type: ignore[call-overload]
        self.owner = os.getpid()
        if self.line(START) != "ready":
            self.close()
            raise InputError(
                "the math verifier's worker did not start; try `python -I "
                f"{WORKER}` by hand, which must print ready (math-verify comes with the extra `reason`)"
            )

    @property
    def usable(self) -> bool:
        """Whether it lives, and is this process's own and not that of a parent that forked."""
        return self.owner == os.getpid() and self.process.poll() is None

    def line(self, seconds: float) -> str | None:
        """What it says within a time, or None."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return self.process.stdout.readline().strip() or None

    def ask(self, truth: str, said: str, seconds: float) -> str:
        """The reason of one comparison."""
        try:
            self.process.stdin.write(json.dumps({"truth": truth, "said": said, "seconds": seconds}) + "\n")
            self.process.stdin.flush()
            found = self.line(seconds + GRACE)
        except OSError:
            found = None
        if found is None:  # neither an answer nor a failure: it is of no more use
            self.close()
            return "crash" if self.process.poll() is not None else "timeout"
        return str(json.loads(found)["reason"])

    def close(self) -> None:
        """Ends the process."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()


class Sandbox:
    """Workers that threads share. A comparison that exceeds `seconds` ends as "timeout", and costs nobody else.

    Args:
        workers: comparisons at a time; each started when it is first needed.
        seconds: for one comparison.
    """

    def __init__(self, workers: int = 2, seconds: float = 0.6) -> None:
        self.seconds = seconds
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._known: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    def compare(self, truth: str, said: str) -> str:
        """right, wrong, or the name of a failure: timeout, memory, too_deep, crash, unparsed (the answer), truth."""
        key = (truth, said)
        with self._lock:
            if key in self._known:
                return self._known[key]
        worker = self._idle.get()
        try:
            if worker is None or not worker.usable:
                worker = started()
            reason = worker.ask(truth, said, self.seconds)
        finally:
            self._idle.put(worker)
        if reason in ("right", "wrong", "unparsed", "truth"):  # failures of the moment are tried again
            with self._lock:
                if len(self._known) > 1 << 16:
                    self._known.clear()
                self._known[key] = reason
        return reason

    def close(self) -> None:
        """Ends all workers that are idle."""
        for _ in range(self._idle.qsize()):
            worker = self._idle.get()
            if worker is not None:
                worker.close()
            self._idle.put(None)


def started() -> Worker:
    """A worker, where math-verify is installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("answers that are mathematics need math-verify: pip install 'unipic-lightning[reason]'")
    return Worker()

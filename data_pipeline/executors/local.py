"""Tasks in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.executors.task import Work

MAX_DEATHS = 3  # of workers, without a task finished in between

_work: Work | None = None  # what a worker process was started for


@dataclass
class Local:
    """Runs tasks in `workers` processes; with one, in this process."""

    workers: int = 1

    def run(self, tasks: Sequence[Any], work: Work) -> Iterator[dict[str, Any]]:
        """The tasks' reports, as they finish. A worker that dies is replaced and its tasks are done again."""
        if min(self.workers, len(tasks)) <= 1:
            yield from map(work, tasks)
            return
        left, deaths = dict(enumerate(tasks)), 0
        while left:
            try:
                for number, report in self._pool(left.copy(), work):
                    del left[number]
                    deaths = 0
                    yield report
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    names = ", ".join(map(str, list(left.values())[: self.workers]))
                    raise InputError(
                        f"worker processes were killed {deaths} times without finishing a task, at one of: {names}. If "
                        "memory ran out, use fewer --workers; what is finished is kept, run the same command again"
                    ) from error

    def _pool(self, tasks: dict[int, Any], work: Work) -> Iterator[tuple[int, dict[str, Any]]]:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks of this process
        running: dict[Future[dict[str, Any]], int] = {}
        with ProcessPoolExecutor(self.workers, context, start_worker, (work,)) as pool:
            try:
                for number, task in tasks.items():
                    running[pool.submit(do, task)] = number
                    if len(running) >= 2 * self.workers:  # a stopped build leaves little behind
                        yield from self._finished(running)
                while running:
                    yield from self._finished(running)
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _finished(running: dict[Future[dict[str, Any]], int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def start_worker(work: Work) -> None:
    """Remembers the work, and ends this process when the one that started it is gone."""
    global _work
    _work = work
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()


def do(task: Any) -> dict[str, Any]:
    """One task in a worker."""
    assert _work is not None
    return _work(task)

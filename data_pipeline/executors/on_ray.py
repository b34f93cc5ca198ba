"""Tasks on a Ray cluster: a pool of actors, each holding the steps' models once. The output lies on a shared disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.executors.task import Step, Task, run_task
from data_pipeline.sources.protocol import Source


@dataclass
class Ray:
    """Runs tasks in `workers` actors of `cpus` and `gpus` (fractions allowed) each.

    An actor that dies is started again and its task repeated, `retries` times.
    """

    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 2

    def run(
        self, tasks: Sequence[Task], source: Source, steps: Sequence[Step], output: Path
    ) -> Iterator[dict[str, Any]]:
        """The tasks' reports, as they finish."""
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise InputError("--executor ray needs Ray: pip install 'unipic-lightning[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        actor = ray.remote(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=self.retries, max_task_retries=self.retries
        )(Worker)
        pool: Any = ActorPool([actor.remote(source, steps, output.resolve()) for _ in range(self.workers)])
        yield from pool.map_unordered(lambda worker, task: worker.run.remote(task), tasks)


class Worker:
    """An actor's state: the source and the steps, with whatever models they hold."""

    def __init__(self, source: Source, steps: Sequence[Step], output: Path) -> None:
        self.work = (source, steps, output)

    def run(self, task: Task) -> dict[str, Any]:
        """One task."""
        return run_task(task, *self.work)

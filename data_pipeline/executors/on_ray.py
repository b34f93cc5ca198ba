"""Tasks on a Ray cluster: a pool of actors, each holding the steps' models once. The output lies on a shared disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.executors.task import Work


@dataclass
class Ray:
    """Runs tasks in `workers` actors of `cpus` and `gpus` (fractions allowed) each.

    An actor that dies is started again and its task repeated, `retries` times.
    """

    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 2

    def run(self, tasks: Sequence[Any], work: Work) -> Iterator[dict[str, Any]]:
        """The tasks' reports, as they finish. What a user can mend is raised as it was in the worker."""
        try:
            import ray
            from ray.exceptions import RayActorError, RayTaskError
            from ray.util import ActorPool
        except ImportError as error:
            raise InputError("--executor ray needs Ray: pip install 'unipic-lightning[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        actor = ray.remote(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=self.retries, max_task_retries=self.retries
        )(Worker)
        pool: Any = ActorPool([actor.remote(work, os.getcwd()) for _ in range(self.workers)])
        try:
            yield from pool.map_unordered(lambda worker, task: worker.run.remote(task), tasks)
        except RayTaskError as error:
            if isinstance(error.cause, InputError | OSError):
                raise error.cause from None  # without the traceback of another machine
            raise
        except RayActorError as error:
            raise InputError(
                f"workers were lost {1 + self.retries} times at one task ({str(error).splitlines()[0]}). If memory ran "
                "out, use fewer --workers; what is finished is kept, run the same command again"
            ) from error


class Worker:
    """An actor's state: its work, with whatever models that holds."""

    def __init__(self, work: Work, folder: str) -> None:
        with suppress(OSError):  # relative paths mean what they mean where the command was given
            os.chdir(folder)
        self.work = work

    def run(self, task: Any) -> dict[str, Any]:
        """One task."""
        return self.work(task)

"""Tasks on a Ray cluster: a pool of actors, each holding the steps' models once. The output lies on a shared disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.executors.task import Work


@dataclass
class Ray:
    """Runs tasks in actors of `cpus` and `gpus` (fractions allowed) each: `workers`, or as many as there is room for.

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
        # An actor that never gets its share would keep the task that it is handed.
        workers = min(self.workers, room(ray.cluster_resources(), {"CPU": self.cpus, "GPU": self.gpus}))
        actor = ray.remote(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=self.retries, max_task_retries=self.retries
        )(Worker)
        pool: Any = ActorPool([actor.remote(work, os.getcwd()) for _ in range(workers)])
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


def room(there: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """How many actors a cluster can hold; a fraction is of one device.

    >>> room({"CPU": 16.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 0.4}), room({"CPU": 16.0}, {"CPU": 1.0, "GPU": 0.0})
    (4, 16)
    """
    found = min(
        int(there.get(name, 0)) * int(1 / share) if share < 1 else int(there.get(name, 0) / share)
        for name, share in needed.items()
        if share
    )
    if not found:
        raise InputError(f"the Ray cluster has {dict(there)}, and a worker needs {dict(needed)}; lower --gpus")
    return found


class Worker:
    """An actor's state: its work, with whatever models that holds."""

    def __init__(self, work: Work, folder: str) -> None:
        with suppress(OSError):  # relative paths mean what they mean where the command was given
            os.chdir(folder)
        self.work = work

    def run(self, task: Any) -> dict[str, Any]:
        """One task."""
        return self.work(task)

"""Tasks of Ray, on a cluster that is there or on one of the study's own on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from stepscope.config import RayConfig, StudyConfig
from stepscope.console import say
from stepscope.errors import StudyError
from stepscope.pipeline.study.executors import Job, WorkerBug, WorkerLost
from stepscope.pipeline.study.worker import Order, Outcome, carry_out_elsewhere

OWN = "local"
"""Address of a cluster that is started on this machine, whatever runs there already."""

PAUSE = 2.0
"""Seconds that are waited for a task at a time."""


class Ray:
    """See :class:`~stepscope.pipeline.study.executors.Executor`.

    Ray's own retries are off: the study counts the workers that a cell has cost. A worker process serves one
    task after another, so torch and the policy are loaded once in each (with GPUs, Ray ends it after a task).

    Args:
        config: what a task asks for.
        ours: whether the connection is ended with the study.
    """

    cells_per_job = 1

    def __init__(self, config: RayConfig, ours: bool) -> None:
        self._ours = ours
        self._task = ray.remote(**_asked(config), resources=config.resources or None, max_retries=0)(
            carry_out_elsewhere
        )

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        """A task each."""
        return [Job(order, self._task.remote(order)) for order in orders]

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose task has ended, however."""
        refs = [job.handle for job in jobs]
        ended, _ = ray.wait(refs, num_returns=1, timeout=PAUSE)
        return [job for job in jobs if job.handle in ended]

    def outcomes(self, job: Job) -> list[Outcome]:
        """What the task has returned.

        Raises:
            WorkerLost: its worker was killed, or Ray has lost it in another way.
            WorkerBug: a bug has ended it.
        """
        try:
            found: list[Outcome] = ray.get(job.handle)
        except RayTaskError as error:
            raise WorkerBug(str(error)) from error
        except RayError as error:
            raise WorkerLost(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        return found

    def interrupt(self, jobs: Sequence[Job]) -> str:
        """Tasks belong to the process that has asked for them, and end with it."""
        for job in jobs:
            ray.cancel(job.handle, force=True)
        return ""

    def close(self) -> None:
        """Leave the cluster; one of the study's own ends."""
        if self._ours:
            ray.shutdown()


def _asked(config: RayConfig) -> dict[str, Any]:
    """Resources of a task under the names of Ray's options."""
    memory = None if config.memory is None else int(config.memory * 2**30)
    return {"num_cpus": config.cpus, "num_gpus": config.gpus, "memory": memory}


def start(config: StudyConfig, folder: Path) -> Ray:
    """The engine, connected.

    Raises:
        StudyError: there is no cluster at the address, or none of its machines has what a task asks for.
    """
    own = config.ray.address is None
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        try:
            _knock(config.ray.address or "")
            ray.init(
                address=config.ray.address or OWN,
                runtime_env=config.ray.runtime_env or None,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({"include_dashboard": False} if own else {}),
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise StudyError(
                f"Ray cannot be reached at {config.ray.address or 'this machine'} "
                f"({' '.join(str(error).split())[:300]}); start a cluster (`ray start --head`), or leave "
                "ray.address out for one on this machine"
            ) from error
    if short := _short_of(config.ray):
        if own:
            ray.shutdown()
            raise StudyError(f"this machine has no {short} for one measurement; ask for less in ray")
        say(
            f"study: no machine of the Ray cluster has {short} at present; measurements wait for one that has"
        )
    return Ray(config.ray, ours)


def _knock(address: str) -> None:
    """See whether anybody listens there; Ray would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _short_of(config: RayConfig) -> str:
    """What no single machine of the cluster has, or "" where one has it all."""
    asked = {
        "CPU": config.cpus,
        "GPU": config.gpus,
        "memory": (config.memory or 0) * 2**30,
        **config.resources,
    }
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(machine.get(name, 0) >= count for name, count in asked.items()) for machine in machines):
        return ""
    return ", ".join(f"{name} {count:g}" for name, count in asked.items() if count)

"""This process measures cell after cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepscope.config import StudyConfig
from stepscope.pipeline.study.executors import Job
from stepscope.pipeline.study.worker import Order, Outcome, carry_out, forget_policy


class Local:
    """See :class:`~stepscope.pipeline.study.executors.Executor`; a bug keeps its own traceback."""

    cells_per_job = 1

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        """Nothing is begun before it is waited for."""
        return [Job(order, None) for order in orders]

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        """The first, carried out."""
        jobs[0].handle = carry_out(jobs[0].order)
        return [jobs[0]]

    def outcomes(self, job: Job) -> list[Outcome]:
        """As they came."""
        found: list[Outcome] = job.handle
        return found

    def interrupt(self, jobs: Sequence[Job]) -> str:
        """Nothing goes on without this process."""
        return ""

    def close(self) -> None:
        """The last policy goes."""
        forget_policy()


def start(config: StudyConfig, folder: Path) -> Local:
    """It is always there."""
    return Local()

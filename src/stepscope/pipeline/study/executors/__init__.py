"""What carries out the orders of a study: this process, jobs of SLURM, or tasks of Ray.

Each engine is a file with a class of this protocol. What is queued, placed, started and ended is the engine's
affair; what a cell is, that it is measured once, and how often a killed worker is replaced is the study's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from stepscope.config import StudyConfig
from stepscope.errors import StudyError
from stepscope.pipeline.study.worker import Order, Outcome


class WorkerLost(Exception):  # noqa: N818 (what happened, and no error of anyone's)
    """A worker has ended without a word: killed, out of memory, out of time, its machine gone."""


class WorkerBug(Exception):  # noqa: N818 (likewise: a bug, and so no StepscopeError)
    """A worker has met a bug; the message is its traceback."""


@dataclass(eq=False)
class Job:
    """An order in the hands of an engine.

    Attributes:
        order: what is to be done.
        handle: of the engine's own kind.
    """

    order: Order
    handle: Any


class Executor(Protocol):
    """An engine.

    Attributes:
        cells_per_job: cells that an order should have.
    """

    cells_per_job: int

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        """Hand orders to the engine.

        Raises:
            StudyError: it does not take them.
        """

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that have ended, after some seconds at most; there may be none."""

    def outcomes(self, job: Job) -> list[Outcome]:
        """What became of the cells of a job that has ended.

        Raises:
            WorkerLost: nobody knows.
            WorkerBug: a bug has ended it.
        """

    def interrupt(self, jobs: Sequence[Job]) -> str:
        """The study is interrupted: what becomes of these jobs, in words for the user."""

    def close(self) -> None:
        """The study is over: let go of what the engine holds."""


_PACKAGES = {"slurm": "submitit", "ray": "ray"}


def open_executor(config: StudyConfig, folder: Path) -> Executor:
    """The engine that a study names, ready to take orders.

    Args:
        config: of the study.
        folder: for what the engine writes itself.

    Raises:
        StudyError: it is not there; says what to do.
    """
    package = _PACKAGES.get(config.executor)
    if package is not None and find_spec(package) is None:
        raise StudyError(
            f"executor {config.executor} needs the package {package}, which is not installed; "
            f"`pip install 'stepscope[{config.executor}]'`, or choose another --executor"
        )
    home = import_module(f"{__name__}.{config.executor}")
    found: Executor = home.start(config, folder)
    return found

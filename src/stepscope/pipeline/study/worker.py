"""What measures the cells of a study, in whatever process: each under a lock, in a folder renamed at its end.

A cell is what its folder under ``cells`` says: there, it is measured; else it is not, and what a killed
process has left of it is thrown away. So a cell may be given out any number of times, to any number of
workers at once.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import scipy.linalg  # noqa: F401 (has a BLAS of its own, which must be there to be held to its threads)
import torch
from threadpoolctl import threadpool_limits

from stepscope.config import MeasureConfig
from stepscope.console import say
from stepscope.errors import InUseError, mendable_line
from stepscope.pipeline.inputs.policies import open_policy
from stepscope.pipeline.measure import measure_into
from stepscope.pipeline.study.cells import Cell
from stepscope.policy.state import Policy
from stepscope.runs import LOCK, RunFolder, environment, locked


@dataclass(frozen=True)
class Order:
    """What a worker is told to do.

    Attributes:
        cells: to be measured, one after another.
        folder: where finished cells are.
        home: working folder of the study, from which all paths count.
        threads: of the processor.
        versions: of the packages that compute.
    """

    cells: tuple[Cell, ...]
    folder: Path
    home: Path
    threads: int
    versions: Mapping[str, str | None]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        key: of the cell.
        state: ``done`` (by whomever), ``failed`` for a reason that the user can mend, ``busy`` where another
            process is at work on it.
        reason: of the failure.
        seconds: that it took.
        host: where.
    """

    key: str
    state: Literal["done", "failed", "busy"]
    reason: str = ""
    seconds: float = 0.0
    host: str = ""


def carry_out(order: Order) -> list[Outcome]:
    """Measure the cells of an order; what is no fault of the user's goes on as it came."""
    with held_to(order.threads):
        return [_attempt(cell, order.folder) for cell in order.cells]


def carry_out_elsewhere(order: Order) -> list[Outcome]:
    """:func:`carry_out` in a process of an engine, once it is known to stand where the study does."""
    if odd := _unlike_home(order):
        return [Outcome(cell.key, "failed", odd) for cell in order.cells]
    os.chdir(order.home)
    return carry_out(order)


def _unlike_home(order: Order) -> str:
    """Why numbers of this process would not be those of the study's, or "" where they are."""
    host = socket.gethostname()
    if not order.home.is_dir() or not (order.home / order.folder).is_dir():
        return (
            f"the worker on {host} sees no {order.home / order.folder}; a study needs a file system that "
            "all of its workers share"
        )
    here = environment()["versions"]
    differing = [f"{p} {here.get(p)} there, {v} here" for p, v in order.versions.items() if here.get(p) != v]
    if differing:
        return (
            f"the worker on {host} has other versions: {'; '.join(differing)}; numbers would not be "
            "comparable, so give it the same environment"
        )
    return ""


def _attempt(cell: Cell, folder: Path) -> Outcome:
    say(f"cell {cell.key}")
    begin = time.perf_counter()
    try:
        measure_cell(cell, folder)
    except InUseError:
        return Outcome(cell.key, "busy")
    except Exception as error:
        _kept.clear()
        if not (line := mendable_line(error)):
            raise
        return Outcome(cell.key, "failed", line)
    return Outcome(cell.key, "done", seconds=time.perf_counter() - begin, host=socket.gethostname())


def measure_cell(cell: Cell, folder: Path) -> None:
    """Measure a cell that is not measured yet.

    Raises:
        InUseError: another process is at work on it.
    """
    partial, finished = Path(cell.config.out), folder / cell.key
    with locked(partial):
        if finished.is_dir():
            return
        empty(partial)
        try:
            measure_into(RunFolder(partial), cell.config, policy=_policy(cell.config))
            partial.replace(finished)
        except BaseException:
            empty(partial)
            raise
        (finished / LOCK).unlink(missing_ok=True)


def is_at_work(cell: Cell) -> bool:
    """Whether a process is at work on a cell; what a dead one has left of it is removed."""
    partial = Path(cell.config.out)
    try:
        with locked(partial):
            empty(partial)
    except InUseError:
        return True
    return False


def empty(folder: Path) -> None:
    """Remove all that is in a folder but its lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def held_to(threads: int) -> Iterator[None]:
    """Compute with this number of threads inside the block: torch, and the BLAS of numpy and SciPy.

    How many there are says in which order sums are taken, and so what their last bits are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            yield
    finally:
        torch.set_num_threads(before)


_kept: dict[tuple[str, ...], Policy] = {}
"""The policy of this process's last cell, which stays for the next."""


def _policy(config: MeasureConfig) -> Policy:
    wanted = (config.checkpoint, config.precision, str(config.device), config.loss.model_dump_json())
    if wanted not in _kept:
        _kept.clear()
        _kept[wanted] = open_policy(
            Path(config.checkpoint), precision=config.precision, device=config.device, loss=config.loss
        )
    return _kept[wanted]


def forget_policy() -> None:
    """Let go of the policy of the last cell."""
    _kept.clear()

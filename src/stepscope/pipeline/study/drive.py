"""The driver of a study: gives out the missing cells, again where a worker was lost, till all are done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepscope.console import say
from stepscope.pipeline.study.cells import Cell
from stepscope.pipeline.study.executors import Executor, Job, WorkerBug, WorkerLost
from stepscope.pipeline.study.worker import Order, Outcome, is_at_work

LOOK_AGAIN = 2.0
"""Seconds between two looks at cells that another process is at work on."""


@dataclass
class Driver:
    """What is known of a study under way.

    Attributes:
        executor: the engine.
        order: of no cells yet, what all have in common.
        attempts: workers that may be lost over a cell.
        total: cells of the study.
        done: those that are measured.
        failed: reasons by key.
        bugs: tracebacks by key.
        lost: workers lost by key.
        elsewhere: cells that other processes are at work on.
    """

    executor: Executor
    order: Order
    attempts: int
    total: int
    done: int
    failed: dict[str, str] = field(default_factory=dict)
    bugs: dict[str, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    elsewhere: list[Cell] = field(default_factory=list)

    def measure(self, cells: Sequence[Cell]) -> None:
        """Have the cells measured; ``failed`` and ``bugs`` say which could not be.

        A cell is settled once its folder is there, or its measurement fails (it would fail again), or
        ``attempts`` workers were lost over it.
        """
        begin, before = time.perf_counter(), self.done
        jobs = self._submit(cells, self.executor.cells_per_job)
        try:
            while jobs or self.elsewhere:
                for job in self.executor.wait(jobs) if jobs else ():
                    jobs.remove(job)
                    jobs += self._settle(job)
                    self._say(begin, before)
                jobs += self._free_again(pause=not jobs)
        except KeyboardInterrupt:
            fate = self.executor.interrupt(jobs)
            say(f"study: interrupted, {self._counts()}; the same command goes on{fate and f'; {fate}'}")
            raise

    def _submit(self, cells: Sequence[Cell], size: int) -> list[Job]:
        orders = [replace(self.order, cells=tuple(cells[i : i + size])) for i in range(0, len(cells), size)]
        return self.executor.submit(orders) if orders else []

    def _settle(self, job: Job) -> list[Job]:
        """Note what became of a job's cells; jobs for those that are to be taken again."""
        try:
            for outcome in self.executor.outcomes(job):
                self._note(outcome, job.order.cells)
        except WorkerLost as lost:
            return self._after_loss(job.order.cells, str(lost))
        except WorkerBug as bug:
            left = self._left(job.order.cells)
            if len(left) == 1:
                self.bugs[left[0].key] = str(bug)
                self.failed[left[0].key] = "a bug, whose traceback follows"
                return []
            return self._submit(left, 1)  # which of them it was will show
        return []

    def _note(self, outcome: Outcome, cells: Iterable[Cell]) -> None:
        cell = next(cell for cell in cells if cell.key == outcome.key)
        if outcome.state == "busy":
            self.elsewhere.append(cell)
        elif outcome.state == "failed":
            self.failed[cell.key] = outcome.reason
        elif (self.order.folder / cell.key).is_dir():
            self.done += 1
            say(f"cell {cell.key}: {outcome.seconds:.1f} s on {outcome.host}")
        else:
            self.failed[cell.key] = (
                f"the worker on {outcome.host} has measured it, and its folder is not here; a study needs a "
                "file system that all of its workers share"
            )

    def _left(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that are not measured; the others are counted."""
        left = [cell for cell in cells if not (self.order.folder / cell.key).is_dir()]
        self.done += len(list(cells)) - len(left)
        return left

    def _after_loss(self, cells: Sequence[Cell], how: str) -> list[Job]:
        """A worker was lost: its cells go out again, and the one that it was at work on is charged with it.

        That is the one of which it has left something; of none, it died before it began, and all are charged.
        The one charged goes last, so that a cell that kills its workers keeps no other from being measured.
        """
        left = self._left(cells)
        begun = [cell for cell in left if Path(cell.config.out).is_dir()]
        elsewhere = [cell for cell in begun if is_at_work(cell)]  # by a twin of an earlier call
        begun = [cell for cell in begun if cell not in elsewhere]
        charged = begun[:1] or elsewhere[:1] or left
        for cell in charged:
            self.lost[cell.key] += 1
            if self.lost[cell.key] >= self.attempts:
                self.failed[cell.key] = (
                    f"{self.attempts} workers were lost over it, the last so: {how}; if the memory did not "
                    "suffice, set measure.max_tokens, or lower measure.batch_size"
                )
        say(f"study: a worker was lost over {', '.join(cell.key for cell in charged) or 'nothing'}: {how}")
        self.elsewhere += elsewhere
        again = [cell for cell in left if cell.key not in self.failed and cell not in elsewhere]
        again.sort(key=lambda cell: cell in begun)
        return self._submit(again, self.executor.cells_per_job)

    def _free_again(self, *, pause: bool) -> list[Job]:
        """Jobs for cells that were in other hands and are free, but not measured."""
        if not self.elsewhere:
            return []
        if pause:
            time.sleep(LOOK_AGAIN)
        free = [cell for cell in self.elsewhere if not is_at_work(cell)]
        self.elsewhere = [cell for cell in self.elsewhere if cell not in free]
        return self._submit(self._left(free), self.executor.cells_per_job)

    def _counts(self) -> str:
        parts = [f"{self.done} of {self.total} cells are measured"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.elsewhere:
            parts.append(f"{len(self.elsewhere)} in the hands of other processes")
        return ", ".join(parts)

    def _say(self, begin: float, before: int) -> None:
        """How far the study is, and how long the rest may take at the pace of this call."""
        waiting = self.total - self.done - len(self.failed)
        ahead = ""
        if waiting and self.done > before:
            seconds = waiting * (time.perf_counter() - begin) / (self.done - before)
            ahead = (
                f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
            )
        say(f"study: {self._counts()}{ahead}")

"""``stepscope study``: checkpoints x settings x repeats, one measurement each, and a table over all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stepscope import runs
from stepscope.config import StudyConfig
from stepscope.console import say, say_result
from stepscope.errors import RunFolderError, StudyError, printable
from stepscope.pipeline.inputs.tasks import OWN, hold_data, tasks_of
from stepscope.pipeline.study.cells import Cell, cell_names, study_cells
from stepscope.pipeline.study.drive import Driver
from stepscope.pipeline.study.executors import Executor, WorkerBug, open_executor
from stepscope.pipeline.study.leaderboard import standing_rows, summarise_standings
from stepscope.pipeline.study.table import cell_fits, cell_rows, summarise
from stepscope.pipeline.study.worker import Order
from stepscope.policy.checkpoint.load import read_settings
from stepscope.processes import is_main_process
from stepscope.report import studied, write_study_report
from stepscope.results.change import Changes
from stepscope.results.criteria import Criteria
from stepscope.results.study import FailedCell, StudyRows
from stepscope.runs import PROVENANCE, RunFolder, environment, locked
from stepscope.tasks import TemplatedTask

HERE_ONLY = ("out", "threads", "executor", "attempts", "slurm", "ray")
"""Keys of the configuration that say how a call measures, and not what; the provenance holds ``threads``."""

CELLS, JOBS = "cells", "jobs"
"""Folders of a study: finished cells, and what engines write themselves."""

THREADS = "threads"
"""Key of the provenance: threads of each measurement."""


def run_study(config: StudyConfig) -> Path:
    """Measure every cell that is not measured yet, then write ``study.parquet``, ``study.json`` and the page.

    Where the cells have the stage ``criteria``, their leaderboards are gathered into ``leaderboard.parquet``
    and under ``leaderboard`` of ``study.json``.

    A cell is measured under a lock, in a hidden folder that is renamed once it is complete, so killed
    processes neither lose nor duplicate one. The table has nothing of when, where and in which order cells
    were measured: with the same packages on machines of one kind it is the same to the bit on every engine. A
    cell whose measurement fails, or has cost ``attempts`` workers, keeps no other from being measured: the
    table has the others, and ``failed`` of ``study.json`` names it. Of several processes the first one
    measures, and the others return at once.

    Returns:
        The study folder.

    Raises:
        RunFolderError: the folder holds a study of another configuration, or another process is at work in
            it.
        TaskError: a task's data are not those the study began with.
        StudyError: cells could not be measured, or the engine is not there.
    """
    cells = study_cells(config)
    out = Path(config.out)
    if not is_main_process():
        return out
    plain = config.model_dump(mode="json")
    with locked(out), _workers(config, cells) as executor:
        run = RunFolder.open(out, plain, verb="study", resume=True, ignore=HERE_ONLY)
        hold_data(run, _tasks(cells))
        for own in {tuple(getattr(cell.config, key) for key in OWN): cell.config for cell in cells}.values():
            hold_data(run, [], own)
        threads = _threads(config, run)
        folder = run.file(CELLS)
        folder.mkdir(exist_ok=True)
        failed: dict[str, str] = {}
        bugs: list[str] = []
        if executor is not None:
            failed, bugs = _measure_missing(cells, folder, executor, threads, config.attempts)
        measured = [cell for cell in cells if cell.key not in failed]
        if measured:
            _write_tables(config, measured, run, folder, _failures(cells, failed))
            page = write_study_report(out)
            say_result("study", studied(out), page)
    _refuse_failures(out, cells, failed, bugs)
    return out


@contextmanager
def _workers(config: StudyConfig, cells: Sequence[Cell]) -> Iterator[Executor | None]:
    """The engine, where there is work for it."""
    out = Path(config.out)
    if not _missing(cells, out / CELLS):
        yield None
        return
    executor = open_executor(config, out / JOBS)
    try:
        yield executor
    finally:
        executor.close()


def _missing(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    return [cell for cell in cells if not (folder / cell.key).is_dir()]


def _threads(config: StudyConfig, run: RunFolder) -> int:
    """Threads of each measurement: those that the study began with.

    Raises:
        RunFolderError: others are asked for now.
    """
    provenance = run.provenance()
    here = {"local": torch.get_num_threads(), "slurm": config.slurm.cpus, "ray": math.ceil(config.ray.cpus)}
    threads = int(provenance.get(THREADS) or config.threads or here[config.executor])
    if config.threads not in (None, threads):
        raise RunFolderError(
            f"{run.path}: threads is {config.threads}, and the study began with {threads}; its cells would "
            "differ in their last bits, so leave threads out, or choose another folder with --out"
        )
    if THREADS not in provenance:
        runs.write_json(run.file(PROVENANCE), provenance | {THREADS: threads})
    return threads


def _measure_missing(
    cells: Sequence[Cell], folder: Path, executor: Executor, threads: int, attempts: int
) -> tuple[dict[str, str], list[str]]:
    """Have what has no folder yet measured; reasons by key of what could not be, and tracebacks of bugs."""
    missing = _missing(cells, folder)
    done = len(cells) - len(missing)
    if done:
        say(f"study: {done} of {len(cells)} cells are there already")
    order = Order((), folder, Path.cwd(), threads, environment()["versions"])
    driver = Driver(executor, order, attempts, total=len(cells), done=done)
    driver.measure(missing)
    return driver.failed, list(driver.bugs.values())


def _failures(cells: Sequence[Cell], reasons: Mapping[str, str]) -> tuple[FailedCell, ...]:
    return tuple(FailedCell(**cell_names(c), reason=reasons[c.key]) for c in cells if c.key in reasons)


def _refuse_failures(
    out: Path, cells: Sequence[Cell], failed: Mapping[str, str], bugs: Sequence[str]
) -> None:
    """Say which cells could not be measured, and why.

    Raises:
        WorkerBug: one of them for a bug.
        StudyError: where there is any.
    """
    for key, reason in failed.items():
        say(f"study: cell {key} failed: {printable(reason)}")
    if bugs:
        raise WorkerBug(bugs[0])
    if failed:
        table = "the table has the others" if len(failed) < len(cells) else "there is no table"
        raise StudyError(
            f"{out}: {len(failed)} of {len(cells)} cells could not be measured, and {table}; the first, "
            f"{next(iter(failed))}: {next(iter(failed.values()))}; the same command tries them again"
        )


def _tasks(cells: Sequence[Cell]) -> list[TemplatedTask]:
    """The tasks of the measurements, named there or by the checkpoints."""
    return tasks_of(
        cell.config.task or read_settings(cell.checkpoint, overrides=cell.config.loss.given()).task
        for cell in cells
        if cell.config.prompts is None
    )


def _write_tables(
    config: StudyConfig,
    cells: Sequence[Cell],
    run: RunFolder,
    folder: Path,
    failed: tuple[FailedCell, ...],
) -> None:
    changes = [(cell, runs.read_record(Changes, folder / cell.key / "change.json")) for cell in cells]
    rows = [{**cell_names(cell), **row} for cell, change in changes for row in cell_rows(change, cell.config)]
    fits = [fit for cell, change in changes for fit in cell_fits(change, cell_names(cell))]
    summary = replace(summarise(rows, fits, config.resample), failed=failed)
    boards = [
        (cell, runs.read_record(Criteria, folder / cell.key / "criteria.json"))
        for cell in cells
        if "criteria" in cell.config.stages
    ]
    standings = [
        {**cell_names(cell), **row} for cell, board in boards for row in standing_rows(board, cell.config)
    ]
    if standings:
        definitions = {name: about for _, board in boards for name, about in board.definitions.items()}
        leaderboard = summarise_standings(standings, definitions, config.resample)
        summary = replace(summary, leaderboard=leaderboard)
    board_table = ["leaderboard.parquet"] if standings else []
    with run.stage("study", ["study.parquet", "study.json", *board_table]):
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        texts = {name: values.astype(object) for name, values in columns.items() if values.dtype.kind == "U"}
        runs.write_record(run.file("study.parquet"), StudyRows(**{**columns, **texts}))
        runs.write_record(run.file("study.json"), summary)
        for name in board_table:
            runs.write_table(run.file(name), {key: [row[key] for row in standings] for key in standings[0]})

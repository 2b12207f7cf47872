"""``stepscope study``: checkpoints x settings x repeats, one measurement each, and a table over all."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepscope import runs
from stepscope.config import MeasureConfig, StudyConfig, build_config, set_path
from stepscope.console import say, say_result
from stepscope.pipeline.inputs.policies import checkpoints_in, open_policy
from stepscope.pipeline.inputs.tasks import hold_data, tasks_of
from stepscope.pipeline.measure import run_measure
from stepscope.pipeline.study.leaderboard import standing_rows, summarise_standings
from stepscope.pipeline.study.table import cell_fits, cell_rows, summarise
from stepscope.policy.checkpoint.load import read_settings
from stepscope.policy.state import Policy
from stepscope.processes import is_main_process
from stepscope.report import studied, write_study_report
from stepscope.results.change import Changes
from stepscope.results.criteria import Criteria
from stepscope.results.study import StudyRows
from stepscope.runs import RunFolder, locked
from stepscope.tasks import TemplatedTask


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        key: name of its folder.
        checkpoint: what is measured.
        setting: name of the setting.
        repeat: number of the repeat.
        config: the measurement.
    """

    key: str
    checkpoint: Path
    setting: str
    repeat: int
    config: MeasureConfig


def study_cells(config: StudyConfig) -> list[Cell]:
    """All cells of a study, in a fixed order.

    Raises:
        ConfigError: a setting names keys that a measurement does not have.
        CheckpointError: a checkpoint is missing.
    """
    cells = []
    for source in map(Path, config.checkpoints):
        for checkpoint in checkpoints_in(source):
            if checkpoint != source and not (checkpoint / "optimizer.pt").is_file():
                continue  # a run's first checkpoint has taken no step yet
            tag = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
            for setting, changes in config.settings.items():
                for repeat in range(config.repeats):
                    key = f"{checkpoint.name}-{tag}--{setting}--{repeat:03d}"
                    cells.append(
                        Cell(
                            key,
                            checkpoint,
                            setting,
                            repeat,
                            _cell_config(config, key, checkpoint, changes, repeat),
                        )
                    )
    return cells


def _cell_config(
    config: StudyConfig, key: str, checkpoint: Path, changes: dict[str, Any], repeat: int
) -> MeasureConfig:
    data = config.measure.model_dump(mode="json")
    for path, value in changes.items():
        set_path(data, path, value)
    data |= {
        "checkpoint": str(checkpoint),
        "out": str(Path(config.out) / "cells" / f".{key}"),
        "stages": list(config.stages),
    }
    measurement = build_config(MeasureConfig, data, f"setting of {key}")
    batches: dict[str, Any] = {"probe": _reseeded(measurement.probe, repeat)}
    if config.resample == "both":
        batches["update"] = _reseeded(measurement.update, repeat)
    return measurement.model_copy(update=batches)


def _reseeded(batch: Any, repeat: int) -> Any:
    """The batch with a seed of its own for each repeat; repeat 0 keeps the seed that was given."""
    return batch.model_copy(update={"seed": batch.seed + 1000 * repeat})


def run_study(config: StudyConfig) -> Path:
    """Measure every cell that is not measured yet, then write ``study.parquet``, ``study.json`` and the page.

    Where the cells have the stage ``criteria``, their leaderboards are gathered into ``leaderboard.parquet``
    and under ``leaderboard`` of ``study.json``.

    A cell is measured in a hidden folder that is renamed once it is complete, so a killed study neither loses
    nor duplicates one, and resuming gives the same table as an undisturbed run. Of several processes the
    first one measures, and the others return at once.

    Returns:
        The study folder.

    Raises:
        RunFolderError: the folder holds a study of another configuration, or another process is at work in
            it.
        TaskError: a task's data are not those the study began with.
    """
    cells = study_cells(config)
    out = Path(config.out)
    if not is_main_process():
        return out
    plain = config.model_dump(mode="json")
    with locked(out):
        run = RunFolder.open(out, plain, verb="study", resume=True, ignore=("out",))
        hold_data(run, _tasks(cells))
        folder = run.file("cells")
        folder.mkdir(exist_ok=True)
        _measure_missing(cells, folder)
        _write_tables(config, cells, run, folder)
        page = write_study_report(out)
        say_result("study", studied(out), page)
    return out


def _tasks(cells: Sequence[Cell]) -> list[TemplatedTask]:
    """The tasks of the measurements, named there or by the checkpoints."""
    return tasks_of(
        cell.config.task or read_settings(cell.checkpoint, overrides=cell.config.loss.given()).task
        for cell in cells
    )


def _write_tables(config: StudyConfig, cells: list[Cell], run: RunFolder, folder: Path) -> None:
    changes = [(cell, runs.read_record(Changes, folder / cell.key / "change.json")) for cell in cells]
    rows = [{**_names(cell), **row} for cell, change in changes for row in cell_rows(change, cell.config)]
    fits = [fit for cell, change in changes for fit in cell_fits(change, _names(cell))]
    summary = summarise(rows, fits, config.resample)
    boards = [
        (cell, runs.read_record(Criteria, folder / cell.key / "criteria.json"))
        for cell in cells
        if "criteria" in cell.config.stages
    ]
    standings = [
        {**_names(cell), **row} for cell, board in boards for row in standing_rows(board, cell.config)
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


def _measure_missing(cells: list[Cell], folder: Path) -> None:
    """Measure what has no folder yet, saying which cell is at work and how long the rest may take."""
    missing = [cell for cell in cells if not (folder / cell.key).is_dir()]
    if 0 < len(missing) < len(cells):
        say(f"study: {len(cells) - len(missing)} of {len(cells)} cells are there already")
    loaded: tuple[Any, Policy] | None = None
    begin = time.perf_counter()
    for number, cell in enumerate(missing):
        partial = Path(cell.config.out)
        if partial.exists():
            shutil.rmtree(partial)
        wanted = (cell.checkpoint, cell.config.precision, cell.config.device, cell.config.loss)
        if loaded is None or loaded[0] != wanted:
            policy = open_policy(
                cell.checkpoint,
                precision=cell.config.precision,
                device=cell.config.device,
                loss=cell.config.loss,
            )
            loaded = (wanted, policy)
        place = len(cells) - len(missing) + number + 1
        say(f"cell {place}/{len(cells)}: {cell.key}{_ahead(begin, number, missing)}")
        run_measure(cell.config, policy=loaded[1], show_page=False)
        partial.replace(folder / cell.key)


def _ahead(begin: float, done: int, missing: list[Cell]) -> str:
    """How long the cells to come may take, from those done since ``begin``."""
    if not done:
        return ""
    seconds = (len(missing) - done) * (time.perf_counter() - begin) / done
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"


def _names(cell: Cell) -> dict[str, Any]:
    """The columns that say which cell a row is of."""
    return {"checkpoint": str(cell.checkpoint), "setting": cell.setting, "repeat": cell.repeat}

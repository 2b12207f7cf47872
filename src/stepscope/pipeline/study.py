"""``stepscope study``: checkpoints x settings x repeats, one measurement each, and a table over all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepscope import runs
from stepscope.config import MeasureConfig, StudyConfig, build_config, set_path
from stepscope.pipeline.console import say
from stepscope.pipeline.evaluate import checkpoints_in
from stepscope.pipeline.measure import run_measure
from stepscope.pipeline.session import open_policy
from stepscope.policy.state import Policy
from stepscope.runs import RunFolder


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
    """Measure every cell that is not measured yet, then write ``study.parquet`` and ``study.json``.

    A cell is measured in a hidden folder that is renamed once it is complete, so a killed study neither loses
    nor duplicates one, and resuming gives the same table as an undisturbed run.

    Returns:
        The study folder.

    Raises:
        RunFolderError: the folder holds a study of another configuration.
    """
    cells = study_cells(config)
    plain = config.model_dump(mode="json")
    run = RunFolder.open(Path(config.out), plain, verb="study", resume=True, ignore=("out",))
    folder = run.file("cells")
    folder.mkdir(exist_ok=True)
    loaded: tuple[Any, Policy] | None = None
    for number, cell in enumerate(cells, 1):
        if (folder / cell.key).is_dir():
            continue
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
        say(f"cell {number}/{len(cells)}: {cell.key}")
        run_measure(cell.config, policy=loaded[1])
        partial.replace(folder / cell.key)
    rows = [row for cell in cells for row in cell_rows(cell, folder / cell.key)]
    runs.write_table(run.file("study.parquet"), {name: [row[name] for row in rows] for name in rows[0]})
    runs.write_json(run.file("study.json"), summarise(cells, folder, rows))
    say(f"study: {run.file('study.parquet')}, {run.file('study.json')}")
    return run.path


def cell_rows(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """One row per series and learning rate of a finished cell."""
    change = runs.read_json(folder / "change.json")
    rows = []
    for series in [change, *change["others"]]:
        for point in series["points"]:
            row: dict[str, Any] = {
                "checkpoint": str(cell.checkpoint),
                "setting": cell.setting,
                "repeat": cell.repeat,
                "update_seed": cell.config.update.seed,
                "probe_seed": cell.config.probe.seed,
                **{name: series[name] for name in ("quantity", "normalisation", "version")},
                "own_lr": series["lr"],
                "lr": point["lr"],
            }
            for name in ("true", "linear", "second_order"):
                estimate = point[name] or {"value": None, "stderr": None}
                row |= {name: _number(estimate["value"]), f"{name}_stderr": _number(estimate["stderr"])}
            row |= {
                "reliable": point["true"]["reliable"],
                "effective_sample_size": _number(point["effective_sample_size"]),
                "pareto_k": _number(point["pareto_k"]),
                "relative_difference": _relative(row["linear"], row["true"]),
            }
            rows.append(row)
    return rows


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _relative(linear: float, true: float) -> float:
    return (linear - true) / true if true else float("nan")


def summarise(cells: Sequence[Cell], folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit of every run, and distribution of (linear - true)/true over its repeats.

    The spread over repeats is conditional on the update batch where only the probe is drawn anew.
    """
    fits = []
    for cell in cells:
        change = runs.read_json(folder / cell.key / "change.json")
        fits.append(
            {
                "checkpoint": str(cell.checkpoint),
                "setting": cell.setting,
                "repeat": cell.repeat,
                "quantity": change["quantity"],
                "fit": change["fit"],
            }
        )
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = ("checkpoint", "setting", "quantity", "normalisation", "version", "lr")
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    differences = []
    for key, members in groups.items():
        values = np.array([row["relative_difference"] for row in members])
        finite = values[np.isfinite(values)]
        entry = dict(zip(names, key, strict=True)) | {"repeats": len(members), "n": len(finite)}
        if len(finite):
            low, quarter, median, three, high = np.quantile(finite, [0.05, 0.25, 0.5, 0.75, 0.95])
            entry |= {
                "mean": finite.mean(),
                "q05": low,
                "q25": quarter,
                "median": median,
                "q75": three,
                "q95": high,
            }
            entry["sd"] = finite.std(ddof=1) if len(finite) > 1 else None
        differences.append(entry)
    return {"fits": fits, "relative_difference": differences}

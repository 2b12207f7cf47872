"""What a study folder holds: ``study.parquet`` and ``study.json``, read for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import RunFolderError
from stepscope.report.load import Table, parse_estimate, read_json, read_table

STUDY_TABLE = "study.parquet"
STUDY_FIGURES = "study.json"

_SERIES = ("quantity", "normalisation", "version")
_COLUMNS = (
    *("checkpoint", "setting", "repeat", "update_seed", "probe_seed", *_SERIES, "own_lr", "lr", "unit"),
    *("num_prompts", "true", "true_stderr", "linear", "linear_stderr", "reliable", "reason"),
    "relative_difference",
)
_KEYS = {
    "fits": ("checkpoint", "setting", "repeat", *_SERIES, "fit"),
    "lines": ("checkpoint", "setting", *_SERIES, "slope", "intercept", "r2", "lrs", "fits", "repeats"),
    "changes": ("checkpoint", "setting", *_SERIES, "lr", "own_lr", "true", "linear", "relative_difference"),
}
_STANDING_KEYS = (
    *("checkpoint", "setting", "level", "truth", "preconditioner", "version", "criterion", "kind", "target"),
    *("repeats", "spearman", "kendall", "pearson", "captured", "sign_agreement", "auc", "gain_over_control"),
    "best_controls",
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """The artifacts of a study folder.

    Attributes:
        path: the folder.
        rows: of ``study.parquet``: one per cell, series and learning rate.
        resample: which batches each repeat draws anew.
        spread: what the spread over repeats means.
        fits: one per cell and series.
        lines: fits of the repeats together, one per checkpoint, setting and series.
        changes: changes of the repeats together, one per checkpoint, setting, series and learning rate.
        labels: short names of the checkpoints by path.
        leaderboard: criteria over the repeats (``shares``, ``rows``, ``definitions``), or None where the
            cells have no stage ``criteria``.
    """

    path: Path
    rows: Sequence[Row]
    resample: str
    spread: str
    fits: Sequence[Row]
    lines: Sequence[Row]
    changes: Sequence[Row]
    labels: Mapping[str, str]
    leaderboard: Mapping[str, Any] | None

    def distinct(self, name: str) -> list[Any]:
        """The values of a column, in order of first appearance."""
        return list(dict.fromkeys(row[name] for row in self.rows))

    def series(self, setting: str) -> list[Row]:
        """What tells the series of a setting apart; the primary one comes first."""
        own = (row for row in self.rows if row["setting"] == setting)
        found = dict.fromkeys(tuple(row[name] for name in _SERIES) for row in own)
        return [{"setting": setting, **dict(zip(_SERIES, values, strict=True))} for values in found]


def load_study(folder: Path) -> Study:
    """Read a study folder.

    Raises:
        RunFolderError: a file is missing or damaged.
    """
    table = read_table(folder / STUDY_TABLE, _COLUMNS)
    summary = read_json(folder / STUDY_FIGURES)
    if table is None or summary is None:
        name = STUDY_TABLE if table is None else STUDY_FIGURES
        raise RunFolderError(f"{folder}: no {name}, so this is not a finished study; run `stepscope study`")
    rows = _rows_of(table)
    where = folder / STUDY_FIGURES
    for part, keys in (("resample", ()), ("spread", ()), *_KEYS.items()):
        missing = (
            [part] if part not in summary else [k for row in summary[part] for k in keys if k not in row]
        )
        if missing:
            raise _incomplete(where, missing[0])
    return Study(
        path=folder,
        rows=rows,
        resample=str(summary["resample"]),
        spread=str(summary["spread"]),
        fits=summary["fits"],
        lines=[_parsed(row, ("slope",), f"{where}: lines") for row in summary["lines"]],
        changes=[_parsed(row, ("true", "linear"), f"{where}: changes") for row in summary["changes"]],
        labels=_labels([str(row["checkpoint"]) for row in rows]),
        leaderboard=_checked_leaderboard(summary.get("leaderboard"), where),
    )


def _checked_leaderboard(board: Mapping[str, Any] | None, where: Path) -> Mapping[str, Any] | None:
    if board is None:
        return None
    missing = [key for key in ("shares", "rows", "definitions") if key not in board]
    missing += [key for row in board.get("rows", []) for key in _STANDING_KEYS if key not in row]
    if missing:
        raise _incomplete(where, f"{missing[0]} in leaderboard")
    for row in board["rows"]:
        for name in ("spearman", "gain_over_control"):
            if row[name] is not None:
                parse_estimate(row[name], f"{where}: leaderboard.{row['criterion']}.{name}")
    return board


def _incomplete(where: Path, what: str) -> RunFolderError:
    return RunFolderError(f"{where}: no {what}; run `stepscope study` again, it only writes the table")


def _rows_of(table: Table) -> list[Row]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _parsed(row: Row, names: Sequence[str], where: str) -> Row:
    return {**row, **{n: parse_estimate(row[n], f"{where}.{n}") for n in names if row[n] is not None}}


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """The end of each path, as long as it must be; ``checkpoints`` says nothing and is left out."""
    whole = {path: Path(path).parts for path in paths}
    brief = {path: tuple(p for p in own if p != "checkpoints") for path, own in whole.items()}
    parts = brief if len(set(brief.values())) == len(whole) else whole

    def is_own(path: str, depth: int) -> bool:
        return not any(p != path and parts[p][-depth:] == parts[path][-depth:] for p in parts)

    return {
        path: "/".join(own[-next((d for d in range(1, len(own)) if is_own(path, d)), len(own)) :])
        for path, own in parts.items()
    }


def agrees(row: Row, names: Row) -> bool:
    """Whether a row has the given values."""
    return all(row[name] == value for name, value in names.items())


def at_own_lr(row: Row) -> bool:
    """Whether a row is at the learning rate of its checkpoint."""
    return math.isclose(row["lr"], row["own_lr"], rel_tol=1e-6)

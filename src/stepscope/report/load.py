"""Read the artifacts of a run folder for the page; nothing is computed here.

A *measure folder* holds ``summary.json`` and its companions (DESIGN 5.3); a *run folder* holds
``checkpoints/``, ``eval.parquet`` and ``measure/step-N/``. A file that is not there becomes ``None`` and its
section is left out of the page; a file that is there but cannot be read is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.evaluation import TABLE, Evaluation
from stepscope.reading.measurement import Measurement, load_measurement
from stepscope.reading.study import load_study
from stepscope.results.entropy_law import EntropyLaw
from stepscope.results.evaluation import EvaluationChange, companion
from stepscope.results.study import StudyReport
from stepscope.stats import Estimate

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Training:
    """What a run folder holds besides its measurements.

    Attributes:
        log: the longest ``log_history`` of the run's checkpoints, one dictionary per logged step.
        evaluations: rows of ``eval.parquet`` in order of step, a frame per task, split and way of sampling,
            by what tells them apart (empty where there is one only).
        warmup: ``log_history`` of the supervised warm-up.
        profiles: rows of ``eval_profiles.parquet``, or None.
        changes: of ``eval_changes.json``: neighbouring checkpoints, then first against last.
        law: content of ``entropy_law.json``, or None.
    """

    log: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Any]
    warmup: Sequence[Mapping[str, Any]]
    profiles: Any = None
    changes: Sequence[EvaluationChange] = ()
    law: EntropyLaw | None = None


@dataclass(frozen=True)
class Run:
    """Everything a page is made from; ``training`` is None for a measure folder."""

    path: Path
    training: Training | None
    measurements: tuple[Measurement, ...]


def reads_artifacts(write: Callable[P, R]) -> Callable[P, R]:
    """Wrap what reads artifacts: content of another kind than the stages write is an error of the run folder.

    Only where a file is there that no digest vouches for: what the stages wrote themselves is understood, and
    a failure on it is a bug that keeps its traceback.
    """

    @wraps(write)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return write(*args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            given = [place for a in args for place in (a if isinstance(a, list | tuple) else (a,))]
            folders = [p if p.is_dir() else p.parent for p in given if isinstance(p, Path)]
            odd = [file for folder in folders for file in runs.unsealed(folder)]
            if not odd:
                raise
            line = " ".join(str(error).split())[:120]
            raise RunFolderError(
                f"{folders[0]}: holds something else than the stages write ({type(error).__name__}: {line}), "
                f"in one of {', '.join(sorted({f.name for f in odd}))}; measure the checkpoint again"
            ) from error

    return guarded


def estimates_of(frame: Any, column: str, *, unit: str = "") -> list[Estimate]:
    """A column as estimates, with error and interval from ``COLUMN_stderr``, ``COLUMN_low``, ``COLUMN_high``.

    Args:
        frame: rows of an evaluation, or another table with such columns.
        column: the values.
        unit: of the values.
    """
    known = frame.reindex(columns=[column, *(f"{column}_{part}" for part in ("stderr", "low", "high"))])
    sizes = frame.num_prompts if "num_prompts" in frame else [0] * len(frame)
    return [
        Estimate(value, error, int(n), unit, "", low=low, high=high)
        for (value, error, *ends), n in zip(known.astype(float).to_numpy().tolist(), sizes, strict=True)
        for low, high in [_interval(*ends)]
    ]


def _interval(low: float, high: float) -> tuple[float, float]:
    """The ends in a table: one that is missing beside the other is infinite; none at all is no interval."""
    if math.isnan(low) == math.isnan(high):
        return low, high
    return (-math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high)


def load_run(path: Path) -> Run:
    """Read a measure folder or a whole run folder, whichever ``path`` is.

    Raises:
        RunFolderError: ``path`` is neither, or an artifact is damaged.
    """
    if not path.is_dir():
        raise RunFolderError(
            f"{path}: no such folder; expected what `stepscope measure` or `stepscope train` left"
        )
    if (path / "summary.json").is_file():
        return Run(path=path, training=None, measurements=(load_measurement(path),))
    folders = sorted(
        (p.parent for p in path.glob("measure/*/summary.json")),
        key=lambda p: (Measurement(p).checkpoint_step or -1, p.name),
    )
    training = replace(
        load_training(path / TABLE),
        log=_training_log(path),
        warmup=_log_history(path / "warmup/trainer_state.json"),
    )
    if not folders and not training.log and not training.evaluations:
        raise RunFolderError(
            f"{path}: nothing to report; expected summary.json (a measurement), or "
            "checkpoints/*/trainer_state.json, eval.parquet or measure/*/summary.json (a training run)"
        )
    return Run(
        path=path, training=training, measurements=tuple(load_measurement(folder) for folder in folders)
    )


def load_training(table: Path) -> Training:
    """Read what ``stepscope eval`` left beside a table, and no training log.

    Raises:
        RunFolderError: a file is damaged.
    """
    found = Evaluation(table)
    profiles = companion(table, "profiles.parquet")
    return Training(
        log=(),
        evaluations=_by_setting(found.to_pandas()) if table.is_file() else {},
        warmup=(),
        profiles=runs.read_table(profiles).to_pandas() if profiles.is_file() else None,
        changes=found.changes,
        law=found.law,
    )


def _training_log(path: Path) -> Sequence[Mapping[str, Any]]:
    logs = [_log_history(file) for file in path.glob("checkpoints/*/trainer_state.json")]
    return max(logs, key=len, default=[])


def _log_history(file: Path) -> list[dict[str, Any]]:
    content = runs.read_json(file) if file.is_file() else {"log_history": []}
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise _damaged(file, "log_history is not a list of objects")
    return history


_EVALUATION_SETTING = ("task", "split", "temperature", "top_p", "num_prompts", "samples_per_prompt", "seed")


def _by_setting(frame: Any) -> dict[str, Any]:
    frame = frame.sort_values("step", kind="stable")
    keys = [key for key in _EVALUATION_SETTING if key in frame and frame[key].nunique() > 1]
    if not keys:
        return {"": frame}
    return {
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in zip(keys, values, strict=True)): rows
        for values, rows in frame.groupby(keys, sort=False)
    }


@dataclass(frozen=True)
class StudyPage:
    """What the page of a study is made from.

    Attributes:
        path: the folder.
        report: what the repeats say together.
        rows: of ``study.parquet``.
        labels: short names of the checkpoints by path.
    """

    path: Path
    report: StudyReport
    rows: Sequence[Any]
    labels: Mapping[str, str]

    def distinct(self, name: str) -> list[Any]:
        """The values of a column, in order of first appearance."""
        return list(dict.fromkeys(getattr(row, name) for row in self.rows))

    def series(self, setting: str) -> list[Mapping[str, Any]]:
        """What tells the series of a setting apart; the primary one comes first."""
        names = ("setting", "quantity", "normalisation", "version")
        found = dict.fromkeys(tuple(getattr(r, n) for n in names) for r in self.rows if r.setting == setting)
        return [dict(zip(names, values, strict=True)) for values in found]


def read_study(folder: Path) -> StudyPage:
    """Read a study folder.

    Raises:
        RunFolderError: a file is missing or damaged.
    """
    found = load_study(folder)
    rows = list(found.to_pandas().itertuples(index=False))
    return StudyPage(folder, found.report, rows, _labels([row.checkpoint for row in rows]))


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


def _damaged(path: Path, reason: object) -> RunFolderError:
    line = " ".join(str(reason).split())
    return RunFolderError(f"{path}: damaged ({line}); delete it and run the stage that writes it again")

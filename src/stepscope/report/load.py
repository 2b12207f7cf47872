"""Read the artifacts of a run folder for the page; nothing is computed here.

A *measure folder* holds ``summary.json`` and its companions (DESIGN 5.3); a *run folder* holds
``checkpoints/``,
``eval.parquet`` and ``measure/step-N/``. A file that is not there becomes ``None`` and its section is left
out of
the page; a file that is there but cannot be read is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import compress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from stepscope import runs
from stepscope.errors import ConfigError, RunFolderError
from stepscope.stats import Estimate, interval_of
from stepscope.yaml_text import parse_yaml

P = ParamSpec("P")
R = TypeVar("R")
Table = dict[str, list[Any]]
Arrays = dict[str, npt.NDArray[Any]]

_SEQUENCE_COLUMNS = ("sequence_id", "prompt_id", "prompt", "response", "reward", "num_tokens", "truncated")
_TOKEN_COLUMNS = ("sequence_id", "position", "token", "logprob", "entropy")
_INFLUENCE_COLUMNS = ("component", "sequence_id", "quantity", "through", "influence", "stderr", "low", "high")

RANKED_BY = "optimizer"
"""The influence that ranks tokens on the page: it predicts best what leaving something out does."""

_SHOWN_MATRICES = re.compile(r"update_\w+_cosine")
_TOKEN_INFLUENCE_COLUMNS = (
    "sequence_id",
    "position",
    "quantity",
    "through",
    "influence",
    "stderr",
    "shrunk",
)


@dataclass(frozen=True)
class Measurement:
    """The artifacts of one measure folder; a missing one is ``None``.

    Attributes:
        path: the folder.
        step: optimizer step of the checkpoint where the folder's name gives it.
        summary: the headline figures by key.
        provenance: versions, seeds, digest, command.
        config: the resolved configuration.
        change: content of ``change.json``.
        step_summary: content of ``step.json``.
        update: columns of ``update.parquet``.
        probe: columns of ``probe.parquet``.
        update_tokens: columns of ``update_tokens.parquet``.
        probe_tokens: columns of ``probe_tokens.parquet``.
        influence_sequences: columns of ``influence_sequences.parquet``, of the influence that adds up
            (fixed).
        influence_tokens: columns of ``influence_tokens.parquet``, of the one that ranks (:data:`RANKED_BY`).
        reliability: content of ``reliability.json``, its estimates parsed.
        validation: content of ``validation.json``, its correlations parsed.
        kernel: content of ``kernel.json``.
        kernel_matrices: the update batch's cosine kernels, from ``kernel.safetensors``.
        noise: content of ``noise.json``.
        criteria: content of ``criteria.json``.
        criteria_tokens: columns of ``criteria_tokens.parquet``.
        pareto: content of ``pareto.json``.
    """

    path: Path
    step: int | None
    summary: Mapping[str, Estimate]
    provenance: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    change: Mapping[str, Any] | None
    step_summary: Mapping[str, Any] | None
    update: Table | None
    probe: Table | None
    update_tokens: Table | None
    probe_tokens: Table | None
    influence_sequences: Table | None
    influence_tokens: Table | None
    reliability: Mapping[str, Any] | None
    validation: Mapping[str, Mapping[str, Any]] | None
    kernel: Mapping[str, Any] | None
    kernel_matrices: Arrays | None
    noise: Mapping[str, Any] | None
    criteria: Mapping[str, Any] | None
    criteria_tokens: Table | None
    pareto: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """What to call the measurement on the page."""
        return self.path.name if self.step is None else f"Step {self.step}"


@dataclass(frozen=True)
class Training:
    """What a run folder holds besides its measurements.

    Attributes:
        warmup: ``log_history`` of the supervised warm-up.
        log: the longest ``log_history`` of the run's checkpoints, one dictionary per logged step.
        evaluations: columns of ``eval.parquet`` in order of step, one table per task, split and way of
            sampling, by what tells them apart (empty where there is one only).
        profiles: columns of ``eval_profiles.parquet``, or None.
        changes: content of ``eval_changes.json``: neighbouring checkpoints, then first against last.
        law: content of ``entropy_law.json``, or None.
    """

    log: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Table]
    warmup: Sequence[Mapping[str, Any]]
    profiles: Table | None = None
    changes: Sequence[Mapping[str, Any]] = ()
    law: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """Everything a page is made from.

    Attributes:
        path: the folder.
        training: curves of a run folder; ``None`` for a measure folder.
        measurements: one per measure folder, in order of step.
    """

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


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or ``None`` where the file is missing.

    Raises:
        RunFolderError: the file is damaged or holds something other than an object.
    """
    if not path.is_file():
        return None
    value = runs.read_json(path)
    if not isinstance(value, dict):
        raise _damaged(path, f"got a {type(value).__name__}, expected a JSON object")
    return value


def read_table(path: Path, columns: Sequence[str]) -> Table | None:
    """The columns of a Parquet file as lists, or ``None`` where the file is missing.

    Raises:
        RunFolderError: the file is damaged or lacks one of ``columns``.
    """
    if not path.is_file():
        return None
    table = runs.read_table(path)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise _damaged(path, f"no column {', '.join(missing)}; got {', '.join(table.column_names)}")
    columns_read: Table = table.to_pydict()
    return columns_read


def read_arrays(path: Path, names: re.Pattern[str]) -> Arrays | None:
    """The arrays of a safetensors file whose names match, or ``None`` where the file is missing.

    Raises:
        RunFolderError: the file is damaged, or not what its stage wrote.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(runs.verified(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if names.fullmatch(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def parse_estimate(value: Any, where: str) -> Estimate:
    """An :class:`Estimate` from its JSON form; ``null`` numbers become nan.

    Raises:
        RunFolderError: a field is missing or of the wrong kind.
    """
    try:
        low, high = interval_of(value.get("low"), value.get("high"))
        return Estimate(
            value=_number(value["value"]),
            stderr=_number(value["stderr"]),
            n=int(value["n"]),
            unit=str(value["unit"]),
            method=str(value["method"]),
            reliable=_flag(value["reliable"]),
            reason=str(value["reason"]),
            low=low,
            high=high,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{where}: not an estimate ({type(error).__name__}: {error}); expected "
            "{value, stderr, n, unit, method, reliable, reason}; measure the checkpoint again"
        ) from error


def estimates_of(table: Table, column: str, *, unit: str = "", beside: str | None = None) -> list[Estimate]:
    """A column as estimates, with error and interval from ``COLUMN_stderr``, ``COLUMN_low``, ``COLUMN_high``.

    Args:
        table: an evaluation, or another table with such columns.
        column: the values.
        unit: of the values.
        beside: what the names of the other columns start with, if not ``COLUMN_``.
    """
    start = f"{column}_" if beside is None else beside
    count = len(table[column])
    nothing: list[Any] = [None] * count
    errors, low, high = (table.get(f"{start}{part}", nothing) for part in ("stderr", "low", "high"))
    sizes = table.get("num_prompts", [0] * count)
    found = []
    for row in range(count):
        ends = interval_of(low[row], high[row])
        value, error = _number(table[column][row]), _number(errors[row])
        found.append(Estimate(value, error, int(sizes[row]), unit, "", low=ends[0], high=ends[1]))
    return found


def load_measurement(path: Path) -> Measurement:
    """Read one measure folder.

    Raises:
        RunFolderError: there is no ``summary.json``, or an artifact is damaged.
    """
    summary = read_json(path / "summary.json")
    if summary is None:
        raise RunFolderError(
            f"{path}: no summary.json, so this is not a finished measurement; run `stepscope measure`"
        )
    number = re.fullmatch(r"step-(\d+)", path.name)
    return Measurement(
        path=path,
        step=int(number.group(1)) if number else None,
        summary={
            key: parse_estimate(value, f"{path / 'summary.json'}: {key}") for key, value in summary.items()
        },
        provenance=read_json(path / "provenance.json"),
        config=_read_yaml(path / "config.yaml"),
        change=read_change(path / "change.json"),
        step_summary=read_json(path / "step.json"),
        update=read_table(path / "update.parquet", _SEQUENCE_COLUMNS),
        probe=read_table(path / "probe.parquet", _SEQUENCE_COLUMNS),
        update_tokens=read_table(path / "update_tokens.parquet", _TOKEN_COLUMNS),
        probe_tokens=read_table(path / "probe_tokens.parquet", _TOKEN_COLUMNS),
        influence_sequences=_through(
            read_table(path / "influence_sequences.parquet", _INFLUENCE_COLUMNS), "fixed"
        ),
        influence_tokens=_through(
            read_table(path / "influence_tokens.parquet", _TOKEN_INFLUENCE_COLUMNS), RANKED_BY
        ),
        reliability=_checked_reliability(path / "reliability.json"),
        validation=_checked_validation(path / "validation.json"),
        kernel=_checked_kernel(path / "kernel.json"),
        kernel_matrices=read_arrays(path / "kernel.safetensors", _SHOWN_MATRICES),
        noise=read_json(path / "noise.json"),
        criteria=_checked_criteria(path / "criteria.json"),
        criteria_tokens=read_table(path / "criteria_tokens.parquet", ("sequence_id", "position")),
        pareto=_checked_pareto(path / "pareto.json"),
    )


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
        (p.parent for p in path.glob("measure/*/summary.json")), key=lambda p: (trailing_number(p), p.name)
    )
    training = replace(
        load_evaluation(path / "eval.parquet"),
        log=_training_log(path),
        warmup=_log_history(path / "warmup/trainer_state.json"),
    )
    if not folders and not training.log and not training.evaluations:
        raise RunFolderError(
            f"{path}: nothing to report; expected summary.json (a measurement), or "
            "checkpoints/*/trainer_state.json, eval.parquet or measure/*/summary.json (a training run)"
        )
    return Run(
        path=path,
        training=training,
        measurements=tuple(load_measurement(folder) for folder in folders),
    )


def load_evaluation(table: Path) -> Training:
    """Read what ``stepscope eval`` left beside a table, and no training log.

    Raises:
        RunFolderError: a file is damaged.
    """
    law = "entropy_law.json" if table.stem == "eval" else f"{table.stem}_entropy_law.json"
    changes = (read_json(table.with_name(f"{table.stem}_changes.json")) or {}).get("changes", [])
    return Training(
        log=(),
        evaluations=_evaluations(table),
        warmup=(),
        profiles=read_table(
            table.with_name(f"{table.stem}_profiles.parquet"), ("step", "temperature", "top_p", "pass_at_1")
        ),
        changes=changes,
        law=read_json(table.with_name(law)),
    )


def point_at(change: Mapping[str, Any], lr: float) -> Mapping[str, Any] | None:
    """The point of a change series at a learning rate, or ``None`` where the sweep left it out."""
    for point in change["points"]:
        if np.isclose(point["lr"], lr, rtol=1e-6, atol=0.0):
            found: Mapping[str, Any] = point
            return found
    return None


def read_change(path: Path) -> dict[str, Any] | None:
    """Content of ``change.json`` with its estimates parsed, or ``None`` where the file is missing.

    Raises:
        RunFolderError: the file is damaged.
    """
    change = read_json(path)
    if change is None:
        return None
    for index, series in enumerate([change, *change.get("others", [])]):
        where = str(path) if index == 0 else f"{path}: others[{index - 1}]"
        for key in ("quantity", "normalisation", "version", "lr", "points"):
            if key not in series:
                raise RunFolderError(f"{where}: no {key}; measure the checkpoint again")
        for number, point in enumerate(series["points"]):
            for key in ("true", "linear", "excess", "second_order"):
                value = point.get(key)
                if value is None and key == "second_order":
                    continue
                point[key] = parse_estimate(value, f"{where}: points[{number}].{key}")
        if (taken := series.get("taken")) is not None:
            for key in ("true", "unrounded", "difference", "ratio"):
                if key != "ratio" or taken[key] is not None:
                    taken[key] = parse_estimate(taken[key], f"{where}: taken.{key}")
    return change


_STRUCTURE_KEYS = (
    "diagonal",
    "same_prompt",
    "different_prompts",
    "components",
    "effective_rank",
    "spectrum",
    "null_spectrum",
    "null_effective_rank",
    "rank_deficit",
    "mean_zero",
    "distinct",
    "shared_prefix",
)


def _checked_kernel(path: Path) -> dict[str, Any] | None:
    kernel = read_json(path)
    if kernel is None:
        return None
    for key in ("structure", "update_prompt_ids"):
        if key not in kernel:
            raise _damaged(path, f"no {key}")
    for name, report in kernel["structure"].items():
        if missing := [key for key in _STRUCTURE_KEYS if key not in report]:
            raise RunFolderError(
                f"{path}: structure.{name} has no {', '.join(missing)}; measure the checkpoint again"
            )
    return kernel


def _checked_criteria(path: Path) -> dict[str, Any] | None:
    criteria = read_json(path)
    if criteria is None:
        return None
    if missing := [key for key in ("rows", "shares", "definitions") if key not in criteria]:
        raise _damaged(path, f"no {', '.join(missing)}")
    for study in criteria.get("properties", []):
        for kind in ("coefficients", "standardised"):
            for name, value in study[kind].items():
                study[kind][name] = parse_estimate(value, f"{path}: properties.{kind}.{name}")
    return criteria


def _checked_pareto(path: Path) -> dict[str, Any] | None:
    pareto = read_json(path)
    if pareto is None:
        return None
    if missing := [key for key in ("lr", "points") if key not in pareto]:
        raise _damaged(path, f"no {', '.join(missing)}")
    for key in ("full_entropy_change", "full_reward_change"):
        pareto[key] = parse_estimate(pareto.get(key), f"{path}: {key}")
    for number, point in enumerate(pareto["points"]):
        for key in ("entropy_kept", "reward_given_up"):
            point[key] = parse_estimate(point.get(key), f"{path}: points[{number}].{key}")
    return pareto


_VALIDATION_KEYS = (
    "quantity",
    "removal",
    "through",
    "lr",
    "subset_true",
    "subset_predicted",
    "single_true",
    "single_predicted",
)


def _checked_reliability(path: Path) -> dict[str, Any] | None:
    found = read_json(path)
    if found is None:
        return None
    if missing := [key for key in ("rankings", "shrunk") if key not in found]:
        raise _damaged(path, f"no {', '.join(missing)}")
    for number, entry in enumerate(found["rankings"]):
        where = f"{path}: rankings[{number}]"
        for key in ("halves", "whole", "needed"):
            entry[key] = parse_estimate(entry.get(key), f"{where}.{key}")
        for share, value in entry["top"].items():
            entry["top"][share] = parse_estimate(value, f"{where}.top.{share}")
    for number, entry in enumerate(found["shrunk"]):
        entry["gain"] = parse_estimate(entry.get("gain"), f"{path}: shrunk[{number}].gain")
    return found


def _checked_validation(path: Path) -> dict[str, Any] | None:
    validation = read_json(path)
    for removal, found in (validation or {}).items():
        if missing := [key for key in _VALIDATION_KEYS if key not in found]:
            raise _damaged(path, f"{removal} has no {', '.join(missing)}")
        for key in ("lds", "leave_one_out", "lds_across", "leave_one_out_across"):
            found[key] = parse_estimate(found.get(key), f"{path}: {removal}.{key}")
    return validation


def _through(table: Table | None, through: str) -> Table | None:
    """The rows of one way in which influence is taken."""
    if table is None:
        return None
    own = [way == through for way in table["through"]]
    return {name: list(compress(column, own)) for name, column in table.items()}


def _training_log(path: Path) -> Sequence[Mapping[str, Any]]:
    logs = [_log_history(file) for file in path.glob("checkpoints/*/trainer_state.json")]
    return max(logs, key=len, default=[])


def _log_history(file: Path) -> list[dict[str, Any]]:
    history = (read_json(file) or {}).get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise _damaged(file, "log_history is not a list of objects")
    return history


_EVALUATION_SETTING = ("task", "split", "temperature", "top_p", "num_prompts", "samples_per_prompt", "seed")


def _evaluations(path: Path) -> dict[str, Table]:
    table = read_table(path, ("step", "pass_at_1", "pass_at_1_stderr"))
    if table is None:
        return {}
    keys = [key for key in _EVALUATION_SETTING if key in table and len(set(table[key])) > 1]
    groups: dict[str, list[int]] = {}
    for row in sorted(range(len(table["step"])), key=lambda row: int(table["step"][row])):
        label = ", ".join(f"{key.replace('_', ' ')} {table[key][row]}" for key in keys)
        groups.setdefault(label, []).append(row)
    return {
        label: {name: [column[row] for row in rows] for name, column in table.items()}
        for label, rows in groups.items()
    }


def _read_yaml(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"got a {type(value).__name__}, expected a mapping")
    return value


def trailing_number(path: Path) -> int:
    """The step that the name of a folder ends in, for example that of ``step-10``; -1 where there is none."""
    match = re.search(r"(\d+)$", path.name)
    return int(match.group(1)) if match else -1


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"got {value!r}, expected true or false")
    return value


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _damaged(path: Path, reason: object) -> RunFolderError:
    line = " ".join(str(reason).split())
    return RunFolderError(f"{path}: damaged ({line}); delete it and run the stage that writes it again")

"""The table over all cells of a study, and what its repeats say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any, Literal, TypeVar

import numpy as np

from stepscope.config import MeasureConfig
from stepscope.results import FloatArray
from stepscope.results.change import Changes
from stepscope.results.study import Spread, StudyChange, StudyFit, StudyLine, StudyReport
from stepscope.stats import Estimate

T = TypeVar("T")
Row = dict[str, Any]

SERIES = ("quantity", "normalisation", "version")
"""What tells the series of a measurement apart."""

SPREAD = {"probe": "conditional on the update batch", "both": "over update batches"}
"""What the spread over repeats means, by what each repeat draws anew."""


def cell_rows(change: Changes, config: MeasureConfig) -> list[Row]:
    """One row per series and learning rate of a finished cell.

    Args:
        change: its ``change.json``.
        config: of the measurement.
    """
    rows = []
    for series in change.series:
        for point in series.points:
            row: Row = {
                "update_seed": config.update.seed,
                "probe_seed": config.probe.seed,
                **{name: getattr(series, name) for name in SERIES},
                "own_lr": series.lr,
                "lr": point.lr,
                "unit": point.true.unit,
                "num_prompts": point.true.n,
                **_columns("true", point.true),
                **_columns("linear", point.linear),
                **_columns("second_order", point.second_order),
                "reliable": point.true.reliable,
                "reason": point.true.reason,
                "effective_sample_size": point.effective_sample_size,
                "pareto_k": point.pareto_k,
                "relative_difference": _relative(point.linear.value, point.true.value),
            }
            rows.append(row)
    return rows


def _columns(name: str, found: Estimate | None) -> Row:
    """Value, error and interval; nan where there is none. An interval without any end is none."""
    nan = float("nan")
    if found is None:
        return dict.fromkeys((name, f"{name}_stderr", f"{name}_low", f"{name}_high"), nan)
    low, high = (nan, nan) if np.isinf([found.low, found.high]).all() else (found.low, found.high)
    return {name: found.value, f"{name}_stderr": found.stderr, f"{name}_low": low, f"{name}_high": high}


def cell_fits(change: Changes, names: Mapping[str, Any]) -> list[StudyFit]:
    """Fit of log|true change| on log lr of each series of a cell, and the range that it is linear over.

    Args:
        change: its ``change.json``.
        names: checkpoint, setting and repeat of the cell.
    """
    kept = (*SERIES, "fit", "measurable_from", "linear_up_to")
    return [StudyFit(**names, **{name: getattr(s, name) for name in kept}) for s in change.series]


def summarise(
    rows: Sequence[Row], fits: Sequence[StudyFit], resample: Literal["probe", "both"]
) -> StudyReport:
    """What the repeats of each checkpoint and setting say together.

    Args:
        rows: of ``study.parquet``.
        fits: of every cell and series.
        resample: what each repeat draws anew, which is what the spread over repeats is over.

    Returns:
        ``lines``: mean slope and intercept of the fits over repeats, smallest R^2. ``changes``: per learning
        rate the mean true and linear change over repeats with the standard error of that mean (of a lone
        measurement: its own), and the distribution of (linear - true)/true. No leaderboard.
    """
    spread = SPREAD[resample]
    runs = grouped(fits, ("checkpoint", "setting", *SERIES), getattr)
    points = grouped(rows, ("checkpoint", "setting", *SERIES, "lr"))
    return StudyReport(
        resample=resample,
        spread=spread,
        fits=tuple(fits),
        lines=tuple(_line(names, members, spread) for names, members in runs),
        changes=tuple(_point(names, members, spread) for names, members in points),
    )


def grouped(
    rows: Sequence[T], names: Sequence[str], field: Callable[[Any, str], Any] = getitem
) -> list[tuple[Row, list[T]]]:
    """Rows that agree in ``names``, in order of first appearance; ``field`` takes one by name from a row."""
    groups: dict[tuple[Any, ...], list[T]] = {}
    for row in rows:
        groups.setdefault(tuple(field(row, name) for name in names), []).append(row)
    return [(dict(zip(names, key, strict=True)), members) for key, members in groups.items()]


def _line(names: Row, members: Sequence[StudyFit], spread: str) -> StudyLine:
    """The fits of the repeats of one run, together."""
    found = [m.fit for m in members if m.fit is not None and math.isfinite(m.fit.slope)]
    slopes = np.array([fit.slope for fit in found])
    if len(found) > 1:
        slope = mean_over_repeats(slopes, "1", spread)
    elif found:
        slope = Estimate(found[0].slope, found[0].slope_stderr, 1, "1", "scatter about the line of one fit")
    return StudyLine(
        **names,
        repeats=len(members),
        fits=len(found),
        slope=slope if found else None,
        intercept=float(np.mean([fit.intercept for fit in found])) if found else None,
        r2=min((fit.r2 for fit in found if math.isfinite(fit.r2)), default=None),
        lrs=tuple(sorted({lr for fit in found for lr in fit.lrs})),
    )


def _point(names: Row, members: Sequence[Row], spread: str) -> StudyChange:
    """The repeats at one learning rate: mean changes, and how far first order is off."""
    doubtful = sum(not m["reliable"] for m in members)
    reason = f"flagged in {doubtful} of {len(members)} measurements" if doubtful else ""
    differences = np.array([m["relative_difference"] for m in members])
    return StudyChange(
        **names,
        own_lr=members[0]["own_lr"],
        repeats=len(members),
        true=_together("true", members, spread, reason),
        linear=_together("linear", members, spread, ""),
        relative_difference=_distribution(differences[np.isfinite(differences)]),
    )


def _together(name: str, members: Sequence[Row], spread: str, reason: str) -> Estimate:
    """One change over the repeats; ``reason`` is why not to trust it."""
    first = members[0]
    if len(members) > 1:
        return mean_over_repeats(np.array([m[name] for m in members]), first["unit"], spread, reason)
    return Estimate(
        first[name],
        first[f"{name}_stderr"],
        first["num_prompts"],
        first["unit"],
        "one measurement, conditional on the update batch",
        not reason,
        reason and first["reason"],
        low=first[f"{name}_low"],
        high=first[f"{name}_high"],
    )


def mean_over_repeats(values: FloatArray, unit: str, spread: str, reason: str = "") -> Estimate:
    """Mean over repeats with its standard error, from the spread of the repeats."""
    count = len(values)
    stderr = float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(
        float(values.mean()), stderr, count, unit, f"mean over {count} repeats, {spread}", not reason, reason
    )


def _distribution(values: FloatArray) -> Spread:
    """Number, mean, standard deviation and quantiles; None where there is none."""
    if not len(values):
        return Spread(0, None, None, None, None, None, None, None)
    quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(values.mean()), deviation, *quantiles)


def _relative(linear: float, true: float) -> float:
    return (linear - true) / true if true else float("nan")

"""The table over all cells of a study, and what its repeats say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from stepscope.config import MeasureConfig
from stepscope.results import FloatArray
from stepscope.stats import Estimate, interval_of

Row = dict[str, Any]

SERIES = ("quantity", "normalisation", "version")
"""What tells the series of a measurement apart."""

SPREAD = {"probe": "conditional on the update batch", "both": "over update batches"}
"""What the spread over repeats means, by what each repeat draws anew."""


def cell_rows(change: Mapping[str, Any], config: MeasureConfig) -> list[Row]:
    """One row per series and learning rate of a finished cell.

    Args:
        change: content of its ``change.json``.
        config: of the measurement.
    """
    rows = []
    for series in [change, *change["others"]]:
        for point in series["points"]:
            row: Row = {
                "update_seed": config.update.seed,
                "probe_seed": config.probe.seed,
                **{name: series[name] for name in SERIES},
                "own_lr": series["lr"],
                "lr": point["lr"],
                "unit": point["true"]["unit"],
                "num_prompts": point["true"]["n"],
            }
            for name in ("true", "linear", "second_order"):
                estimate = point[name] or {"value": None, "stderr": None}
                low, high = interval_of(estimate.get("low"), estimate.get("high"))
                row |= {name: _number(estimate["value"]), f"{name}_stderr": _number(estimate["stderr"])}
                row |= {f"{name}_low": low, f"{name}_high": high}
            row |= {
                "reliable": point["true"]["reliable"],
                "reason": point["true"]["reason"],
                "effective_sample_size": _number(point["effective_sample_size"]),
                "pareto_k": _number(point["pareto_k"]),
                "relative_difference": _relative(row["linear"], row["true"]),
            }
            rows.append(row)
    return rows


def cell_fits(change: Mapping[str, Any]) -> list[Row]:
    """Fit of log|true change| on log lr of each series of a cell, and the range that it is linear over."""
    kept = (*SERIES, "fit", "measurable_from", "linear_up_to")
    return [{name: series[name] for name in kept} for series in [change, *change["others"]]]


def summarise(rows: Sequence[Row], fits: Sequence[Row], resample: Literal["probe", "both"]) -> dict[str, Any]:
    """What the repeats of each checkpoint and setting say together.

    Args:
        rows: of ``study.parquet``.
        fits: of every cell and series.
        resample: what each repeat draws anew, which is what the spread over repeats is over.

    Returns:
        ``spread``: what errors over repeats mean, in words. ``fits``: as given. ``lines``: mean slope and
        intercept of the fits over repeats, smallest R^2. ``changes``: per learning rate the mean true and
        linear change over repeats with the standard error of that mean (of a lone measurement: its own), and
        the distribution of (linear - true)/true: mean, standard deviation, quantiles.
    """
    spread = SPREAD[resample]
    runs = grouped(fits, ("checkpoint", "setting", *SERIES))
    points = grouped(rows, ("checkpoint", "setting", *SERIES, "lr"))
    return {
        "resample": resample,
        "spread": spread,
        "fits": list(fits),
        "lines": [{**names, **_line(members, spread)} for names, members in runs],
        "changes": [{**names, **_point(members, spread)} for names, members in points],
    }


def grouped(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[Row, list[Row]]]:
    """Rows that agree in ``names``, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [(dict(zip(names, key, strict=True)), members) for key, members in groups.items()]


def _line(members: Sequence[Row], spread: str) -> Row:
    """The fits of the repeats of one run, together."""
    found = [m["fit"] for m in members if m["fit"] is not None and m["fit"]["slope"] is not None]
    line: Row = {"repeats": len(members), "fits": len(found)}
    if not found:
        return line | {"slope": None, "intercept": None, "r2": None, "lrs": []}
    slopes = np.array([fit["slope"] for fit in found])
    r2 = [fit["r2"] for fit in found if fit["r2"] is not None]
    lone = Estimate(slopes[0], _number(found[0]["slope_stderr"]), 1, "1", "scatter about the line of one fit")
    return line | {
        "slope": (mean_over_repeats(slopes, "1", spread) if len(found) > 1 else lone).to_dict(),
        "intercept": float(np.mean([fit["intercept"] for fit in found])),
        "r2": min(r2) if r2 else None,
        "lrs": sorted({lr for fit in found for lr in fit["lrs"]}),
    }


def _point(members: Sequence[Row], spread: str) -> Row:
    """The repeats at one learning rate: mean changes, and how far first order is off."""
    point: Row = {"own_lr": members[0]["own_lr"], "repeats": len(members)}
    doubtful = sum(not m["reliable"] for m in members)
    reason = f"flagged in {doubtful} of {len(members)} measurements" if doubtful else ""
    for name in ("true", "linear"):
        flag = reason if name == "true" else ""
        first = members[0]
        if len(members) > 1:
            values = np.array([m[name] for m in members])
            estimate = mean_over_repeats(values, first["unit"], spread, flag)
        else:
            estimate = Estimate(
                first[name],
                first[f"{name}_stderr"],
                first["num_prompts"],
                first["unit"],
                "one measurement, conditional on the update batch",
                not flag,
                flag and first["reason"],
                low=first[f"{name}_low"],
                high=first[f"{name}_high"],
            )
        point[name] = estimate.to_dict()
    values = np.array([m["relative_difference"] for m in members])
    return point | {"relative_difference": _distribution(values[np.isfinite(values)])}


def mean_over_repeats(values: FloatArray, unit: str, spread: str, reason: str = "") -> Estimate:
    """Mean over repeats with its standard error, from the spread of the repeats."""
    count = len(values)
    stderr = float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(
        float(values.mean()), stderr, count, unit, f"mean over {count} repeats, {spread}", not reason, reason
    )


def _distribution(values: FloatArray) -> Row:
    """Number, mean, standard deviation and quantiles; null where there is none."""
    names = ("q05", "q25", "median", "q75", "q95")
    if not len(values):
        return {"n": 0, "mean": None, "sd": None, **dict.fromkeys(names)}
    quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        **dict(zip(names, quantiles, strict=True)),
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _relative(linear: float, true: float) -> float:
    return (linear - true) / true if true else float("nan")

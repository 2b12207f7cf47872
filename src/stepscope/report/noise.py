# ruff: noqa: RUF001 (typographic signs are meant)
"""Noise and signal at other batch sizes than that of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import BLUE, VERMILLION, Figure, error_bars, make_spec, rounded
from stepscope.report.load import Measurement, parse_estimate
from stepscope.report.tables import Column, TableBlock, count_cell, estimate_cell, number_cell
from stepscope.stats import Estimate


def noise_figures(measurement: Measurement) -> list[Figure]:
    """Noise-to-signal against batch size: by the law, and between disjoint parts of the batch."""
    sizes = _sizes(measurement)
    if sizes is None:
        return []
    rows = sizes["rows"]
    law = [_estimate(row, "noise_to_signal") for row in rows]
    cut = [(row, e) for row, e in zip(rows, law, strict=True) if row["over_law"] is not None]
    over = [_estimate(row, "over_law") for row, _ in cut]
    resolved = all(math.isfinite(e.value) for e in law)

    def level(e: Estimate) -> float:
        return e.value if resolved else e.low

    between = [o.scaled(level(e)) for (_, e), o in zip(cut, over, strict=True)]
    traces = [
        go.Scatter(
            x=[row["prompts"] for row in rows],
            y=rounded(level(e) for e in law),
            mode="lines",
            name="noise scale / batch size" if resolved else "lower limit of it: the signal is not resolved",
            line={"color": BLUE, "width": 1.5},
            hovertemplate="%{x} prompts: %{y:.3g}<extra></extra>",
        ),
        go.Scatter(
            x=[row["prompts"] for row, _ in cut],
            y=rounded(b.value for b in between),
            error_y=error_bars(between, VERMILLION),
            mode="markers",
            name="between disjoint batches",
            marker={"size": 7, "color": VERMILLION, "symbol": "diamond"},
            customdata=[row["batches"] for row, _ in cut],
            hovertemplate="%{x} prompts: %{y:.3g} from %{customdata} batches<extra></extra>",
        ),
    ]
    axis = {"type": "log", "exponentformat": "power"}
    spec = make_spec(
        traces,
        xaxis={**axis, "title": {"text": "prompts per batch"}},
        yaxis={**axis, "title": {"text": "noise / signal"}},
    )
    slope = _estimate(sizes, "slope")
    caption = (
        "Variance of the gradient over its squared norm, against batch size (SGD metric). Line: the noise "
        "scale over the batch size. Points: variance between disjoint parts of this update batch, in the "
        f"order of sampling. Log-log slope {text.plus_minus(slope.value, slope.stderr)}; −1 where the noise "
        "falls like 1/B. Error bars: 95 % interval, jackknife over the batches; the error of the signal is "
        "not in them."
    )
    return [Figure("batch-sizes", "Noise to signal and batch size", caption, spec, height=320, wide=False)]


def batch_size_table(measurement: Measurement) -> TableBlock | None:
    """Noise-to-signal and the learning rates that other batch sizes admit."""
    sizes = _sizes(measurement)
    if sizes is None:
        return None
    columns = [
        Column("Prompts per batch", numeric=True),
        Column("Sequences", numeric=True),
        Column("Noise / signal", "def-noise-scale", numeric=True, with_error=True),
        Column("Measured noise over 1/B law", numeric=True, with_error=True),
        Column("Learning rate, SGD", "def-batch-size", numeric=True, with_error=True),
        Column("Learning rate, Adam", "def-batch-size", numeric=True, with_error=True),
    ]
    rows = [
        [
            count_cell(row["prompts"]),
            number_cell(row["sequences"], 4),
            estimate_cell(_estimate(row, "noise_to_signal")),
            number_cell(None) if row["over_law"] is None else estimate_cell(_estimate(row, "over_law")),
            estimate_cell(_estimate(row, "lr_sgd")),
            estimate_cell(_estimate(row, "lr_adam")),
        ]
        for row in sizes["rows"]
    ]
    caption = (
        "Noise to signal at other batch sizes, and the largest learning rate that pays there relative to the "
        f"run's own batch of {sizes['run_prompts']} prompts. Beyond the size of this update batch the law is "
        "extrapolated. ⚠ marks unreliable figures."
    )
    return TableBlock("batch-sizes", "Batch size and learning rate", caption, columns, rows)


def _sizes(measurement: Measurement) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = ((measurement.noise or {}).get("batch_sizes") or {}).get("sgd")
    return found


def _estimate(record: Mapping[str, Any], key: str) -> Estimate:
    return parse_estimate(record.get(key), f"noise.json: batch_sizes.sgd, {key}")

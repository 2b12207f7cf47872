# ruff: noqa: RUF001 (typographic minus signs are meant)
"""Figures of the change against learning rate: one measurement, or two on common axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    VERMILLION,
    Figure,
    error_bars,
    make_spec,
    rounded,
    sizes,
    soft,
)
from stepscope.report.load import Measurement
from stepscope.stats import Estimate

Point = Mapping[str, Any]


def change_figure(series: Mapping[str, Any], key: str = "change") -> Figure:
    """|change| against learning rate, true, to first and to second order; error of first order below.

    Args:
        series: one series of ``change.json`` with parsed estimates.
        key: of the figure.
    """
    points: Sequence[Point] = series["points"]
    unit = points[0]["true"].unit if points else ""
    low, high = _magnitude_range(points)
    errors = [_relative_error(p) for p in points]
    reach = _reach([e for e, p in zip(errors, points, strict=True) if p["true"].reliable])
    traces = [
        *_linear_traces(points, "first order", VERMILLION, "dash", 10 ** (low - 1)),
        *_second_trace(points, unit),
        *_true_trace(points, "true", BLUE, unit),
        _relative_trace(points, errors),
    ]
    xaxis = lr_axis(_rates(points, series["lr"]))
    limits = _limits(series, xaxis["range"])
    spec = make_spec(
        traces,
        xaxis={**xaxis, "anchor": "y2"},
        yaxis={**magnitude_axis(low, high, unit), "domain": [0.36, 1]},
        yaxis2={
            "domain": [0, 0.26],
            "anchor": "x",
            "title": {"text": "first/true − 1"},
            "range": [-reach, reach],
            "tickformat": ".0%",
            "nticks": 5,
            "zeroline": True,
        },
        shapes=[*own_lr_lines([series["lr"]]), *(_limit_line(lr) for _, lr in limits)],
        annotations=[
            *([_own_lr_note(series["lr"])] if series["lr"] > 0 else []),
            *(_limit_note(*limit) for limit in limits),
        ],
    )
    inside = [abs(e.value) <= reach for e in errors if math.isfinite(e.value)]
    caption = " ".join(
        sentence
        for sentence in (
            f"Change of {text.series_label(series)} when the step is taken along the checkpoint's own "
            f"direction with the learning rate on the horizontal axis; magnitude in {unit}, n = "
            f"{points[0]['true'].n if points else 0} prompts.",
            "Circles: the quantity falls; triangles: it rises; hollow: flagged unreliable, reason on hover.",
            "Error bars and band: 95 % interval, clustered by prompt; a bar that leaves the panel below "
            "includes zero. The curve to second order is drawn without its error."
            if _has_second(points)
            else "Error bars and band: 95 % interval, clustered by prompt; a bar that leaves the panel below "
            "includes zero.",
            _fit_sentence(series.get("fit")),
            _regime_sentence(series),
            "Lower panel: relative error of the first order, with the 95 % interval of the paired "
            "difference.",
            ""
            if all(inside)
            else f"{inside.count(False)} of its {len(inside)} points lie outside the panel.",
        )
        if sentence
    )
    return Figure(key, f"Change of {text.series_label(series)}", caption, spec, height=520)


def overlay_figure(names: tuple[str, str], pair: tuple[Measurement, Measurement]) -> Figure | None:
    """The primary change series of two measurements on common axes; None unless both are of one kind."""
    if pair[0].change is None or pair[1].change is None:
        return None
    series = (pair[0].change, pair[1].change)
    if text.series_label(series[0]) != text.series_label(series[1]) or not all(s["points"] for s in series):
        return None
    unit = series[0]["points"][0]["true"].unit
    every = [p for s in series for p in s["points"]]
    low, high = _magnitude_range(every)
    traces: list[Any] = []
    looks = (("A", BLUE, "solid", "circle"), ("B", VERMILLION, "dash", "diamond"))
    for (side, color, dash, falls), measured in zip(looks, series, strict=True):
        points = measured["points"]
        traces += _linear_traces(points, f"{side} first order", color, dash, 10 ** (low - 1))
        traces += _true_trace(points, f"{side} true", color, unit, falls)
    spec = make_spec(
        traces,
        xaxis=lr_axis(_rates(every, series[0]["lr"])),
        yaxis=magnitude_axis(low, high, unit),
        shapes=own_lr_lines([s["lr"] for s in series]),
    )
    caption = (
        f"Change of {text.series_label(series[0])} against learning rate. A: {names[0]}; B: {names[1]}; "
        "their own learning rates dotted. Circles and diamonds: the quantity falls; triangles: it rises; "
        "hollow: flagged unreliable. Error bars and bands: 95 % interval, clustered by prompt."
    )
    return Figure("overlay", "Change curves", caption, spec, height=440)


def _rates(points: Sequence[Point], own: float) -> list[float]:
    return [own, *(p["lr"] for p in points)]


def _drawable(points: Sequence[Point], name: str) -> list[Point]:
    return [p for p in points if math.isfinite(p[name].value) and p[name].value]


def _symbol(value: Estimate, falls: str) -> str:
    return (falls if value.value < 0 else "triangle-up") + ("" if value.reliable else "-open")


def _true_trace(
    points: Sequence[Point], label: str, color: str, unit: str, falls: str = "circle"
) -> list[Any]:
    chosen = _drawable(points, "true")
    values: list[Estimate] = [p["true"] for p in chosen]
    if not chosen:
        return []
    details = [
        f"{text.plus_minus(v.value, v.stderr)} {unit}, n = {v.n}<br>effective sample size "
        f"{text.number(_diagnostic(p, 'effective_sample_size'))}, Pareto-k "
        f"{text.number(_diagnostic(p, 'pareto_k'), 2)}"
        + ("" if v.reliable else f"<br>unreliable: {text.plotly_text(v.reason)}")
        for v, p in zip(values, chosen, strict=True)
    ]
    return [
        go.Scatter(
            x=rounded(p["lr"] for p in chosen),
            y=rounded(abs(v.value) for v in values),
            error_y=error_bars(sizes(values), color),
            mode="markers",
            name=label,
            marker={
                "size": 9,
                "color": color,
                "symbol": [_symbol(v, falls) for v in values],
                "line": {"width": 1.5, "color": color},
            },
            customdata=details,
            hovertemplate=f"<b>{label}</b>, lr %{{x:.3g}}<br>%{{customdata}}<extra></extra>",
        )
    ]


def _linear_traces(points: Sequence[Point], label: str, color: str, dash: str, floor: float) -> list[Any]:
    chosen = _drawable(points, "linear")
    if not chosen:
        return []
    values: list[Estimate] = [p["linear"] for p in chosen]
    x = rounded(p["lr"] for p in chosen)
    edge = {"mode": "lines", "line": {"width": 0, "color": color}, "showlegend": False, "hoverinfo": "skip"}
    lower = [max(v.low, floor) for v in sizes(values)]
    upper = [v.high for v in sizes(values)]
    return [
        go.Scatter(x=x, y=rounded(lower), **edge),
        go.Scatter(x=x, y=rounded(upper), fill="tonexty", fillcolor=soft(color), **edge),
        go.Scatter(
            x=x,
            y=rounded(abs(v.value) for v in values),
            mode="lines",
            name=label,
            line={"color": color, "width": 1.5, "dash": dash},
            customdata=[text.estimate(v) for v in values],
            hovertemplate=f"<b>{label}</b>, lr %{{x:.3g}}<br>%{{customdata}}<extra></extra>",
        ),
    ]


def _has_second(points: Sequence[Point]) -> bool:
    return any(p.get("second_order") is not None for p in points)


def _second_trace(points: Sequence[Point], unit: str) -> list[Any]:
    chosen = [p for p in points if p.get("second_order") is not None]
    if not chosen:
        return []
    sums = [p["linear"].value + p["second_order"].value for p in chosen]
    return [
        go.Scatter(
            x=rounded(p["lr"] for p in chosen),
            y=rounded(abs(s) or math.nan for s in sums),
            mode="lines",
            name="first + second order",
            line={"color": GREEN, "width": 1.8, "dash": "dot"},
            customdata=[
                f"{text.number(s)} {unit}<br>second-order term {text.estimate(p['second_order'])}"
                for s, p in zip(sums, chosen, strict=True)
            ],
            hovertemplate="<b>first + second order</b>, lr %{x:.3g}<br>%{customdata}<extra></extra>",
        )
    ]


def _relative_error(point: Point) -> Estimate:
    """(first order - true)/|true| with the error of the paired difference."""
    true, excess = point["true"], point["excess"]
    return cast(Estimate, excess).scaled(-1 / abs(true.value) if true.value else math.nan, unit="1")


def _reach(errors: Sequence[Estimate]) -> float:
    ends = [abs(end) for e in errors for end in (e.value, e.low, e.high) if math.isfinite(end)]
    return min(1.0, max(0.05, 1.1 * max(ends))) if ends else 1.0


def _relative_trace(points: Sequence[Point], errors: Sequence[Estimate]) -> Any:
    return go.Scatter(
        x=rounded(p["lr"] for p in points),
        y=rounded(e.value for e in errors),
        error_y=error_bars(errors, INK),
        yaxis="y2",
        mode="markers",
        showlegend=False,
        marker={
            "size": 7,
            "color": INK,
            "symbol": ["square" if p["excess"].reliable else "square-open" for p in points],
            "line": {"width": 1.5, "color": INK},
        },
        customdata=[
            f"{text.percent(e.value)} (95 %: {text.percent(e.low)} to {text.percent(e.high)})"
            + ("" if p["excess"].reliable else f"<br>unreliable: {text.plotly_text(p['excess'].reason)}")
            for e, p in zip(errors, points, strict=True)
        ],
        hovertemplate="lr %{x:.3g}<br>first order off by %{customdata}<extra></extra>",
    )


def _diagnostic(point: Point, key: str) -> float:
    return math.nan if point.get(key) is None else float(point[key])


def _magnitude_range(points: Sequence[Point]) -> tuple[float, float]:
    sizes = [abs(p[name].value) for name in ("true", "linear") for p in _drawable(points, name)]
    if not sizes:
        return -6.0, 0.0
    return math.log10(min(sizes)) - 0.6, math.log10(max(sizes)) + 0.5


def magnitude_axis(low: float, high: float, unit: str) -> dict[str, Any]:
    """A logarithmic axis of changes from 10^low to 10^high."""
    return {
        "type": "log",
        "title": {"text": f"|change|, {unit}"},
        "range": [low, high],
        "exponentformat": "power",
        "dtick": max(1, round((high - low) / 6)),
    }


def lr_axis(rates: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis that shows the given learning rates; those that are 0 are left out."""
    lrs = [lr for lr in rates if lr > 0]
    low, high = math.log10(min(lrs)) - 0.25, math.log10(max(lrs)) + 0.25
    return {
        "type": "log",
        "title": {"text": "learning rate"},
        "range": [low, high],
        "exponentformat": "power",
        "dtick": max(1, round((high - low) / 6)),
    }


def own_lr_lines(lrs: Sequence[float]) -> list[dict[str, Any]]:
    """Dotted vertical lines at learning rates of runs."""
    line = {"type": "line", "yref": "paper", "line": {"color": MUTED, "width": 1.2, "dash": "dot"}}
    return [{**line, "x0": lr, "x1": lr, "y0": 0, "y1": 1} for lr in lrs if lr > 0]


def _own_lr_note(lr: float) -> dict[str, Any]:
    return {
        "x": math.log10(lr),
        "y": 1.0,
        "yref": "paper",
        "yanchor": "top",
        "xanchor": "right",
        "xshift": -4,
        "text": f"own lr {text.lr_text(lr)}",
        "showarrow": False,
        "font": {"size": 12, "color": MUTED},
    }


def _limits(series: Mapping[str, Any], shown: Sequence[float]) -> list[tuple[str, float]]:
    """Those ends of the range where the change is measurable and linear that lie on the axis."""
    ends = [(name, series.get(name)) for name in _LIMIT_NOTES]
    return [(name, lr) for name, lr in ends if lr and shown[0] < math.log10(lr) < shown[1]]


def _limit_line(lr: float) -> dict[str, Any]:
    line = {"color": MUTED, "width": 1.2, "dash": "longdash"}
    return {"type": "line", "yref": "paper", "line": line, "x0": lr, "x1": lr, "y0": 0, "y1": 1}


_LIMIT_NOTES: Mapping[str, Mapping[str, Any]] = {
    "measurable_from": {"y": 0.95, "xanchor": "left", "xshift": 4},
    "linear_up_to": {"y": 0.42, "xanchor": "right", "xshift": -4},
}
"""Inside the range: high on the left and low on the right, away from the rising curve."""


def _limit_note(name: str, lr: float) -> dict[str, Any]:
    label = f"{name.replace('_', ' ')} {text.lr_text(float(f'{lr:.2g}'))}"
    return {**_own_lr_note(lr), **_LIMIT_NOTES[name], "text": label}


def _fit_sentence(fit: Mapping[str, Any] | None) -> str:
    if fit is None:
        return ""
    error = fit.get("slope_stderr")
    slope = text.plus_minus(float(fit["slope"]), math.nan if error is None else float(error))
    return (
        f"Slope of log |true change| on log learning rate {slope} (1 = linear), R² = "
        f"{text.number(fit['r2'], 5)}, over the {fit['n']} reliable learning rates."
    )


def _regime_sentence(series: Mapping[str, Any]) -> str:
    start, end = series.get("measurable_from"), series.get("linear_up_to")
    parts = []
    if start is not None and math.isfinite(start):
        parts.append(
            f"measurable from lr {text.number(start, 2)}, where the first order is ten times the round-off"
        )
    if end is not None and math.isfinite(end):
        parts.append(f"linear up to lr {text.number(end, 2)}, where the second order is a tenth of the first")
    joined = "; ".join(parts)
    return f"{joined[:1].upper()}{joined[1:]}." if joined else ""

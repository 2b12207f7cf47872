# ruff: noqa: RUF001 (typographic signs are meant)
"""Figures of a study: change against learning rate with its fits, and the error of first order by repeat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.change import lr_axis, magnitude_axis, own_lr_lines
from stepscope.report.figures import Figure, error_bars, look, make_spec, rounded, sizes
from stepscope.report.study_load import Row

_COLUMNS = 2
"""Panels beside one another where each learning rate has its own."""

_GAP, _ROW_GAP = 0.1, 0.3
_PANEL_HEIGHT = 250


def line_figure(
    lines: Sequence[Row], points: Sequence[Row], labels: Mapping[str, str], spread: str, key: str
) -> Figure:
    """|true change| against learning rate, a colour per checkpoint, with the line its repeats were fitted by.

    Args:
        lines: ``lines`` of ``study.json``, of one series and setting, with parsed estimates.
        points: ``changes`` of ``study.json``, likewise.
        labels: names of checkpoints.
        spread: what the spread over repeats means.
        key: of the figure.
    """
    traces: list[Any] = []
    for number, line in enumerate(lines):
        color, symbol, dash = look(number)
        own = [p for p in points if p["checkpoint"] == line["checkpoint"]]
        traces += _points_of(
            own, text.plotly_text(labels[line["checkpoint"]]) + _fit_words(line), color, symbol
        )
        traces += _fit_of(line, color, dash)
    spans = [abs(p["true"].value) for p in points if _drawable(p)]
    low, high = (math.log10(min(spans)) - 0.5, math.log10(max(spans)) + 0.5) if spans else (-6.0, 0.0)
    own_lrs = sorted({float(p["own_lr"]) for p in points})
    unit = points[0]["true"].unit
    repeats = max(int(p["repeats"]) for p in points)
    spec = make_spec(
        traces,
        xaxis=lr_axis([*own_lrs, *(p["lr"] for p in points)]),
        yaxis=magnitude_axis(low, high, unit),
        shapes=own_lr_lines(own_lrs),
    )
    what = (
        f"Mean over {repeats} repeats; error bars: 95 % interval of the mean, {spread}."
        if repeats > 1
        else "One measurement each; error bars: 95 % interval, clustered by prompt and conditional on the "
        "update batch."
    )
    caption = (
        f"Magnitude of the true change of {text.series_label(points[0])}, in {unit}, by checkpoint; own "
        f"learning rates dotted. {what} Lines: mean of the repeats' fits, over the learning rates fitted; "
        "slopes and smallest R² in the legend. Hollow: flagged unreliable."
    )
    return Figure(key, f"Change of {text.series_label(points[0])}", caption, spec, height=460)


def _drawable(point: Row) -> bool:
    return math.isfinite(point["true"].value) and point["true"].value != 0


def _fit_words(line: Row) -> str:
    slope = line["slope"]
    if slope is None:
        return ": no fit"
    r2 = "" if line["r2"] is None else f", R² {text.number(line['r2'], 5)}"
    return f": slope {text.plus_minus(slope.value, slope.stderr)}{r2}"


def _points_of(points: Sequence[Row], name: str, color: str, symbol: str) -> list[Any]:
    shown = [p for p in points if _drawable(p)]
    if not shown:
        return []
    return [
        go.Scatter(
            x=rounded(p["lr"] for p in shown),
            y=rounded(abs(p["true"].value) for p in shown),
            error_y=error_bars(sizes(p["true"] for p in shown), color),
            mode="markers",
            name=name,
            marker={
                "size": 8,
                "color": color,
                "symbol": [symbol + ("" if p["true"].reliable else "-open") for p in shown],
                "line": {"width": 1.5, "color": color},
            },
            customdata=[
                f"{text.estimate(p['true'])}<br>first order {text.estimate(p['linear'])}"
                + ("" if p["true"].reliable else f"<br>{text.plotly_text(p['true'].reason)}")
                for p in shown
            ],
            hovertemplate="lr %{x:.3g}<br>%{customdata}<extra></extra>",
        )
    ]


def _fit_of(line: Row, color: str, dash: str) -> list[Any]:
    if line["slope"] is None:
        return []
    ends = (line["lrs"][0], line["lrs"][-1])
    return [
        go.Scatter(
            x=rounded(ends),
            y=rounded(math.exp(line["intercept"]) * lr ** line["slope"].value for lr in ends),
            mode="lines",
            line={"color": color, "width": 1.5, "dash": dash},
            showlegend=False,
            hoverinfo="skip",
        )
    ]


def difference_figure(rows: Sequence[Row], labels: Mapping[str, str], spread: str, key: str) -> Figure:
    """Distribution of (first order - true)/true: a panel per learning rate, a box per checkpoint.

    Args:
        rows: of ``study.parquet``, of one series and setting.
        labels: names of checkpoints.
        spread: what the spread over repeats means.
        key: of the figure.
    """
    lrs = sorted({row["lr"] for row in rows})
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    deep = math.ceil(len(lrs) / _COLUMNS)
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [], "showlegend": False}
    wide, high = (1 - _GAP * (_COLUMNS - 1)) / _COLUMNS, (1 - _ROW_GAP * (deep - 1) / deep) / deep
    for number, lr in enumerate(lrs):
        left = (number % _COLUMNS) * (wide + _GAP)
        top = 1 - (number // _COLUMNS) * (high + _ROW_GAP / deep)
        suffix = "" if number == 0 else str(number + 1)
        for place, checkpoint in enumerate(checkpoints):
            values = [
                r["relative_difference"] for r in rows if (r["lr"], r["checkpoint"]) == (lr, checkpoint)
            ]
            traces.append(_box(values, text.plotly_text(labels[checkpoint]), look(place)[0], suffix))
        layout[f"xaxis{suffix}"] = {"domain": [left, left + wide], "anchor": f"y{suffix}"}
        layout[f"yaxis{suffix}"] = {
            "domain": [max(0.0, top - high), top],
            "anchor": f"x{suffix}",
            "tickformat": ".2~p",
            "nticks": 5,
            "zeroline": True,
        }
        layout["annotations"].append(_panel_title(f"lr {text.lr_text(lr)}", left, top))
    repeats = len({row["repeat"] for row in rows})
    caption = (
        f"(First order − true)/true of {text.series_label(rows[0])}, at every learning rate on a scale of "
        f"its own. A point is one of {repeats} repeats, {spread}; box: quartiles and median; whiskers: the "
        "furthest points within 1.5 quartile distances."
    )
    title = f"Relative error of first order, {text.series_label(rows[0])}"
    return Figure(key, title, caption, make_spec(traces, **layout), height=70 + _PANEL_HEIGHT * deep)


def _panel_title(title: str, left: float, top: float) -> dict[str, Any]:
    return {
        "x": left,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "text": title,
        "showarrow": False,
    }


def _box(values: Sequence[float], name: str, color: str, suffix: str) -> Any:
    return go.Box(
        y=[v for v in rounded(values) if v is not None],
        name=name,
        boxpoints="all",
        jitter=0.4,
        pointpos=0,
        fillcolor="rgba(0,0,0,0)",
        line={"color": color, "width": 1.2},
        marker={"color": color, "size": 4},
        xaxis=f"x{suffix}",
        yaxis=f"y{suffix}",
        hovertemplate="%{x}: %{y:.3~p}<extra></extra>",
    )

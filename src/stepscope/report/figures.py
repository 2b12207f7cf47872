# ruff: noqa: RUF001 (typographic signs are meant)
"""What a figure of the page is, and the figures of the step.

Colours are names of CSS variables (``var(--blue)``): the script of the page resolves them when it draws, so
one figure serves light, dark and export. The palette behind them is Okabe and Ito's, and no distinction
rests on colour alone. Error bars are the 95 % intervals of the estimates in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.load import Measurement
from stepscope.stats import Estimate

BLUE, VERMILLION, GREEN, PURPLE = "var(--blue)", "var(--vermillion)", "var(--green)", "var(--purple)"
INK, MUTED, PAPER = "var(--ink)", "var(--muted)", "var(--paper)"

LOOKS = (
    (BLUE, "circle", "solid"),
    (VERMILLION, "diamond", "dash"),
    (GREEN, "square", "dot"),
    (PURPLE, "triangle-up", "dashdot"),
    (INK, "x", "longdash"),
    (MUTED, "star", "longdashdot"),
)
"""Colour, mark and dash of the first curves of a figure: no two have any of them in common."""


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        key: unique within its section; part of the element id and of exported file names.
        title: a few words above it.
        caption: what is estimated, with what error, n and units (plain text).
        spec: the Plotly figure, ``{data, layout}``.
        height: in CSS pixels.
        wide: whether it takes the full width of the page.
    """

    key: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    height: int = 380
    wide: bool = True


BARS = "+%{error_y.array:.2g} −%{error_y.arrayminus:.2g} (95 %)"
"""Hover text of vertical error bars."""


def sizes(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Estimates with their signs taken off, for logarithmic axes."""
    return [e.scaled(-1.0) if e.value < 0 else e for e in estimates]


def rounded(values: Iterable[Any], digits: int = 5) -> list[float | None]:
    """Numbers with ``digits`` significant digits; what is not finite becomes ``None`` (a gap)."""
    return [
        float(f"{float(v):.{digits}g}") if v is not None and math.isfinite(float(v)) else None for v in values
    ]


def make_spec(traces: Sequence[Any], **layout: Any) -> dict[str, Any]:
    """A validated figure without Plotly's default template."""
    figure = go.Figure(data=list(traces), layout={"template": "none", **layout})
    spec: dict[str, Any] = figure.to_plotly_json()
    spec["layout"].pop("template", None)
    return spec


def look(number: int) -> tuple[str, str, str]:
    """Colour, mark and dash of curve ``number``; beyond the first ones a colour comes with another mark."""
    turn, place = divmod(number, len(LOOKS))
    _, symbol, dash = LOOKS[(place + turn) % len(LOOKS)]
    return LOOKS[place][0], symbol, dash


def soft(color: str) -> str:
    """The translucent twin of a colour, for bands."""
    return color.replace(")", "-soft)")


def error_bars(estimates: Iterable[Estimate], color: str) -> dict[str, Any]:
    """The 95 % intervals of estimates as error bars; an end that is not known has none."""
    known = list(estimates)
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded(e.high - e.value for e in known),
        "arrayminus": rounded(e.value - e.low for e in known),
        "color": color,
        "thickness": 1.2,
        "width": 3,
    }


_COMPONENTS = (
    ("momentum", "momentum", BLUE),
    ("decay", "weight decay", PURPLE),
    ("bonus", "entropy bonus", GREEN),
    ("router", "router loss", MUTED),
    ("sequences", "this batch", VERMILLION),
    ("direction", "whole step", INK),
)


def step_figures(measurement: Measurement) -> list[Figure]:
    """Norms and shares of the components of the step, as two bar charts."""
    summary = measurement.step_summary
    if summary is None:
        return []
    doubt = f" Not to be relied on: {summary['doubt']}." if summary.get("doubt") else ""
    figures = []
    for kind, title, unit, caption in (
        (
            "norm",
            "Size of the components",
            "Euclidean norm per unit learning rate",
            "Euclidean norm, over all trainable parameters, of each component of the step per unit of "
            "learning rate. Exact given the update batch: no sampling error. Norms do not add up; shares "
            "do.",
        ),
        (
            "share",
            "Shares of the step",
            "share of the squared length",
            "Projection of each component on the whole step, divided by the step's squared length; the "
            "shares add up to 1. Exact given the update batch: no sampling error. A negative share points "
            "against the step.",
        ),
    ):
        rows = [
            (label, color, float(summary[f"{kind}_{name}"]))
            for name, label, color in _COMPONENTS
            if summary.get(f"{kind}_{name}") is not None
        ]
        if not rows:
            continue
        bars = go.Bar(
            y=[label for label, _, _ in rows],
            x=rounded(value for _, _, value in rows),
            orientation="h",
            marker={"color": [color for _, color, _ in rows]},
            text=[text.percent(value) if kind == "share" else text.number(value) for _, _, value in rows],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.5g}<extra></extra>",
        )
        values = [value for _, _, value in rows]
        span = max(0.0, *values) - min(0.0, *values) or 1.0
        ends = [min(0.0, *values) - 0.3 * span * (min(values) < 0), max(0.0, *values) + 0.14 * span]
        spec = make_spec(
            [bars],
            xaxis={"title": {"text": unit}, "zeroline": True, "nticks": 6, "range": rounded(ends, 3)},
            yaxis={"autorange": "reversed", "automargin": True},
            showlegend=False,
        )
        figures.append(Figure(f"step-{kind}", title, caption + doubt, spec, height=260, wide=False))
    return figures

# ruff: noqa: RUF001 (typographic signs are meant)
"""How figures look: one palette, one kind of curve, one kind of error bar for all of them.

Colours are names of CSS variables (``var(--blue)``): the script of the page resolves them when it draws, so
one figure serves light, dark and export. They can be told apart by the colour-blind, and no distinction
rests on colour alone. Error bars are the 95 % intervals of the estimates in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go

from stepscope.stats import Estimate

BLUE, VERMILLION = "var(--blue)", "var(--vermillion)"
"""For what lowers and what raises a quantity, and nothing else."""

GREEN, PURPLE, OCHRE, BROWN = "var(--green)", "var(--purple)", "var(--ochre)", "var(--brown)"
INK, MUTED, PAPER = "var(--ink)", "var(--muted)", "var(--paper)"


class Look(NamedTuple):
    """Colour, mark and dash of a curve."""

    color: str
    symbol: str = "circle"
    dash: str = "solid"


LOOKS = (
    Look(INK, "circle", "solid"),
    Look(GREEN, "diamond", "dash"),
    Look(PURPLE, "square", "dot"),
    Look(OCHRE, "triangle-up", "dashdot"),
    Look(BROWN, "x", "longdash"),
    Look(MUTED, "star", "longdashdot"),
)
"""The first curves of a figure: no two have colour, mark or dash in common."""

BARS = "+%{error_y.array:.2g} −%{error_y.arrayminus:.2g} (95 %)"
"""Hover text of vertical error bars."""

LOG: Mapping[str, Any] = {"type": "log", "exponentformat": "power"}
"""Options of an axis in powers of ten."""


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


def figure(
    key: str,
    title: str,
    caption: str,
    traces: Iterable[Any],
    *,
    height: int | None = None,
    wide: bool = True,
    **layout: Any,
) -> Figure:
    """A figure, validated by Plotly and without its default template.

    Args:
        key: unique within its section.
        title: a few words above it.
        caption: what is estimated, with what error, n and units.
        traces: of Plotly.
        height: in CSS pixels; by default 380, and 320 for one that shares its row.
        wide: whether it takes the full width of the page.
        layout: of Plotly.
    """
    drawn = go.Figure(data=list(traces), layout={"template": "none", **layout})
    spec: dict[str, Any] = drawn.to_plotly_json()
    spec["layout"].pop("template", None)
    return Figure(key, title, caption, spec, height or (380 if wide else 320), wide)


def axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}, **options}


def look(number: int) -> Look:
    """The look of curve ``number``; beyond the first ones a colour comes with another mark."""
    turn, place = divmod(number, len(LOOKS))
    _, symbol, dash = LOOKS[(place + turn) % len(LOOKS)]
    return Look(LOOKS[place].color, symbol, dash)


def soft(color: str) -> str:
    """The translucent twin of a colour, for bands."""
    return color.replace(")", "-soft)")


def rounded(values: Iterable[Any], digits: int = 5) -> list[float | None]:
    """Numbers with ``digits`` significant digits; what is not finite becomes ``None`` (a gap)."""
    return [
        float(f"{float(v):.{digits}g}") if v is not None and math.isfinite(float(v)) else None for v in values
    ]


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


def curve(
    name: str,
    x: Iterable[Any],
    y: Iterable[Any],
    look: Look,
    hover: str,
    *,
    mode: str = "lines+markers",
    size: float = 7,
    width: float = 1.5,
    details: Sequence[Any] | None = None,
    digits: int = 5,
    **options: Any,
) -> Any:
    """Points, a line or both; estimates come with their error bars.

    Args:
        name: in the legend.
        x: estimates, numbers or texts.
        y: estimates or numbers.
        look: colour, mark and dash.
        hover: text where the pointer rests on a point.
        mode: ``lines``, ``markers`` or both.
        size: of the marks, in pixels.
        width: of the line, in pixels.
        details: what ``hover`` calls ``customdata``, one per point.
        digits: significant digits of the numbers.
        options: of Plotly's scatter trace; those of ``marker`` and ``line`` are added to the look's.
    """
    marker = {"size": size, "color": look.color, "symbol": look.symbol, **options.pop("marker", {})}
    line = {"color": look.color, "width": width, "dash": look.dash, **options.pop("line", {})}
    parts = {"marker": marker if "markers" in mode else None, "line": line if "lines" in mode else None}
    places = {**_placed("x", list(x), look, digits), **_placed("y", list(y), look, digits)}
    if details is not None:
        places["customdata"] = list(details)
    return go.Scatter(
        name=name,
        mode=mode,
        hovertemplate=f"{hover}<extra></extra>",
        **places,
        **{key: part for key, part in parts.items() if part},
        **options,
    )


def _placed(axis: str, values: list[Any], look: Look, digits: int) -> dict[str, Any]:
    if all(isinstance(v, Estimate) for v in values):
        bars = error_bars(values, look.color)
        return {axis: rounded((v.value for v in values), digits), f"error_{axis}": bars}
    whole = all(isinstance(v, int | str) for v in values)
    return {axis: values if whole else rounded(values, digits)}


def silent(x: Iterable[Any], y: Iterable[Any], color: str, *, width: float = 1.5, **options: Any) -> Any:
    """A line without hover and legend."""
    line = {"color": color, "width": width, **options.pop("line", {})}
    return go.Scatter(
        x=rounded(x),
        y=rounded(y),
        mode="lines",
        line=line,
        **{"showlegend": False, "hoverinfo": "skip", **options},
    )


def sizes(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Estimates with their signs taken off, for logarithmic axes."""
    return [e.scaled(-1.0) if e.value < 0 else e for e in estimates]


def span(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    """Decimal logarithms of the smallest and the largest value, with room; a default for no values."""
    if not values:
        return -6.0, 0.0
    return math.log10(min(values)) - below, math.log10(max(values)) + above


def log_axis(title: str, low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis from 10^low to 10^high with a few ticks."""
    return axis(title, **LOG, range=[low, high], dtick=max(1, round((high - low) / 6)))


def lr_axis(rates: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis that shows the given learning rates; those that are 0 are left out."""
    return log_axis("learning rate", *span([lr for lr in rates if lr > 0], 0.25, 0.25))


def vertical(x: float, *, dash: str = "dot") -> dict[str, Any]:
    """A vertical line through the whole figure."""
    line = {"color": MUTED, "width": 1.2, "dash": dash}
    return {"type": "line", "yref": "paper", "line": line, "x0": x, "x1": x, "y0": 0, "y1": 1}


def note(words: str, x: float | str, y: float, **options: Any) -> dict[str, Any]:
    """Words in a figure, without an arrow; ``y`` is a share of its height."""
    return {"x": x, "y": y, "yref": "paper", "text": words, "showarrow": False, **options}

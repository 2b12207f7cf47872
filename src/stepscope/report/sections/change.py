# ruff: noqa: RUF001 (typographic signs are meant)
"""How the change of a quantity grows with the learning rate: truth, first and second order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, lr_cell, number_cell, table
from stepscope.report.units import Unit, unit_of
from stepscope.results.change import Change, ChangePoint
from stepscope.stats import Estimate

_BARS = (
    "Error bars and band: 95 % interval, clustered by prompt; a bar that leaves the panel below includes "
    "zero."
)


def section(measurement: Measurement, room: Room) -> Section | None:
    """The sweep over learning rates: the primary series is shown, the others unfold."""
    primary = measurement.change
    if primary is None:
        return None
    others = [_figure(s, f"change-{i}") for i, s in enumerate(primary.others, start=1)]
    title = "All changes as a table"
    return Section(
        "change",
        "Change against learning rate",
        sentences=[own_change(primary)],
        figures=[_figure(primary, "change")],
        more_title=f"{title}, and {len(others)} other quantities and versions" if others else title,
        more_figures=others,
        more_tables=[_table(primary.series)],
    )


def own_change(change: Change) -> str:
    """In words: the change at the step's own learning rate; empty where the sweep left that rate out."""
    if not change.lr > 0:
        return (
            "The checkpoint's own learning rate is 0, so its next step changes nothing; the sweep shows what "
            "the step would do at other learning rates."
        )
    point = next((p for p in change.points if math.isclose(p.lr, change.lr, rel_tol=1e-6)), None)
    if point is None:
        return ""
    true, before = (change.taken or point).true, change.value.value
    return change_sentence(change.quantity, change.lr, true, point.linear, before, unit_of(change))


def change_sentence(
    quantity: str,
    lr: float,
    true: Estimate,
    linear: Estimate,
    before: float = math.nan,
    unit: Unit | None = None,
) -> str:
    """The headline: what the step does at its own learning rate, truly and to first order, with errors.

    Args:
        quantity: its name.
        lr: the step's own learning rate.
        true: the change.
        linear: it to first order.
        before: the quantity before the step, of which the change is given in per cent; nan for none.
        unit: in which changes are written; None for that of ``true``.
    """

    def said(value: Estimate) -> str:
        if unit is None:
            return text.estimate(value)
        shown = text.bare(unit.change(value))
        return f"({shown}) {unit.times}" if unit.exponent else f"{shown} {unit.times}"

    name, start = text.quantity_name(quantity), f"At its own learning rate {text.lr_text(lr)} this step"
    if true.resolved:
        verb = "lowers" if true.value < 0 else "raises"
        size, part = true.scaled(math.copysign(1.0, true.value)), _per_cent(true, abs(true.value), before)
        start += f" {verb} the policy's {name} by {said(size)}{part}"
    else:
        part = _per_cent(true, true.value, before)
        start += f" changes the policy's {name} by {said(true)}{part}, not resolved from zero"
    doubts = [
        f" The {word} change failed its diagnostics: {value.reason}."
        for word, value in (("true", true), ("first-order", linear))
        if not value.reliable
    ]
    return f"{start} (first order: {said(linear)}).{''.join(doubts)}"


def _per_cent(true: Estimate, value: float, before: float) -> str:
    """The change in per cent of what was before, in brackets; nothing where that is not known, or none."""
    if not (math.isfinite(before) and before and math.isfinite(true.stderr)):
        return ""
    share = 100 / abs(before)
    return f" ({text.plus_minus(share * value, share * true.stderr)} % of {text.number(before)})"


def overlay(names: tuple[str, str], pair: tuple[Measurement, Measurement]) -> style.Figure | None:
    """The primary change series of two measurements on common axes; None unless both are of one kind."""
    changes = [m.change for m in pair if m.change is not None and m.change.points]
    if len({text.series_label(c) for c in changes}) != 1 or len(changes) < 2:
        return None
    unit = changes[0].points[0].true.unit
    every = [p for c in changes for p in c.points]
    low, high = _magnitudes(every)
    traces: list[Any] = []
    for side, own, change in zip("AB", style.LOOKS, changes, strict=False):
        traces += _first_order(change.points, f"{side} first order", own, 10 ** (low - 1))
        traces += _truth(change.points, f"{side} true", own, unit)
    label = text.series_label(changes[0])
    caption = (
        f"Change of {label} against learning rate. A: {names[0]}; B: {names[1]}; "
        "their own learning rates dotted. Circles and diamonds: the quantity falls; triangles: it rises; "
        "hollow: flagged unreliable. Error bars and bands: 95 % interval, clustered by prompt."
    )
    return style.figure(
        "overlay",
        "Change curves",
        caption,
        traces,
        height=440,
        xaxis=style.lr_axis([changes[0].lr, *(p.lr for p in every)]),
        yaxis=style.log_axis(f"|change|, {unit}", low, high),
        shapes=[style.vertical(c.lr) for c in changes if c.lr > 0],
    )


def _figure(change: Change, key: str) -> style.Figure:
    """|change| against learning rate, true, to first and to second order; error of first order below."""
    points, label = change.points, text.series_label(change)
    unit, prompts = (points[0].true.unit, points[0].true.n) if points else ("", 0)
    low, high = _magnitudes(points)
    errors = [_relative_error(p) for p in points]
    reach = _reach([e for e, p in zip(errors, points, strict=True) if p.true.reliable])
    rates = style.lr_axis([change.lr, *(p.lr for p in points)])
    limits = [
        (name, lr)
        for name, lr in (("measurable_from", change.measurable_from), ("linear_up_to", change.linear_up_to))
        if lr and rates["range"][0] < math.log10(lr) < rates["range"][1]
    ]
    own = [style.vertical(change.lr)] if change.lr > 0 else []
    inside = [abs(e.value) <= reach for e in errors if math.isfinite(e.value)]
    second = any(p.second_order is not None for p in points)
    sentences = (
        f"Change of {label} when the step is taken along the checkpoint's own direction with the learning "
        f"rate on the horizontal axis; magnitude in {unit}, n = {prompts} prompts.",
        "Circles: the quantity falls; triangles: it rises; hollow: flagged unreliable, reason on hover.",
        _BARS,
        "The curve to second order is drawn without its error." if second else "",
        _fit_sentence(change),
        _range_sentence(change),
        "Lower panel: relative error of the first order, with the 95 % interval of the paired difference.",
        "" if all(inside) else f"{inside.count(False)} of its {len(inside)} points lie outside the panel.",
    )
    return style.figure(
        key,
        f"Change of {label}",
        " ".join(sentence for sentence in sentences if sentence),
        [
            *_first_order(points, "first order", style.Look(style.PURPLE, dash="dash"), 10 ** (low - 1)),
            *_second_order(points, unit),
            *_truth(points, "true", style.Look(style.INK), unit),
            _relative(points, errors),
        ],
        height=520,
        xaxis={**rates, "anchor": "y2"},
        yaxis={**style.log_axis(f"|change|, {unit}", low, high), "domain": [0.36, 1]},
        yaxis2=style.axis(
            "first/true − 1",
            domain=[0, 0.26],
            anchor="x",
            range=[-reach, reach],
            tickformat=".0%",
            nticks=5,
            zeroline=True,
        ),
        shapes=[*own, *(style.vertical(lr, dash="longdash") for _, lr in limits)],
        annotations=[
            *(_rate_note("own lr", change.lr, y=1.0, xanchor="right", xshift=-4) for _ in own),
            *(_rate_note(name.replace("_", " "), lr, **_PLACES[name]) for name, lr in limits),
        ],
    )


_PLACES: Mapping[str, Mapping[str, Any]] = {
    "measurable_from": {"y": 0.95, "xanchor": "left", "xshift": 4},
    "linear_up_to": {"y": 0.42, "xanchor": "right", "xshift": -4},
}
"""Inside the range: high on the left and low on the right, away from the rising curve."""


def _rate_note(words: str, lr: float, **place: Any) -> dict[str, Any]:
    font = {"size": 12, "color": style.MUTED}
    return style.note(
        f"{words} {text.lr_text(float(f'{lr:.2g}'))}", math.log10(lr), yanchor="top", font=font, **place
    )


def _drawable(points: Sequence[ChangePoint], name: str) -> list[tuple[ChangePoint, Estimate]]:
    values: list[tuple[ChangePoint, Estimate]] = [(p, getattr(p, name)) for p in points]
    return [(p, e) for p, e in values if math.isfinite(e.value) and e.value]


def _magnitudes(points: Sequence[ChangePoint]) -> tuple[float, float]:
    values = [abs(e.value) for name in ("true", "linear") for _, e in _drawable(points, name)]
    return style.span(values, 0.6, 0.5)


def _truth(points: Sequence[ChangePoint], label: str, own: style.Look, unit: str) -> list[Any]:
    chosen = _drawable(points, "true")
    if not chosen:
        return []
    marks = [
        (own.symbol if e.value < 0 else "triangle-up") + ("" if e.reliable else "-open") for _, e in chosen
    ]
    details = [
        f"{text.bare(e)} {unit}, n = {e.n}<br>effective sample size {text.number(p.effective_sample_size)}, "
        f"Pareto-k {text.number(p.pareto_k, 2)}{_doubt(e)}"
        for p, e in chosen
    ]
    return [
        style.curve(
            label,
            [p.lr for p, _ in chosen],
            style.sizes(e for _, e in chosen),
            own,
            f"<b>{label}</b>, lr %{{x:.3g}}<br>%{{customdata}}",
            mode="markers",
            size=9,
            details=details,
            marker={"symbol": marks, "line": {"width": 1.5, "color": own.color}},
        )
    ]


def _doubt(value: Estimate) -> str:
    return "" if value.reliable else f"<br>unreliable: {text.plotly_text(value.reason)}"


def _first_order(points: Sequence[ChangePoint], label: str, own: style.Look, floor: float) -> list[Any]:
    chosen = _drawable(points, "linear")
    if not chosen:
        return []
    x, values = [p.lr for p, _ in chosen], style.sizes(e for _, e in chosen)
    return [
        style.silent(x, [max(e.low, floor) for e in values], own.color, width=0),
        style.silent(
            x, [e.high for e in values], own.color, width=0, fill="tonexty", fillcolor=style.soft(own.color)
        ),
        style.curve(
            label,
            x,
            [e.value for e in values],
            own,
            f"<b>{label}</b>, lr %{{x:.3g}}<br>%{{customdata}}",
            mode="lines",
            details=[text.estimate(e) for _, e in chosen],
        ),
    ]


def _second_order(points: Sequence[ChangePoint], unit: str) -> list[Any]:
    chosen = [(p.lr, p.linear.value + p.second_order.value, p.second_order) for p in points if p.second_order]
    if not chosen:
        return []
    return [
        style.curve(
            "first + second order",
            [lr for lr, _, _ in chosen],
            [abs(total) or math.nan for _, total, _ in chosen],
            style.Look(style.GREEN, dash="dot"),
            "<b>first + second order</b>, lr %{x:.3g}<br>%{customdata}",
            mode="lines",
            width=1.8,
            details=[
                f"{text.number(total)} {unit}<br>second-order term {text.estimate(term)}"
                for _, total, term in chosen
            ],
        )
    ]


def _relative_error(point: ChangePoint) -> Estimate:
    """(first order - true)/|true| with the error of the paired difference."""
    true = abs(point.true.value)
    return point.excess.scaled(-1 / true if true else math.nan, unit="1")


def _reach(errors: Sequence[Estimate]) -> float:
    ends = [abs(end) for e in errors for end in (e.value, e.low, e.high) if math.isfinite(end)]
    return min(1.0, max(0.05, 1.1 * max(ends))) if ends else 1.0


def _relative(points: Sequence[ChangePoint], errors: Sequence[Estimate]) -> Any:
    return style.curve(
        "first/true − 1",
        [p.lr for p in points],
        errors,
        style.Look(style.INK),
        "lr %{x:.3g}<br>first order off by %{customdata}",
        mode="markers",
        marker={
            "symbol": ["square" if p.excess.reliable else "square-open" for p in points],
            "line": {"width": 1.5, "color": style.INK},
        },
        details=[
            f"{text.percent(e.value)} (95 %: {text.percent(e.low)} to {text.percent(e.high)})"
            f"{_doubt(p.excess)}"
            for e, p in zip(errors, points, strict=True)
        ],
        yaxis="y2",
        showlegend=False,
    )


def _fit_sentence(change: Change) -> str:
    fit = change.fit
    if fit is None:
        return ""
    slope = text.plus_minus(fit.slope, fit.slope_stderr)
    return (
        f"Slope of log |true change| on log learning rate {slope} (1 = linear), R² = "
        f"{text.number(fit.r2, 5)}, over the {fit.n} reliable learning rates."
    )


def _range_sentence(change: Change) -> str:
    parts = [
        f"{words} lr {text.number(lr, 2)}, where the {why}"
        for words, lr, why in (
            ("measurable from", change.measurable_from, "first order is ten times the round-off"),
            ("linear up to", change.linear_up_to, "second order is a tenth of the first"),
        )
        if lr is not None and math.isfinite(lr)
    ]
    joined = "; ".join(parts)
    return f"{joined[:1].upper()}{joined[1:]}." if joined else ""


def _table(changes: Sequence[Change]) -> Table:
    """All series at every learning rate."""
    second = any(p.second_order for c in changes for p in c.points)
    return table(
        "changes",
        "All measured changes",
        "Every measured change with its standard error, clustered by prompt. First order: derivative along "
        "the step times the learning rate. ⚠ marks numbers flagged unreliable; the reason shows on hover "
        "and on focus.",
        [
            {
                "Quantity": text.series_label(change),
                "Learning rate": lr_cell(point.lr),
                "True change": point.true,
                "First order": point.linear,
                **({"Second order": point.second_order} if second else {}),
                "Unit": point.true.unit,
                "Effective sample size": point.effective_sample_size,
                "Pareto-k": number_cell(point.pareto_k, 2),
            }
            for change in changes
            for point in change.points
        ],
    )

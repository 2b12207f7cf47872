# ruff: noqa: RUF001 (typographic signs are meant)
"""The first screen: what the step does, what that is made of, and the tokens that lowered and raised it."""

from __future__ import annotations

import plotly.graph_objects as go

from stepscope.reading.answer import TopToken, Waterfall, top_tokens, waterfall
from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Answer, Culprit, Mark
from stepscope.report.sections.change import own_change
from stepscope.report.sections.responses import visible
from stepscope.report.units import Unit, unit_of
from stepscope.stats import Estimate

_EACH = 4
_CHARACTERS = 26


def answer(measurement: Measurement) -> Answer | None:
    """The first screen; None where no change was measured. What is missing is left out of it."""
    change = measurement.change
    if change is None:
        return None
    unit = unit_of(change)
    found = waterfall(measurement)
    lowered, raised = (top_tokens(measurement, _EACH, sign) for sign in (-1, 1))
    true = found.change if found else None
    return Answer(
        sentence=own_change(change),
        marks=[] if true is None else _marks(true),
        figure=_figure(found, unit) if found else None,
        unit=unit.label,
        lowered=[_culprit(token, unit) for token in lowered],
        raised=[_culprit(token, unit) for token in raised],
        caption=f"What tokens of the batch change the {unit.quantity} by, to first order, ± one standard "
        "error over the probe; equal ones after the same prompt and prefix together (× how many); per cent: "
        "of the summed size of all. The largest of many are overestimated. ○ not resolved from zero.",
    )


def _marks(true: Estimate) -> list[Mark]:
    """Two verdicts that have nothing to do with one another."""
    trust = (
        Mark("diagnostics passed", True) if true.reliable else Mark("diagnostics failed", False, true.reason)
    )
    size = "resolved from zero" if true.resolved else "not resolved from zero"
    return [trust, Mark(size, true.resolved, f"95 % interval {text.interval(true)} {true.unit}")]


def _culprit(found: TopToken, unit: Unit) -> Culprit:
    value = unit.change(found.value)
    return Culprit(
        before=visible(found.before)[-_CHARACTERS:],
        token=visible(found.token),
        after=visible(found.after)[:_CHARACTERS],
        times=len(found.places),
        value=text.bare(value),
        share=text.percent(found.share),
        resolved=value.resolved,
        place=".".join(map(str, found.places[0])),
    )


def _figure(found: Waterfall, unit: Unit) -> style.Figure:
    """Bars that lead from 0 to the change, each from where the one before it ends."""
    rows = [(part.name, unit.change(part.value), part.tokens) for part in found.parts]
    whole = unit.change(found.change)
    ends, at = [], 0.0
    for _, value, _ in rows:
        ends.append(at)
        at += value.value
    values = [*(value for _, value, _ in rows), whole]
    names = [*(name for name, _, _ in rows), "the whole change"]
    details = [
        f"{text.bare(value)} {unit.label}<br>95 %: {text.interval(value)}"
        + ("" if value.resolved else "<br>not resolved from zero")
        + (f"<br>{tokens:,} tokens" if tokens else "")
        for value, tokens in zip(values, [*(tokens for _, _, tokens in rows), 0], strict=True)
    ]
    colors = [style.BLUE if value.value < 0 else style.VERMILLION for value in values[:-1]]
    bars = go.Bar(
        orientation="h",
        y=[_named(name, value) for name, value in zip(names, values, strict=True)],
        x=style.rounded(value.value for value in values),
        base=style.rounded([*ends, 0.0]),
        marker={
            "color": [*colors, style.INK],
            "pattern": {"shape": ["" if value.resolved else "/" for value in values]},
        },
        error_x=style.error_bars(values, style.MUTED),
        customdata=[[name, detail] for name, detail in zip(names, details, strict=True)],
        hovertemplate="%{customdata[0]}: %{customdata[1]}<extra></extra>",
    )
    return style.figure(
        "waterfall",
        f"What the change of the {unit.quantity} is made of",
        f"In {unit.label}; bars start where the one above ends; blue lowers, orange raises. Classes are the "
        "batch’s tokens by verdict and probability, to first order; rest: second order and beyond. Bars: "
        "95 %, of classes over folds of the probe. ○, hatched: not resolved from zero.",
        [bars],
        height=40 + 34 * len(values),
        xaxis=style.axis(unit.label, zeroline=True, nticks=6),
        yaxis={"autorange": "reversed", "automargin": True},
        showlegend=False,
        margin={"l": 110, "r": 14, "t": 8, "b": 44},
    )


def _named(name: str, value: Estimate) -> str:
    return name if value.resolved else f"{name} ○"

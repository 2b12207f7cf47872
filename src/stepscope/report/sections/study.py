# ruff: noqa: RUF001 (typographic signs are meant)
"""What a study says: changes and their fits over checkpoints and repeats, and how far first order is off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from stepscope.loglog import LogLogFit
from stepscope.report import style, text
from stepscope.report.load import StudyPage
from stepscope.report.parts import Panel, Section
from stepscope.report.sections.criteria import agrees
from stepscope.report.sections.standings import standings
from stepscope.report.tables import Cell, Table, lr_cell, number_cell, percent_cell, table

_COLUMNS = 2
"""Panels beside one another where each learning rate has its own."""

_GAP, _ROW_GAP = 0.1, 0.3
_PANEL_HEIGHT = 250


def panel(study: StudyPage, setting: str, key: str) -> Panel:
    """All figures and tables of one setting; the first series is shown, the others unfold."""
    lines, boxes = [], []
    for number, names in enumerate(study.series(setting)):
        lines.append(_line_figure(study, names, f"line-{number}"))
        boxes.append(_difference_figure(study, names, f"difference-{number}"))
    more = "Other normalisations, versions and quantities" if len(lines) > 1 else ""
    board = standings(study, setting)
    return Panel(
        key=key,
        title=f"Setting {setting}",
        sentences=study_sentences(study, setting),
        sections=[
            Section(
                "change",
                "Change against learning rate",
                figures=lines[:1],
                tables=[_lines_table(study, setting)],
                more_title=more,
                more_figures=lines[1:],
            ),
            Section(
                "difference",
                "How far first order is off",
                figures=boxes[:1],
                more_title=more or "Numbers",
                more_figures=boxes[1:],
                more_tables=[_changes_table(study, setting)],
            ),
            *([board] if board else []),
        ],
    )


def lede(study: StudyPage) -> str:
    """How many measurements of what, and what the spread over repeats means."""
    repeats = len(study.distinct("repeat"))
    counts = [counted(len(study.distinct(name)), name) for name in ("checkpoint", "setting", "repeat")]
    spread = f" The spread over repeats is {study.report.spread}." if repeats > 1 else ""
    cells = {(row.checkpoint, row.setting, row.repeat) for row in study.rows}
    return (
        f"{study.path}: {counted(len(cells), 'measurement')} ({', '.join(counts)}).{spread}{_failures(study)}"
    )


def _failures(study: StudyPage) -> str:
    """What could not be measured, and for which reasons."""
    failed = study.report.failed
    if not failed:
        return ""
    names = ", ".join(f"{Path(c.checkpoint).name} {c.setting} {c.repeat}" for c in failed[:6])
    more = f" and {len(failed) - 6} more" if len(failed) > 6 else ""
    reasons = "; ".join(list(dict.fromkeys(cell.reason for cell in failed))[:3])
    count = counted(len(failed), "further cell")
    return f" {count} could not be measured, and nothing here is of them: {names}{more} ({reasons})."


def counted(count: int, noun: str) -> str:
    """``1 repeat``, ``2 repeats``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def study_sentences(study: StudyPage, setting: str) -> list[str]:
    """Slopes and R^2 over all checkpoints; first order against truth at the own learning rate."""
    names = study.series(setting)[0]
    sentences = []
    fits = [row.fit for row in study.report.fits if agrees(row, names) and row.fit and _known(row.fit.slope)]
    if fits:
        slopes = [fit.slope for fit in fits]
        r2 = [fit.r2 for fit in fits if _known(fit.r2)]
        least = f", R² at least {text.number(min(r2), 6)}" if r2 else ""
        sentences.append(
            f"Slope of log |true change| on log learning rate: {text.number(min(slopes), 5)} to "
            f"{text.number(max(slopes), 5)} over {counted(len(fits), 'measurement')} (1 = linear){least}."
        )
    for row in study.report.changes:
        off = row.relative_difference
        if agrees(row, names) and _at_own_lr(row) and off.median is not None:
            quartiles = " to ".join(text.percent(q) for q in (off.q25, off.q75) if q is not None)
            around = f" (quartiles {quartiles} of {off.n} repeats)" if off.n > 1 else ""
            sentences.append(
                f"{study.labels[row.checkpoint]} at its own learning rate {text.lr_text(row.lr)}: true "
                f"change {text.estimate(row.true)}; first order is off by {text.percent(off.median)}{around}."
            )
    return sentences[:6]


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _at_own_lr(row: Any) -> bool:
    return math.isclose(row.lr, row.own_lr, rel_tol=1e-6)


def _line_figure(study: StudyPage, names: Mapping[str, Any], key: str) -> style.Figure:
    """|true change| against learning rate by checkpoint, with the line its repeats were fitted by."""
    points = [row for row in study.report.changes if agrees(row, names)]
    traces: list[Any] = []
    for number, line in enumerate(row for row in study.report.lines if agrees(row, names)):
        own = style.look(number)
        drawn = [p for p in points if p.checkpoint == line.checkpoint and _drawable(p)]
        if drawn:
            traces.append(
                _points(drawn, text.plotly_text(study.labels[line.checkpoint]) + _fit_words(line), own)
            )
        if line.slope is not None and line.intercept is not None:
            ends = (line.lrs[0], line.lrs[-1])
            fitted = [math.exp(line.intercept) * lr**line.slope.value for lr in ends]
            traces.append(style.silent(ends, fitted, own.color, line={"dash": own.dash}))
    own_lrs = sorted({float(p.own_lr) for p in points})
    repeats, unit, label = max(p.repeats for p in points), points[0].true.unit, text.series_label(points[0])
    what = (
        f"Mean over {repeats} repeats; error bars: 95 % interval of the mean, {study.report.spread}."
        if repeats > 1
        else "One measurement each; error bars: 95 % interval, clustered by prompt and conditional on the "
        "update batch."
    )
    caption = (
        f"Magnitude of the true change of {label}, in {unit}, by checkpoint; own "
        f"learning rates dotted. {what} Lines: mean of the repeats' fits, over the learning rates fitted; "
        "slopes and smallest R² in the legend. Hollow: flagged unreliable."
    )
    magnitudes = style.span([abs(p.true.value) for p in points if _drawable(p)], 0.5, 0.5)
    return style.figure(
        key,
        f"Change of {label}",
        caption,
        traces,
        height=460,
        xaxis=style.lr_axis([*own_lrs, *(p.lr for p in points)]),
        yaxis=style.log_axis(f"|change|, {unit}", *magnitudes),
        shapes=[style.vertical(lr) for lr in own_lrs if lr > 0],
    )


def _drawable(point: Any) -> bool:
    return math.isfinite(point.true.value) and point.true.value != 0


def _fit_words(line: Any) -> str:
    if line.slope is None:
        return ": no fit"
    return f": slope {text.bare(line.slope)}" + (f", R² {text.number(line.r2, 5)}" if _known(line.r2) else "")


def _points(points: Sequence[Any], name: str, own: style.Look) -> Any:
    marks = [own.symbol + ("" if p.true.reliable else "-open") for p in points]
    details = [
        f"{text.estimate(p.true)}<br>first order {text.estimate(p.linear)}"
        + ("" if p.true.reliable else f"<br>{text.plotly_text(p.true.reason)}")
        for p in points
    ]
    return style.curve(
        name,
        [p.lr for p in points],
        style.sizes(p.true for p in points),
        own,
        "lr %{x:.3g}<br>%{customdata}",
        mode="markers",
        size=8,
        marker={"symbol": marks, "line": {"width": 1.5, "color": own.color}},
        details=details,
    )


def _difference_figure(study: StudyPage, names: Mapping[str, Any], key: str) -> style.Figure:
    """Distribution of (first order - true)/true: a panel per learning rate, a box per checkpoint."""
    rows = [row for row in study.rows if agrees(row, names)]
    lrs = sorted({row.lr for row in rows})
    checkpoints = list(dict.fromkeys(row.checkpoint for row in rows))
    deep = math.ceil(len(lrs) / _COLUMNS)
    wide, high = (1 - _GAP * (_COLUMNS - 1)) / _COLUMNS, (1 - _ROW_GAP * (deep - 1) / deep) / deep
    traces: list[Any] = []
    axes: dict[str, Any] = {}
    notes = []
    for number, lr in enumerate(lrs):
        left = (number % _COLUMNS) * (wide + _GAP)
        top = 1 - (number // _COLUMNS) * (high + _ROW_GAP / deep)
        suffix = "" if number == 0 else str(number + 1)
        for place, checkpoint in enumerate(checkpoints):
            values = [r.relative_difference for r in rows if (r.lr, r.checkpoint) == (lr, checkpoint)]
            traces.append(
                _box(values, text.plotly_text(study.labels[checkpoint]), style.look(place).color, suffix)
            )
        axes[f"xaxis{suffix}"] = {"domain": [left, left + wide], "anchor": f"y{suffix}"}
        axes[f"yaxis{suffix}"] = {
            "domain": [max(0.0, top - high), top],
            "anchor": f"x{suffix}",
            "tickformat": ".2~p",
            "nticks": 5,
            "zeroline": True,
        }
        corner = {"xref": "paper", "xanchor": "left", "yanchor": "bottom"}
        notes.append(style.note(f"lr {text.lr_text(lr)}", left, top, **corner))
    repeats, label = len({row.repeat for row in rows}), text.series_label(rows[0])
    caption = (
        f"(First order − true)/true of {label}, at every learning rate on a scale of its own. "
        f"A point is one of {repeats} repeats, {study.report.spread}; box: quartiles and median; "
        "whiskers: the furthest points within 1.5 quartile distances."
    )
    return style.figure(
        key,
        f"Relative error of first order, {label}",
        caption,
        traces,
        height=70 + _PANEL_HEIGHT * deep,
        annotations=notes,
        showlegend=False,
        **axes,
    )


def _box(values: Sequence[float], name: str, color: str, suffix: str) -> Any:
    return go.Box(
        y=[v for v in style.rounded(values) if v is not None],
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


def cells_table(study: StudyPage) -> Table:
    """Every cell with its seeds, its fit, and the change of its primary series at the own learning rate."""
    rows = []
    for setting in study.distinct("setting"):
        names = study.series(setting)[0]
        fits = {(r.checkpoint, r.repeat): r.fit for r in study.report.fits if agrees(r, names)}
        for row in study.rows:
            if agrees(row, names) and _at_own_lr(row):
                fit = fits[row.checkpoint, row.repeat]
                rows.append(
                    {
                        "Checkpoint": study.labels[row.checkpoint],
                        "Setting": setting,
                        "Quantity": text.series_label(row),
                        "Repeat": row.repeat,
                        "Update seed": Cell(str(row.update_seed), row.update_seed),
                        "Probe seed": Cell(str(row.probe_seed), row.probe_seed),
                        "Learning rate": lr_cell(row.lr),
                        "True change": Cell(
                            text.plus_minus(row.true, row.true_stderr),
                            row.true,
                            row.true_stderr,
                            flag="" if row.reliable else row.reason,
                        ),
                        "First order": _with_error(row.linear, row.linear_stderr),
                        "Unit": row.unit,
                        "first/true − 1": percent_cell(row.relative_difference),
                        "Slope, log-log": _slope_cell(fit),
                        "R²": number_cell(fit.r2 if fit else None, 6),
                    }
                )
    return table(
        "cells",
        "All cells",
        "Every measurement at its checkpoint's own learning rate, ± one standard error clustered by prompt "
        "and conditional on the update batch. ⚠ marks numbers flagged unreliable.",
        rows,
    )


def _with_error(value: float, stderr: float) -> Cell:
    return Cell(text.plus_minus(value, stderr), value, stderr)


def _slope_cell(fit: LogLogFit | None) -> Cell:
    if fit is None or not _known(fit.slope):
        return number_cell(None)
    return _with_error(fit.slope, fit.slope_stderr)


def _lines_table(study: StudyPage, setting: str) -> Table:
    """The fits of each checkpoint's repeats together."""
    return table(
        "lines",
        "Fits",
        "Slope of log |true change| on log learning rate: mean over the repeats that could be fitted, ± the "
        f"standard error of that mean, {study.report.spread}; of a lone fit, the scatter about its "
        "line. Each fit keeps to reliable learning rates up to the step's own, or to where second order is a "
        "tenth of linear.",
        [
            {
                "Checkpoint": study.labels[row.checkpoint],
                "Quantity": text.series_label(row),
                "Slope, log-log": row.slope,
                "smallest R²": number_cell(row.r2, 6),
                "fits": row.fits,
                "repeats": row.repeats,
            }
            for row in study.report.lines
            if row.setting == setting
        ],
    )


def _changes_table(study: StudyPage, setting: str) -> Table:
    """The changes at each learning rate, over repeats."""
    off = {"5 %": "q05", "25 %": "q25", "median": "median", "75 %": "q75", "95 %": "q95"}
    off["standard deviation"] = "sd"
    return table(
        "changes",
        "Changes over repeats",
        "Mean over repeats ± the standard error of that mean (of a lone measurement: its own), and the "
        f"distribution of (first order − true)/true over repeats, {study.report.spread}. n: repeats.",
        [
            {
                "Checkpoint": study.labels[row.checkpoint],
                "Quantity": text.series_label(row),
                "Learning rate": lr_cell(row.lr),
                "True change": row.true,
                "First order": row.linear,
                "Unit": row.true.unit,
                "n": row.repeats,
                **{
                    f"first/true − 1: {words}": percent_cell(getattr(row.relative_difference, name))
                    for words, name in off.items()
                },
            }
            for row in study.report.changes
            if row.setting == setting
        ],
    )

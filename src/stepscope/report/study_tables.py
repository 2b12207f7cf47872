# ruff: noqa: RUF001 (typographic signs are meant)
"""Tables of a study: every cell, the fits, and the changes over repeats."""

from __future__ import annotations

import math

from stepscope.report import text
from stepscope.report.study_load import Row, Study, agrees, at_own_lr
from stepscope.report.tables import (
    Cell,
    Column,
    TableBlock,
    count_cell,
    estimate_cell,
    number_cell,
    text_cell,
)


def cells_table(study: Study) -> TableBlock:
    """Every cell: its seeds, its fit, and the change of its primary series at the own learning rate."""
    columns = (
        Column("Checkpoint"),
        Column("Setting"),
        Column("Quantity", "def-entropy"),
        Column("Repeat", numeric=True),
        Column("Update seed", numeric=True),
        Column("Probe seed", numeric=True),
        Column("Learning rate", numeric=True),
        Column("True change", "def-true-change", numeric=True, with_error=True),
        Column("First order", "def-linear-change", numeric=True, with_error=True),
        Column("Unit"),
        Column("first/true − 1", "def-relative-difference", numeric=True),
        Column("Slope, log-log", "def-linearity", numeric=True, with_error=True),
        Column("R²", "def-linearity", numeric=True),
    )
    rows = []
    for setting in study.distinct("setting"):
        names = study.series(setting)[0]
        fits = {(r["checkpoint"], r["repeat"]): r["fit"] or {} for r in study.fits if agrees(r, names)}
        for row in study.rows:
            if not agrees(row, names) or not at_own_lr(row):
                continue
            fit = fits[row["checkpoint"], row["repeat"]]
            rows.append(
                [
                    text_cell(study.labels[row["checkpoint"]]),
                    text_cell(setting),
                    text_cell(text.series_label(row)),
                    *(Cell(str(row[name]), row[name]) for name in ("repeat", "update_seed", "probe_seed")),
                    Cell(text.lr_text(row["lr"]), row["lr"]),
                    _cell_of(row, "true"),
                    _cell_of(row, "linear"),
                    text_cell(row["unit"]),
                    _percent_cell(row["relative_difference"]),
                    _slope_cell(fit),
                    number_cell(fit.get("r2"), 6),
                ]
            )
    caption = (
        "Every measurement at its checkpoint's own learning rate, ± one standard error clustered by prompt "
        "and conditional on the update batch. ⚠ marks numbers flagged unreliable."
    )
    return TableBlock("cells", "All cells", caption, columns, rows)


def _cell_of(row: Row, name: str) -> Cell:
    value, stderr = row[name], row[f"{name}_stderr"]
    flag = row["reason"] if name == "true" and not row["reliable"] else ""
    return Cell(text.plus_minus(value, stderr), value, stderr, flag=flag)


def _slope_cell(fit: Row) -> Cell:
    if fit.get("slope") is None:
        return number_cell(None)
    error = fit.get("slope_stderr")
    stderr = math.nan if error is None else float(error)
    return Cell(text.plus_minus(fit["slope"], stderr), fit["slope"], stderr)


def _percent_cell(value: float | None) -> Cell:
    share = math.nan if value is None else float(value)
    return Cell(text.percent(share), share)


def lines_table(study: Study, setting: str) -> TableBlock:
    """The fits of each checkpoint's repeats together."""
    columns = (
        Column("Checkpoint"),
        Column("Quantity", "def-entropy"),
        Column("Slope, log-log", "def-linearity", numeric=True, with_error=True),
        Column("smallest R²", "def-linearity", numeric=True),
        Column("fits", "def-n", numeric=True),
        Column("repeats", "def-n", numeric=True),
    )
    rows = [
        (
            text_cell(study.labels[row["checkpoint"]]),
            text_cell(text.series_label(row)),
            estimate_cell(row["slope"]) if row["slope"] is not None else number_cell(None),
            number_cell(row["r2"], 6),
            count_cell(row["fits"]),
            count_cell(row["repeats"]),
        )
        for row in study.lines
        if row["setting"] == setting
    ]
    caption = (
        "Slope of log |true change| on log learning rate: mean over the repeats that could be fitted, ± the "
        f"standard error of that mean, {study.spread}; of a lone fit, the scatter about its line. Each fit "
        "keeps to reliable learning rates up to the step's own, or to where second order is a tenth of "
        "linear."
    )
    return TableBlock("lines", "Fits", caption, columns, rows)


def changes_table(study: Study, setting: str) -> TableBlock:
    """The changes at each learning rate, over repeats."""
    columns = (
        Column("Checkpoint"),
        Column("Quantity", "def-entropy"),
        Column("Learning rate", numeric=True),
        Column("True change", "def-true-change", numeric=True, with_error=True),
        Column("First order", "def-linear-change", numeric=True, with_error=True),
        Column("Unit"),
        Column("n", "def-n", numeric=True),
        *(
            Column(f"first/true − 1: {name}", "def-relative-difference", numeric=True)
            for name in ("5 %", "25 %", "median", "75 %", "95 %", "standard deviation")
        ),
    )
    rows = [
        (
            text_cell(study.labels[row["checkpoint"]]),
            text_cell(text.series_label(row)),
            Cell(text.lr_text(row["lr"]), row["lr"]),
            estimate_cell(row["true"]),
            estimate_cell(row["linear"]),
            text_cell(row["true"].unit),
            count_cell(row["repeats"]),
            *(
                _percent_cell(row["relative_difference"][name])
                for name in ("q05", "q25", "median", "q75", "q95", "sd")
            ),
        )
        for row in study.changes
        if row["setting"] == setting
    ]
    caption = (
        "Mean over repeats ± the standard error of that mean (of a lone measurement: its own), and the "
        f"distribution of (first order − true)/true over repeats, {study.spread}. n: repeats."
    )
    return TableBlock("changes", "Changes over repeats", caption, columns, rows)

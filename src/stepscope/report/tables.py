# ruff: noqa: RUF001 (typographic signs are meant)
"""Tables of the page: what they show, what they sort by, and what goes into their CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepscope.report import text
from stepscope.report.load import Measurement, parse_estimate
from stepscope.stats import Estimate


@dataclass(frozen=True)
class Column:
    """A column: its heading, its glossary entry, and whether it is a number (right-aligned)."""

    name: str
    anchor: str = ""
    numeric: bool = False
    with_error: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        shown: the text on the page.
        raw: what sorts and goes into the CSV; a number or a text.
        stderr: standard error for the CSV where the column has one.
        anchor: glossary entry that the text links to.
        flag: reason why the number is not reliable; empty when it is.
        note: small print below the text.
    """

    shown: str
    raw: float | str
    stderr: float | None = None
    anchor: str = ""
    flag: str = ""
    note: str = ""


@dataclass(frozen=True)
class TableBlock:
    """One table of the page."""

    key: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def text_cell(value: object, *, anchor: str = "") -> Cell:
    """A cell of plain text."""
    return Cell(shown=str(value), raw=str(value), anchor=anchor)


def count_cell(value: int) -> Cell:
    """A cell with a whole number."""
    return Cell(shown=f"{value:,}", raw=value)


def number_cell(value: float | None, digits: int = 3) -> Cell:
    """A cell with a bare number."""
    if value is None:
        return Cell(shown=text.NOT_AVAILABLE, raw=float("nan"))
    return Cell(shown=text.number(float(value), digits), raw=float(value))


def estimate_cell(value: Estimate) -> Cell:
    """A cell with value ± standard error and the trust flag."""
    return Cell(
        shown=text.plus_minus(value.value, value.stderr),
        raw=value.value,
        stderr=value.stderr,
        flag="" if value.reliable else value.reason or "flagged by the measurement",
    )


def trust_cell(value: Estimate) -> Cell:
    """A cell saying whether the number passed its diagnostics, and if not why; nothing on its size."""
    if value.reliable:
        return Cell(shown="passed", raw="passed", anchor="def-trust")
    return Cell(shown="failed", raw=f"failed: {value.reason}", anchor="def-trust", note=value.reason)


def interval_cell(value: Estimate) -> Cell:
    """A cell with the 95 % interval, saying whether it leaves out 0."""
    shown = text.interval(value)
    if shown == text.NOT_AVAILABLE:
        return Cell(shown=shown, raw=shown)
    verdict = "resolved from zero" if value.resolved else "not resolved from zero"
    return Cell(shown=shown, raw=f"{value.low:.6g} to {value.high:.6g}: {verdict}", note=verdict)


_ESTIMATE_COLUMNS = (
    Column("Figure"),
    Column("Value ± standard error", "def-estimate", numeric=True, with_error=True),
    Column("95 % interval", "def-estimate"),
    Column("Unit"),
    Column("n", "def-n", numeric=True),
    Column("Diagnostics", "def-trust"),
    Column("Method"),
)


def estimates_table(key: str, title: str, caption: str, figures: Mapping[str, Estimate]) -> TableBlock:
    """A table of named estimates with error, unit, n, trust and method."""
    rows = []
    for name, value in figures.items():
        label = text.headline_label(name)
        rows.append(
            (
                text_cell(label.name, anchor=label.anchor),
                estimate_cell(value),
                interval_cell(value),
                text_cell(value.unit if value.unit != "1" else "–"),
                count_cell(value.n),
                trust_cell(value),
                text_cell(value.method),
            )
        )
    return TableBlock(key, title, caption, _ESTIMATE_COLUMNS, rows)


def change_table(measurement: Measurement) -> TableBlock | None:
    """All change series at every learning rate."""
    change = measurement.change
    if change is None:
        return None
    has_second = any(p.get("second_order") for s in (change, *change.get("others", [])) for p in s["points"])
    columns = [
        Column("Quantity", "def-entropy"),
        Column("Learning rate", numeric=True),
        Column("True change", "def-true-change", numeric=True, with_error=True),
        Column("First order", "def-linear-change", numeric=True, with_error=True),
        *([Column("Second order", "def-second-order", numeric=True, with_error=True)] if has_second else []),
        Column("Unit"),
        Column("Effective sample size", "def-ess", numeric=True),
        Column("Pareto-k", "def-pareto-k", numeric=True),
    ]
    rows = []
    for series in (change, *change.get("others", [])):
        for point in series["points"]:
            second = point.get("second_order")
            rows.append(
                [
                    text_cell(text.series_label(series)),
                    Cell(shown=text.lr_text(point["lr"]), raw=point["lr"]),
                    estimate_cell(point["true"]),
                    estimate_cell(point["linear"]),
                    *([estimate_cell(second) if second else number_cell(None)] if has_second else []),
                    text_cell(point["true"].unit),
                    number_cell(point.get("effective_sample_size")),
                    number_cell(point.get("pareto_k"), 2),
                ]
            )
    caption = (
        "Every measured change with its standard error, clustered by prompt. First order: derivative along "
        "the step times the learning rate. ⚠ marks numbers flagged unreliable; the reason shows on hover "
        "and on focus."
    )
    return TableBlock("changes", "All measured changes", caption, columns, rows)


def difference_of(first: Estimate, second: Estimate) -> Estimate:
    """``second - first`` with the errors combined as independent."""
    return Estimate(
        value=second.value - first.value,
        stderr=math.hypot(first.stderr, second.stderr),
        n=min(first.n, second.n),
        unit=second.unit,
        method="difference, errors combined as independent",
        reliable=first.reliable and second.reliable,
        reason="; ".join(e.reason for e in (first, second) if not e.reliable),
    )


def comparison_table(
    names: tuple[str, str], figures: tuple[Mapping[str, Estimate], Mapping[str, Estimate]]
) -> TableBlock:
    """Two measurements side by side: every headline figure they share, with difference and combined error."""
    columns = [
        Column("Figure"),
        Column(f"A: {names[0]}", numeric=True, with_error=True),
        Column(f"B: {names[1]}", numeric=True, with_error=True),
        Column("B − A", numeric=True, with_error=True),
        Column("Unit"),
        Column("95 % of B − A", "def-estimate"),
        Column("Diagnostics", "def-trust"),
    ]
    rows = []
    for key, first in figures[0].items():
        if key not in figures[1]:
            continue
        second = figures[1][key]
        difference = difference_of(first, second)
        label = text.headline_label(key)
        rows.append(
            [
                text_cell(label.name, anchor=label.anchor),
                estimate_cell(first),
                estimate_cell(second),
                estimate_cell(difference),
                text_cell(first.unit if first.unit != "1" else "–"),
                interval_cell(difference),
                trust_cell(difference),
            ]
        )
    caption = (
        "Headline figures of both measurements, ± one standard error. The error of the difference treats "
        "the two measurements as independent; where they share prompts it is overstated."
    )
    return TableBlock("comparison", "Headline figures side by side", caption, columns, rows)


_SERIES: Mapping[str, str] = {
    "entropy_per_token": "Entropy, nats/token",
    "mean_reward": "Mean reward",
    "change_true_per_token": "True change of entropy, nats/token",
    "change_linear_per_token": "First order, nats/token",
    "linearity_slope": "Slope, log-log",
    "share_sequences": "This batch's share of the step",
    "effective_rank": "Effective rank of the kernel",
    "noise_scale": "Noise scale, prompts",
}


_NOISE_METRICS: Mapping[str, str] = {
    "sgd": "loss gradient",
    "preconditioned": "loss gradient, optimizer's metric",
}


def noise_table(measurement: Measurement) -> TableBlock | None:
    """Noise scale of the gradient in each metric, and of the batch's effect on each quantity.

    Raises:
        RunFolderError: an entry of ``noise.json`` lacks a figure.
    """
    noise = measurement.noise
    if noise is None:
        return None
    named = {label: noise[key] for key, label in _NOISE_METRICS.items() if key in noise}
    for key, record in noise.get("effects", {}).items():
        named[f"effect on {key.replace('_', ' ')}"] = record
    columns = (
        Column("Signal", "def-noise-scale"),
        Column("Noise scale, prompts", "def-noise-scale", numeric=True, with_error=True),
        Column("at least", "def-noise-scale", numeric=True),
        Column("at most", "def-noise-scale", numeric=True),
        Column("in sequences", numeric=True, with_error=True),
        Column("Noise share of this batch", numeric=True),
        Column("Within prompts", "def-noise-parts", numeric=True, with_error=True),
        Column("Between prompts", "def-noise-parts", numeric=True, with_error=True),
        Column("n", "def-n", numeric=True),
        Column("Diagnostics", "def-trust"),
    )
    rows = []
    for label, record in named.items():
        where = f"{measurement.path / 'noise.json'}: {label}"
        prompts, sequences, within, between, total = (
            parse_estimate(record.get(key), f"{where}, {key}")
            for key in ("prompts", "sequences", "within_prompts", "between_prompts", "noise")
        )
        rows.append(
            (
                text_cell(label),
                estimate_cell(prompts),
                number_cell(record.get("at_least")),
                number_cell(prompts.high),
                estimate_cell(sequences),
                _share_cell(record.get("share_of_noise")),
                estimate_cell(_relative_to(within, total.value)),
                estimate_cell(_relative_to(between, total.value)),
                count_cell(prompts.n),
                trust_cell(prompts),
            )
        )
    caption = (
        "Noise scale: the batch at which noise and signal are equal, ± one standard error; no number where "
        "the signal is not resolved from zero. “At least” and “at most” are its 95 % limits. "
        "Within and between prompts: shares of the variance of one prompt group."
    )
    return TableBlock("noise", "", caption, columns, rows)


def _share_cell(share: float | None) -> Cell:
    value = float("nan") if share is None else float(share)
    return Cell(shown=text.percent(value), raw=value)


def _relative_to(part: Estimate, whole: float) -> Estimate:
    scale = 1 / whole if whole else float("nan")
    return part.scaled(scale, unit="1")


def series_table(measurements: Sequence[Measurement]) -> TableBlock | None:
    """The headline figures of several measurements, one row per checkpoint."""
    keys = [k for k in _SERIES if all(k in m.summary for m in measurements)]
    if len(measurements) < 2 or not keys:
        return None
    columns = [Column("Checkpoint")] + [
        Column(_SERIES[key], text.headline_label(key).anchor, numeric=True, with_error=True) for key in keys
    ]
    rows = [[text_cell(m.title), *(estimate_cell(m.summary[key]) for key in keys)] for m in measurements]
    caption = (
        "Headline figures of every measured checkpoint, ± one standard error; changes at the step's own "
        "learning rate; ⚠ marks unreliable ones."
    )
    return TableBlock("checkpoints", "", caption, columns, rows)

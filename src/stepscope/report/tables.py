"""Tables of the page: what they show, what they sort by, and what goes into their CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stepscope.report import text
from stepscope.stats import Estimate

GLOSSARY: Sequence[Mapping[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "templates/glossary.yaml").read_text(encoding="utf-8")
)
"""Definitions that figures of the page link to, in their order."""

ANCHORS = {column: entry["anchor"] for entry in GLOSSARY for column in entry.get("columns", ())}
"""Glossary entries of columns by their names."""


@dataclass(frozen=True)
class Column:
    """A column: its heading, its glossary entry, whether it is a number, and whether with an error."""

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
class Table:
    """One table of the page."""

    key: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Board:
    """A table that the script of the page draws, because its rows are many and few are looked at at once.

    Attributes:
        key: part of its element id.
        caption: below it.
        spec: ``filters`` (key, label, options as value and label, value chosen first; an empty value is no
            filter), ``columns`` (name, anchor, whether numeric, whether with an error) and ``rows``: values
            of the filters, then cells: a text, or a number and its standard error. ``notes`` are shown where
            the pointer rests on a text of the first column; ``sort`` is the column that orders the rows.
    """

    key: str
    caption: str
    spec: Mapping[str, Any]


def board_column(name: str, number: bool) -> dict[str, Any]:
    """A column of a board; numbers come with an error."""
    anchor = {"anchor": ANCHORS[name]} if name in ANCHORS else {}
    return {"name": name, **({"err": True} if number else {}), **anchor}


Value = Cell | Estimate | str | int | float | None


def table(key: str, title: str, caption: str, rows: Sequence[Mapping[str, Value]]) -> Table:
    """A table of rows that name their values by column; the glossary says which columns it defines.

    Args:
        key: part of its element id.
        title: above it.
        caption: below it.
        rows: of texts, whole numbers, numbers (None: not available), estimates and cells; all name the same
            columns, in their order.
    """
    cells = [[cell_of(value) for value in row.values()] for row in rows]
    columns = [
        Column(
            name,
            ANCHORS.get(name, ""),
            numeric=any(not isinstance(cell.raw, str) for cell in column),
            with_error=any(cell.stderr is not None for cell in column),
        )
        for name, column in zip(rows[0] if rows else (), zip(*cells, strict=True), strict=True)
    ]
    return Table(key, title, caption, columns, cells)


def cell_of(value: Value) -> Cell:
    """A value as a cell: texts as they are, numbers with three digits, estimates with error and flag."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, Estimate):
        flag = "" if value.reliable else value.reason or "flagged by the measurement"
        return Cell(text.bare(value), value.value, value.stderr, flag=flag)
    if isinstance(value, str):
        return Cell(value, value)
    if isinstance(value, int):
        return Cell(f"{value:,}", value)
    return number_cell(value)


def number_cell(value: float | None, digits: int = 3) -> Cell:
    """A bare number with so many digits."""
    number = math.nan if value is None else float(value)
    return Cell(text.number(number, digits), number)


def percent_cell(share: float | None) -> Cell:
    """A share as a percentage."""
    number = math.nan if share is None else float(share)
    return Cell(text.percent(number), number)


def lr_cell(lr: float) -> Cell:
    """A learning rate."""
    return Cell(text.lr_text(lr), lr)


def linked(words: str, anchor: str) -> Cell:
    """A text that leads to its glossary entry."""
    return Cell(words, words, anchor=anchor)


def trust_cell(value: Estimate) -> Cell:
    """A cell saying whether the number passed its diagnostics, and if not why; nothing on its size."""
    if value.reliable:
        return linked("passed", "def-trust")
    return Cell(shown="failed", raw=f"failed: {value.reason}", anchor="def-trust", note=value.reason)


def interval_cell(value: Estimate) -> Cell:
    """A cell with the 95 % interval, saying whether it leaves out 0."""
    shown = text.interval(value)
    if shown == text.NOT_AVAILABLE:
        return Cell(shown=shown, raw=shown)
    verdict = "resolved from zero" if value.resolved else "not resolved from zero"
    return Cell(shown=shown, raw=f"{value.low:.6g} to {value.high:.6g}: {verdict}", note=verdict)


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

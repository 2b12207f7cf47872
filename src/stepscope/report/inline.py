"""Pieces of the page for a notebook: its tables, its responses and its figures, without its scripts.

Colours of texts are the notebook's own, light or dark; a figure has those of the page for the theme that
plotly's default template is of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from stepscope.report import assets, text
from stepscope.report.page import templates
from stepscope.report.parts import Response, Section
from stepscope.report.style import Figure
from stepscope.report.tables import Board, Cell, Column, Table
from stepscope.results.brief import framed
from stepscope.results.views import Inline

ROWS = 12
"""Rows of a table that are shown."""

_WORDY = ("Method",)
"""Columns that have sentences in them."""

_TITLE = 34
"""Pixels that a figure's title takes, which the page has outside of it."""

_OWN = re.compile(r"\.(?:t|[np]\d|tokens|prompt|response|verdict|right|facts-line)\b")
"""Rules of the page's style sheet for responses and their tokens."""

_VARIABLES = (
    ".stepscope{--neg:36,140,208;--pos:226,112,30;--ink:currentColor;--green:#1a9a76;--purple:#b0639a;"
    "--muted:color-mix(in srgb,currentColor 65%,transparent);"
    "--rule:color-mix(in srgb,currentColor 25%,transparent);"
    "--sans:system-ui,sans-serif;--mono:ui-monospace,Menlo,Consolas,monospace}"
    ".stepscope details{margin:.5em 0}.stepscope summary{cursor:pointer}"
)
"""Those that its rules name, in colours that stand out on light and on dark."""


def sections_html(title: str, sections: Iterable[Section]) -> str:
    """Sentences, facts and the first rows of the tables of some sections; what is of a run is escaped."""
    shown = [(s, list(map(_without_words, [*s.tables, *_boards(s), *s.more_tables]))) for s in sections]
    names = [figure.key for s, _ in shown for figure in (*s.figures, *s.more_figures)]
    return framed(_rendered("sections", title=title, sections=shown, names=names, most=ROWS))


def responses_html(found: Sequence[Response]) -> Inline:
    """Responses as the page shows them, with the details of a token where the pointer rests on it."""
    words = "\n\n".join(
        f"{r.heading} ({r.facts})\n{r.prompt}\n{''.join(t.shown for t in r.tokens) or r.text}" for r in found
    )
    coloured = any(token.level for r in found for token in r.tokens)
    html = _rendered("responses", found=found, legend=coloured, s=Section("responses", ""))
    return Inline(framed(html, _token_style()), words)


def _rendered(part: str, **content: Any) -> str:
    macro = getattr(templates().get_template("inline.html.j2").module, part)
    return str(macro(**content))


@cache
def _token_style() -> str:
    lines = [line for line in assets.style().splitlines() if _OWN.match(line)]
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", "".join(lines))
    return _VARIABLES + "".join(f".stepscope :is({names.strip()}){{{rule.strip()}}}" for names, rule in rules)


def _without_words(found: Table) -> Table:
    """The table without its longest columns."""
    kept = [k for k, column in enumerate(found.columns) if column.name not in _WORDY]
    rows = [[row[k] for k in kept] for row in found.rows]
    return replace(found, columns=[found.columns[k] for k in kept], rows=rows)


def _boards(section: Section) -> list[Table]:
    return [] if section.board is None else [board_table(section.board)]


def board_table(board: Board) -> Table:
    """The rows that a board shows first, in its order."""
    spec = board.spec
    first = [found["first"] for found in spec["filters"]]
    rows = [
        cells
        for values, cells in spec["rows"]
        if all(value == wanted or not wanted for value, wanted in zip(values, first, strict=True))
    ]
    rows.sort(key=lambda cells: -abs((cells[spec["sort"]] or [0.0])[0] or 0.0))
    columns = [Column(c["name"], numeric="err" in c, with_error="err" in c) for c in spec["columns"]]
    return Table(board.key, "", board.caption, columns, [list(map(_cell, cells)) for cells in rows])


def _cell(value: Any) -> Cell:
    if isinstance(value, list):
        number, stderr = (float("nan") if v is None else float(v) for v in value)
        return Cell(text.plus_minus(number, stderr), number, stderr)
    return Cell(text.NOT_AVAILABLE if value is None else str(value), "" if value is None else str(value))


# ---- figures ----


def drawn(found: Figure) -> go.Figure:
    """A figure of the page as one of plotly: data and layout, with colours in place of their names."""
    colors = _palette(dark="dark" in str(pio.templates.default or ""))
    spec = _resolved({"data": list(found.spec["data"]), "layout": dict(found.spec["layout"])}, colors)
    axis = {
        "gridcolor": colors["grid"],
        "linecolor": colors["muted"],
        "tickcolor": colors["muted"],
        "zerolinecolor": colors["muted"],
        "zeroline": False,
        "zerolinewidth": 1,
        "showline": True,
        "ticks": "outside",
        "automargin": True,
    }
    margin = {"l": 64, "r": 14, "t": 40, "b": 46}
    layout: dict[str, Any] = {
        "template": "none",
        "paper_bgcolor": colors["paper"],
        "plot_bgcolor": colors["paper"],
        "hovermode": "closest",
        "font": {"size": 12, "color": colors["ink"]},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        "hoverlabel": {"align": "left", "bgcolor": colors["panel"], "font": {"color": colors["ink"]}},
        **spec["layout"],
    }
    for name in {"xaxis", "yaxis", *(key for key in layout if re.fullmatch(r"[xy]axis\d*", key))}:
        layout[name] = {**axis, **layout.get(name, {})}
    margin |= layout.get("margin", {})
    layout["margin"] = {**margin, "t": margin["t"] + _TITLE}
    layout["height"] = found.height + _TITLE
    layout["title"] = {"text": found.title, "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98}
    layout["meta"] = {"caption": found.caption}
    return go.Figure(data=spec["data"], layout=layout)


@cache
def _palette(*, dark: bool) -> dict[str, str]:
    """The colours of the page's style sheet by name."""
    sheet = (Path(assets.__file__).parent / "scripts/style.css").read_text(encoding="utf-8")
    light, night = re.findall(r"^:root[^{]*\{(.*?)\}", sheet, re.M | re.DOTALL)[:2]
    return dict(re.findall(r"--([a-z-]+): ([^;]+);", light + (night if dark else "")))


def _resolved(value: Any, colors: dict[str, str]) -> Any:
    if isinstance(value, str):
        return re.sub(r"^var\(--([a-z-]+)\)$", lambda found: colors[found[1]], value)
    if isinstance(value, list | tuple):
        return [_resolved(item, colors) for item in value]
    if isinstance(value, dict):
        return {key: _resolved(item, colors) for key, item in value.items()}
    return value

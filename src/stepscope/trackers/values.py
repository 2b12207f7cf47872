"""An entry as the values of a log call, for trackers with W&B's classes: Histogram, Table, Html."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stepscope.trackers.entry import FIGURE_COLUMNS, Entry, Responses, figure_rows
from stepscope.trackers.texts import clean, coloured_html, prompt_of

BINS = 64


def values_of(entry: Entry, library: Any) -> dict[str, Any]:
    """The entry by name: numbers, histograms, the table of figures, and responses as a table and as HTML.

    Args:
        entry: what to show.
        library: the module of the tracker, with ``Histogram``, ``Table`` and ``Html``.
    """
    found: dict[str, Any] = dict(entry.named_scalars())
    for name, values in entry.named_histograms():
        counts = np.histogram(values, bins=BINS)
        found[name] = library.Histogram(np_histogram=counts)
    if entry.figures:
        rows = [[_finite(cell) for cell in row] for row in figure_rows(entry.figures)]
        found[entry.name("figures")] = library.Table(columns=list(FIGURE_COLUMNS), data=rows)
    if entry.responses is not None and entry.responses.shown:
        found[entry.name("responses")] = library.Html(coloured_html(entry.responses), inject=False)
        columns, rows = _rows(entry.responses)
        found[entry.name("responses_table")] = library.Table(columns=columns, data=rows)
    return found


def _rows(responses: Responses) -> tuple[list[str], list[list[Any]]]:
    facts = list(dict.fromkeys(name for response in responses.shown for name in response.facts))
    rows = [
        [
            prompt_of(response),
            clean(response.text),
            len(response.tokens),
            float(np.nansum(response.values)),
            *(_finite(response.facts.get(name)) for name in facts),
        ]
        for response in responses.shown
    ]
    return ["prompt", "response", "tokens", f"sum of {responses.what}", *facts], rows


def _finite(value: Any) -> Any:
    """None for a number that is none: tables are JSON."""
    if isinstance(value, str):
        return clean(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value

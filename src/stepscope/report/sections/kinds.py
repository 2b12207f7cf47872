"""Kinds of token: what the digits, words, tags of the batch change the quantity by."""

from __future__ import annotations

from collections.abc import Mapping

from stepscope.reading.answer import token_classes
from stepscope.reading.measurement import Measurement
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Value, interval_cell, percent_cell, table
from stepscope.report.units import unit_of


def section(measurement: Measurement, room: Room) -> Section | None:
    """The change by kind of token with its error; None where tokens have no influence."""
    return _classes(measurement, "kind", "kinds", "Kinds of token", "Kind of token", "all tokens of a kind")


def roles(measurement: Measurement, room: Room) -> Section | None:
    """The change by chosen, rejected and sampled responses, where the loss is one of preferences."""
    what = "all tokens of the chosen, of the rejected and of the sampled responses"
    return _classes(measurement, "role", "roles", "Pairs and samples", "Responses", what)


def _classes(
    measurement: Measurement, way: str, key: str, title: str, column: str, what: str
) -> Section | None:
    """A table of classes of tokens, the largest first."""
    found = token_classes(measurement, way)
    if not found:
        return None
    unit = unit_of(measurement.change)
    every, size = sum(part.tokens for part in found), sum(part.size for part in found)
    rows: list[Mapping[str, Value]] = [
        {
            column: part.name,
            "Tokens": part.tokens,
            "Of all tokens": percent_cell(part.tokens / every),
            f"Change of the {unit.quantity}, {unit.label}": unit.change(part.value),
            "95 % interval": interval_cell(unit.change(part.value)),
            "Of all |influence|": percent_cell(part.size / size if size else None),
        }
        for part in sorted(found, key=lambda part: -part.size)
    ]
    caption = (
        f"What {what} change together through this step, to first order. Errors are over folds of the probe; "
        "where a measurement has none, at most the sum of the tokens' errors, which is what is given."
    )
    return Section(key, title, tables=[table(key, "", caption, rows)])

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
    found = token_classes(measurement, "kind")
    if not found:
        return None
    unit = unit_of(measurement.change)
    every, size = sum(part.tokens for part in found), sum(part.size for part in found)
    rows: list[Mapping[str, Value]] = [
        {
            "Kind of token": part.name,
            "Tokens": part.tokens,
            "Of all tokens": percent_cell(part.tokens / every),
            f"Change of the {unit.quantity}, {unit.label}": unit.change(part.value),
            "95 % interval": interval_cell(unit.change(part.value)),
            "Of all |influence|": percent_cell(part.size / size if size else None),
        }
        for part in sorted(found, key=lambda part: -part.size)
    ]
    caption = (
        "What all tokens of a kind change together through this step, to first order. The error of a sum is "
        "at most the sum of its tokens' errors, which is what is given."
    )
    return Section("kinds", "Kinds of token", tables=[table("kinds", "", caption, rows)])

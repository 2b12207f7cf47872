"""Whether the answer can be trusted: a line for each thing that could make it wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.parts import Room, Section
from stepscope.report.sections.headline import headline_label
from stepscope.report.tables import Cell, Value, linked, table
from stepscope.report.units import unit_of
from stepscope.results.change import ChangePoint, Changes

_SURE = 0.7
"""Rank correlation between probes from which an order is worth reading."""

_ENOUGH = 0.5
"""Share of the probe's responses that importance weights leave at least."""


def section(measurement: Measurement, room: Room) -> Section | None:
    """The checks as a table; None where there is nothing to check."""
    rows = [
        *_change_rows(measurement),
        *_order_rows(measurement),
        *_validation_rows(measurement),
        *_sampler_rows(measurement),
        *_log_rows(measurement),
        _figures_row(measurement),
    ]
    caption = (
        "✓ passed; ○ a reason to doubt, or something that this measurement cannot say. Whether a number "
        "passed its diagnostics and whether it is resolved from zero are two questions: a number may be "
        "sound and small."
    )
    return Section("trust", "Is it trustworthy", tables=[table("trust", "", caption, rows)])


def _row(
    check: str, anchor: str, found: str, good: bool, means: str, words: tuple[str, str] = ("passed", "doubt")
) -> Mapping[str, Value]:
    return {
        "Check": linked(check, anchor),
        "Found": found,
        "Verdict": Cell(f"{'✓' if good else '○'} {words[not good]}", words[not good]),
        "What it means": means,
    }


def _change_rows(measurement: Measurement) -> list[Mapping[str, Value]]:
    change = measurement.change
    point = _own(change) if change else None
    if change is None or point is None:
        return []
    unit = unit_of(change)
    excess, count = unit.change(point.excess), point.true.n
    left = point.effective_sample_size / max(1, count)
    return [
        _row(
            "Diagnostics of the true change",
            "def-trust",
            point.true.reason or f"passed, over {count} prompts",
            point.true.reliable,
            "the estimate and its error behave as they should",
        ),
        _row(
            "Resolved from zero",
            "def-estimate",
            f"{text.interval(unit.change(point.true))} {unit.times}",
            point.true.resolved,
            "its sign is known" if point.true.resolved else "its sign is not known: take more probe prompts",
            ("resolved", "not resolved"),
        ),
        _row(
            "Effective sample size of the importance weights",
            "def-ess",
            text.percent(left),
            left >= _ENOUGH,
            "the step moves the policy little enough for one set of responses",
        ),
        _row(
            "First order against truth",
            "def-second-order",
            f"true less first order ({text.bare(excess)}) {unit.times}",
            not excess.resolved,
            "influences, which are first order, add up to what happens"
            if not excess.resolved
            else "influences are first order; the step does this much besides",
        ),
    ]


def _own(change: Changes) -> ChangePoint | None:
    return next((p for p in change.points if math.isclose(p.lr, change.lr, rel_tol=1e-6)), None)


def _order_rows(measurement: Measurement) -> list[Mapping[str, Value]]:
    rows = []
    for level in ("tokens", "sequences"):
        known = measurement.summary.get(f"rank_reliability_{level}")
        needed = measurement.summary.get(f"probe_needed_{level}")
        if known is not None:
            more = f"; .9 takes {text.bare(needed)} prompts" if needed is not None and needed.reliable else ""
            rows.append(
                _row(
                    f"Order of {level} by influence",
                    "def-reliability",
                    f"{text.bare(known)} between two probes{more}",
                    known.reliable and known.value >= _SURE,
                    "rank correlation that another probe of this size would have with this one",
                )
            )
    return rows


def _validation_rows(measurement: Measurement) -> list[Mapping[str, Value]]:
    return [
        _row(
            f"Steps made again without some responses, {key.replace('_', ' ')}",
            "def-lds",
            f"correlation {text.bare(found.lds)}",
            found.lds.reliable and found.lds.value >= _SURE,
            "influence predicts what leaving out does",
        )
        for key, found in (measurement.validation or {}).items()
    ]


def _sampler_rows(measurement: Measurement) -> list[Mapping[str, Value]]:
    report = measurement.sampler
    if report is None or not report.batches:
        return []
    return [
        _row(
            f"Sampler against policy, {name} batch",
            "def-sampler",
            found.doubt or "no further apart than rounding",
            not found.doubt,
            "the responses are the policy's own",
        )
        for name, found in report.batches.items()
    ]


def _log_rows(measurement: Measurement) -> list[Mapping[str, Value]]:
    found = (measurement.provenance or {}).get("entropy_logged")
    if not isinstance(found, Mapping) or "doubt" not in found:
        return []
    return [
        _row(
            "Entropy against the training's own log",
            "def-entropy",
            str(found["doubt"]) or f"{text.number(found['value'])} nats per token logged, not far apart",
            not found["doubt"],
            "prompts are asked as the training asks them",
        )
    ]


def _figures_row(measurement: Measurement) -> Mapping[str, Value]:
    failed = [headline_label(key).name for key, value in measurement.summary.items() if not value.reliable]
    count = len(measurement.summary)
    return _row(
        "Headline figures that passed their diagnostics",
        "def-trust",
        f"{count - len(failed)} of {count}",
        not failed,
        f"failed: {'; '.join(failed)}" if failed else "all of them",
    )

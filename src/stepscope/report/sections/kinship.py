"""What the tokens of the step act on: their own position, response, prompt, or other prompts."""

from __future__ import annotations

import math
from typing import Any

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, interval_cell, table, trust_cell
from stepscope.report.units import unit_for
from stepscope.results.kinship import BATCH, FORMULAS, KINS, LOOKS, StepKinship


def section(measurement: Measurement, room: Room) -> Section | None:
    """Sentences, a figure and the table of shares; None where the stage was not run."""
    found = measurement.kinship
    if found is None:
        return None
    return Section(
        "kinship",
        "What the tokens act on",
        sentences=_sentences(found),
        intro="The entropy at given positions, to first order. A position is its context: the prompt and the "
        f"response up to there. {found.drawn:,} of {found.tokens:,} distinct tokens were looked at for their "
        "own position; the rest is not sampled. Intervals take the batch's prompts for a sample.",
        figures=[_figure(found)],
        tables=[_shares(found)],
    )


def _sentences(found: StepKinship) -> list[str]:
    said = []
    for look, total in found.totals.items():
        moved = total.scaled(found.lr, unit="nats/token")
        fell = moved.value < 0
        size = text.estimate(moved.scaled(-1.0) if fell else moved)
        line = (
            f"At {_where(look)} the tokens of this step {'lower' if fell else 'raise'} the entropy by {size}"
        )
        rows = [row for row in found.kin if row.look == look]
        if not all(row.share.reliable for row in rows):
            said.append(f"{line}; no shares of it are named ({rows[0].share.reason}).")
            continue
        parts = [f"{text.percent(row.share.value)} at {KINS[row.kin]}" for row in rows]
        other = found.of_prompts != found.num_prompts
        of = f"; of what a batch of {found.of_prompts} prompts does," if other else ":"
        said.append(f"{line}{of} {text.joined(parts)}.")
    theory = [f"{text.bare(value)} ({FORMULAS[name]})" for name, value in found.theory.items()]
    return [*said, f"Tabular theory goes with the own position, token by token, at {text.joined(theory)}."]


def _where(look: str) -> str:
    return "the batch's own positions" if look == BATCH else LOOKS[look].replace("batches'", "batch's")


def _figure(found: StepKinship) -> style.Figure:
    """The change by kin, a curve for each place."""
    sizes = [found.lr * max(abs(row.influence.value), row.influence.stderr) for row in found.kin]
    unit = unit_for(found.lr, max(filter(math.isfinite, sizes), default=0.0), "entropy", "nats/token")
    traces = [
        style.curve(
            _where(look),
            [KINS[row.kin] for row in found.kin if row.look == look],
            [unit.influence(row.influence) for row in found.kin if row.look == look],
            looks,
            f"%{{x}}, {_where(look)}: %{{y:.4g}} {style.BARS} {unit.times}",
            mode="markers",
        )
        for look, looks in zip(found.totals, style.LOOKS, strict=False)
    ]
    caption = (
        "What the tokens of this step do to the entropy, by what they act on, at learning rate "
        f"{text.lr_text(found.lr)}: the batch of {found.num_prompts} prompts as it is, to first order. Error "
        "bars: 95 %, over prompts."
    )
    return style.figure(
        "kinship",
        "By what the tokens act on",
        caption,
        traces,
        xaxis=style.axis("", type="category"),
        yaxis=style.axis(f"change of the entropy, {unit.label}", zeroline=True),
    )


def _shares(found: StepKinship) -> Table:
    rows: list[dict[str, Any]] = [
        {
            "Where": _where(row.look),
            "Acted on": KINS[row.kin],
            "Change": row.influence.scaled(found.lr, unit="nats/token"),
            "Share": row.share,
            "95 % interval": interval_cell(row.share),
            "For one pair": row.per_pair.scaled(found.lr, unit="nats/token"),
            "Pairs": row.pairs,
            "Trust": trust_cell(row.share),
        }
        for row in found.kin
    ]
    return table(
        "kinship",
        "By what the tokens act on",
        f"Change in nats/token at learning rate {text.lr_text(found.lr)}; shares are of the same place, for "
        f"a batch of {found.of_prompts} prompts; intervals are of the shares.",
        rows,
    )

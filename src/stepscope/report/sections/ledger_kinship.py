"""What the tokens acted on: their own position, response, prompt, or other prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from stepscope.reading.ledger import LedgerFolder
from stepscope.report import style, text
from stepscope.report.parts import Section
from stepscope.report.sections.ledger import share_words
from stepscope.report.style import Figure
from stepscope.report.tables import Cell, Table, interval_cell, table
from stepscope.results.kinship import (
    BATCH,
    FORMULAS,
    FRESH,
    HELD_OUT,
    KINS,
    LOOKS,
    SAME_POSITION,
    KinRows,
    KinShare,
    Kinship,
)
from stepscope.stats import Estimate

_COLORS = (style.OCHRE, style.PURPLE, style.GREEN, style.BROWN)
_PATTERNS = ("", "x", "/", "")


def headline(found: Kinship) -> list[str]:
    """Kinship in plain words."""
    batch, held_out = found.total(BATCH).influence, found.total(HELD_OUT).influence
    lines = [
        f"At {LOOKS[BATCH]} {_moved(batch)}, added up over the batches{_accounts(batch, _of(found, BATCH))}",
        f"On {LOOKS[FRESH]} it {_moved(found.total(FRESH).influence, short=True)}"
        f"{_accounts(found.total(FRESH).influence, _of(found, FRESH))}",
    ]
    theory = found.share(BATCH, SAME_POSITION).against_held_out
    line = (
        f"On {LOOKS[HELD_OUT]} it {_moved(held_out, short=True)}: none of that is at a token's own position"
    )
    if held_out.resolved:
        line += (
            ", which is all that tabular theory has; what tokens did there, at the batches' own positions, "
            f"is {share_words(theory)} of it"
        )
    return [*lines, f"{line}."]


def _moved(change: Estimate, *, short: bool = False) -> str:
    by = f"{text.estimate(change.scaled(-1.0) if change.value < 0 else change)}"
    if short:
        return (
            f"{'fell' if change.value < 0 else 'rose'} by {by}{'' if change.resolved else ', not resolved'}"
        )
    verb = "lowered" if change.value < 0 else "raised"
    return f"the tokens {verb} the entropy by {by}{'' if change.resolved else ', not resolved'}"


def _accounts(whole: Estimate, shares: Iterable[KinShare]) -> str:
    """The shares, where there is something to share."""
    if not whole.resolved:
        return ", so no shares of it are named."
    parts = [f"{share_words(row.share)} at {KINS[row.kin]}" for row in shares]
    parts[0] = parts[0].replace("its own position", "a token's own position")
    return f", of which {text.joined(parts)}."


def _of(found: Kinship, look: str, steps: str = "all") -> list[KinShare]:
    return [row for row in found.shares if (row.look, row.steps) == (look, steps)]


def section(found: LedgerFolder) -> Section | None:
    """Sentences, contributions by step, and the tables; None where kinship was not asked for."""
    kinship, rows = found.kinship, found.kin_rows
    if kinship is None or rows is None:
        return None
    return Section(
        "kinship",
        "What the tokens acted on",
        sentences=headline(kinship),
        intro=f"The entropy at given positions, to first order from where each of {len(kinship.steps)} steps "
        "starts (each stands for its neighbours). A position is its context: the prompt and the response up "
        f"to there. {kinship.drawn:,} of {kinship.tokens:,} distinct tokens were looked at for their own "
        "position; the rest is not sampled. Intervals take the training's prompts for a sample, too.",
        figures=[_by_step(rows)],
        tables=[_shares(kinship), *_windows(kinship), _theory(kinship)],
    )


def _by_step(rows: KinRows) -> Figure:
    own = rows.where(rows.look == BATCH).to_pandas()
    traces: list[Any] = []
    for k, (kin, words) in enumerate(KINS.items()):
        sums = own[own.kin == kin].groupby("step").influence.sum()
        if not len(sums):
            continue
        traces.append(
            go.Bar(
                name=words,
                x=sums.index.tolist(),
                y=style.rounded(sums),
                marker={"color": _COLORS[k], "pattern": {"shape": _PATTERNS[k], "size": 5}},
                hovertemplate=f"batch of step %{{x}}, {words}: %{{y:.3g}}<extra></extra>",
            )
        )
    return style.figure(
        "kinship",
        "What each batch did at its own positions, by what its tokens acted on",
        "Bars of one step add up to what its tokens did to the mean entropy of the batch's own positions, "
        "over the rest of the training.",
        traces,
        height=340,
        barmode="relative",
        bargap=0.15,
        xaxis=style.axis("optimizer step"),
        yaxis=style.axis("nats/token", zeroline=True),
    )


def _shares(found: Kinship) -> Table:
    rows: list[dict[str, Any]] = []
    for row in found.shares:
        if row.steps == "all":
            rows.append(
                {
                    "Where": LOOKS[row.look],
                    "Acted on": KINS[row.kin],
                    "Influence": row.influence,
                    "95 % interval": interval_cell(row.influence),
                    "Share": _share(row.share),
                    "Of held-out": _share(row.against_held_out),
                    "Own step": row.own_step,
                    "Pairs": row.pairs,
                }
            )
    return table(
        "kin",
        "By what the tokens acted on",
        "Influence in nats/token, over the rest of the training; shares are of the same place, and of what "
        "the tokens did to held-out prompts (on policy). The ledger's entries of the same tokens, with "
        f"gradients along the rest of the path, add up to {text.bare(found.ledger_tokens)}; here "
        f"{text.bare(found.total(HELD_OUT).influence)}.",
        rows,
    )


def _windows(found: Kinship) -> list[Table]:
    thirds = list(dict.fromkeys(row.steps for row in found.shares if row.steps != "all"))
    if not thirds:
        return []
    rows: list[dict[str, Any]] = []
    for look in (BATCH, FRESH):
        for row in _of(found, look):
            shares = {name: _share(_one(found, look, row.kin, name)) for name in thirds}
            rows.append(
                {
                    "Where": LOOKS[look],
                    "Acted on": KINS[row.kin],
                    **{name.capitalize(): cell for name, cell in shares.items()},
                }
            )
    return [table("kin-thirds", "Early and late", "Shares of the same place, with 95 % intervals.", rows)]


def _one(found: Kinship, look: str, kin: str, steps: str) -> Estimate:
    return found.share(look, kin, steps).share


def _theory(found: Kinship) -> Table:
    rows: list[dict[str, Any]] = [
        {
            "Formula": FORMULAS[theory.formula],
            "With the own position, by token": theory.at_tokens,
            **{f"{LOOKS[look].capitalize()}, by step": value for look, value in theory.at_steps.items()},
        }
        for theory in found.theory
    ]
    return table(
        "kin-theory",
        "What tabular theory says",
        "Correlations about 0 of the formula's values with what the tokens did: at their own position, token "
        "by token, and in all, step by step.",
        rows,
    )


def _share(value: Estimate) -> Cell:
    ends = f"{text.percent(value.low)} to {text.percent(value.high)}"
    return Cell(text.percent(value.value), value.value, note=ends)

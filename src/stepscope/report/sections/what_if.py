# ruff: noqa: RUF001 (typographic signs are meant)
"""What if the tokens of a rule had been left out: curves as they were, predicted and trained again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepscope.reading.ledger import LedgerFolder, WhatIfFolder
from stepscope.report import style, text
from stepscope.report.parts import Section
from stepscope.report.style import Figure
from stepscope.report.tables import Value, interval_cell, table
from stepscope.results.ledger import Account
from stepscope.results.what_if import AGAIN, HELD, RECORDED, REWEIGHTED, Outcome, WhatIfCurves
from stepscope.stats import Estimate

_NAMES = {
    HELD: "predicted, gradients held",
    REWEIGHTED: "predicted, responses reweighted",
    AGAIN: "trained again",
}
_DASHES = {HELD: "dot", REWEIGHTED: "solid"}


def section(found: LedgerFolder, account: Account, *, first: bool) -> Section | None:
    """The what-ifs of a ledger for one quantity; None where there is none.

    Args:
        found: the ledger.
        account: of the quantity.
        first: also show the quantities that have no account of their own.
    """
    accounts = {each.quantity for each in found.ledger.accounts}
    figures, rows, lines = [], [], []
    for number, (rule, each) in enumerate(found.what_if.items()):
        for quantity in dict.fromkeys(outcome.quantity for outcome in each.result.outcomes):
            if quantity != account.quantity and (not first or quantity in accounts):
                continue
            outcomes = [o for o in each.result.outcomes if o.quantity == quantity]
            figures.append(_figure(each, outcomes, f"what-if-{number}-{quantity}"))
            rows += [_row(rule, outcome) for outcome in outcomes]
            lines.append(_sentence(rule, outcomes[-1], each.result.last_step))
    if not figures:
        return None
    return Section(
        "what-if",
        "What if",
        sentences=lines,
        intro="The training without some of its tokens, their weight times 1 less the dose. Predicted twice: "
        "with every gradient held where it was taken, and with the recorded responses reweighted to what the "
        "shifted policy would have said. Neither knows prompts that would have been drawn instead, nor the "
        "luck of other samples: one training again is one draw of these.",
        figures=figures,
        tables=[
            table(
                "what-ifs",
                "By the last step",
                "Differences from the training as it was; ± is one standard error, paired by probe prompt. "
                "By entries: −dose times the sum of the ledger's entries. A prediction agrees up to the step "
                "before which the interval of its gap to the training again has 0 in it, or the gap is below "
                "half of the realised difference, at every place.",
                rows,
            )
        ],
    )


def of_rule(each: WhatIfFolder) -> Section:
    """The what-if of one rule, for all its quantities."""
    by_quantity: dict[str, list[Outcome]] = {}
    for outcome in each.result.outcomes:
        by_quantity.setdefault(outcome.quantity, []).append(outcome)
    rule, last = each.result.rule, each.result.last_step
    return Section(
        "what-if",
        "",
        sentences=[_sentence(rule, own[-1], last) for own in by_quantity.values()],
        figures=[_figure(each, own, f"what-if-{name}") for name, own in by_quantity.items()],
        tables=[table("what-ifs", "", "", [_row(rule, o) for o in each.result.outcomes])],
    )


def _sentence(rule: str, outcome: Outcome, last: int) -> str:
    name = text.quantity_name(outcome.quantity)
    said = (
        f"Without {rule} (dose {outcome.dose:g}), {name} after step {last} would have been "
        f"{_signed(outcome.reweighted)} {outcome.unit} away from what it was"
    )
    where = "as the reweighted responses have it"
    if outcome.trusted < last:
        where += f", which say little of it after step {outcome.trusted}"
    if outcome.retrained is None:
        return f"{said}, {where}."
    return f"{said}, {where}; trained again it is {_signed(outcome.retrained)}."


def _signed(value: Estimate) -> str:
    shown = text.bare(value)
    return shown if shown.startswith("−") else f"+{shown}"


def _figure(each: WhatIfFolder, outcomes: Sequence[Outcome], key: str) -> Figure:
    quantity, unit = outcomes[0].quantity, outcomes[0].unit
    was = each.curves.of(quantity, 0.0, RECORDED)
    traces: list[Any] = [
        style.curve(
            "as it was",
            was.step.tolist(),
            was.level.tolist(),
            style.Look(style.INK),
            "after step %{x}: %{y:.4g} as it was",
            mode="lines",
            width=2.5,
        )
    ]
    for k, outcome in enumerate(outcomes):
        color = style.look(k).color
        for path in (HELD, REWEIGHTED, AGAIN):
            own = each.curves.of(quantity, outcome.dose, path)
            if not len(own):
                continue
            name = f"dose {outcome.dose:g}, {_NAMES[path]}"
            predicted = path != AGAIN
            traces.append(
                style.curve(
                    name,
                    own.step.tolist(),
                    (was.level + own.difference).tolist() if predicted else _points(was, own, unit),
                    style.Look(color, style.look(k).symbol, _DASHES.get(path, "solid")),
                    f"after step %{{x}}: %{{y:.4g}} {name}{'' if predicted else ' ' + style.BARS}",
                    mode="lines" if predicted else "markers",
                    size=7,
                )
            )
    result = each.result
    share = text.percent(result.weight)
    return style.figure(
        key,
        f"{text.quantity_name(quantity).capitalize()} without {result.rule}",
        f"{result.tokens:,} of {result.all_tokens:,} tokens, {share} of the absolute weight. Lines are "
        "predictions, marks a training again from the same start and seeds; bars are 95 % intervals of the "
        f"difference from the training as it was, {result.num_prompts} probe prompts with {result.samples} "
        "responses each, drawn by the same uniform numbers on every path.",
        traces,
        height=440,
        xaxis=style.axis("optimizer step"),
        yaxis=style.axis(unit or text.quantity_name(quantity)),
    )


def _points(was: WhatIfCurves, own: WhatIfCurves, unit: str) -> list[Estimate]:
    """Levels of a path with the errors of its difference from the recorded one."""
    return [
        Estimate(level + d, e, 0, unit, "paired", low=level + low, high=level + high)
        for level, d, e, low, high in zip(
            was.level.tolist(),
            own.difference.tolist(),
            own.difference_stderr.tolist(),
            own.difference_low.tolist(),
            own.difference_high.tolist(),
            strict=True,
        )
    ]


def _row(rule: str, outcome: Outcome) -> dict[str, Value]:
    real = outcome.retrained
    return {
        "Rule": rule,
        "Quantity": text.quantity_name(outcome.quantity),
        "Dose": outcome.dose,
        "By entries": outcome.first_order,
        "Held": outcome.held,
        "Reweighted": outcome.reweighted,
        "Trained again": real,
        "95 % interval": None if real is None else interval_cell(real),
        "Reweighted to be read to step": outcome.trusted,
        "Held agrees to step": outcome.horizons.get(HELD),
        "Reweighted agrees to step": outcome.horizons.get(REWEIGHTED),
    }

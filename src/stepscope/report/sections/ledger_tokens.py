"""Tokens of a training with what stands around them, for the reader to choose by step and class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from stepscope.reading.rollups import Entries
from stepscope.report import text
from stepscope.report.parts import Excerpts, Response, Section, TokenSpan
from stepscope.report.sections.ledger import WAY
from stepscope.report.sections.responses import level_of, visible
from stepscope.report.tables import Cell, table

BEFORE, AFTER = 24, 10
"""Tokens shown before and after."""

_PROMPT = 300
"""Characters of a prompt shown."""

_EACH = 12
_TOP = 30


def section(entries: Entries, unit: str, most: int) -> Section:
    """The largest tokens of every step and class, in their responses, and the largest of all.

    Args:
        entries: of the quantity.
        unit: of it.
        most: tokens shown in all.
    """
    return Section(
        "tokens",
        "Tokens in their responses",
        legend=True,
        excerpts=Excerpts(
            "excerpts",
            f"The tokens with the largest entries, in {unit}, each in its response ({BEFORE} tokens before "
            f"and {AFTER} after); those of the step and class chosen, the largest first.",
            _spec(entries, most),
        ),
        tables=[_top(entries, unit)],
    )


def as_responses(entries: Entries, most: int) -> Section:
    """The largest tokens, each with what stands around it in its response.

    Args:
        entries: of the quantity.
        most: tokens shown in all.
    """
    rows = sorted(_spec(entries, most)["rows"], key=lambda row: -abs(row[2]))
    found = [
        Response(
            heading=f"{visible(tokens[place][0])} in step {step}, {label}",
            facts=facts,
            correct=None,
            prompt=prompt,
            text="",
            tokens=[
                TokenSpan(shown, level, "this token" if k == place else "")
                for k, (shown, level) in enumerate(tokens)
            ],
        )
        for step, label, _, facts, prompt, place, tokens in rows
    ]
    return Section("tokens", "", legend=True, responses=found)


def _top(entries: Entries, unit: str) -> Any:
    found = entries.top(_TOP)
    table_of = entries.table
    rows = []
    for row in found.itertuples(index=False):
        window = _window(table_of, row.row, 12, 0)
        before = "".join(table_of.token.iloc[window[0] : row.row])
        rows.append(
            {
                "Token": Cell(visible(row.token), row.token),
                "Before it": visible(before),
                "Prompt": visible(row.prompt[-80:]),
                "Kind": row.kind,
                "Times": int(row.times),
                "Steps": str(row.first_step) if row.times == 1 else f"{row.first_step} to {row.last_step}",
                f"Influence, {unit}": Cell(
                    text.plus_minus(row.influence, row.stderr), float(row.influence), float(row.stderr)
                ),
            }
        )
    return table(
        "top-tokens",
        "The largest tokens",
        "The same token after the same prompt and prefix is one row, its entries added up; ± is one standard "
        "error over probe prompts.",
        rows,
    )


def _window(tokens: Any, row: int, before: int, after: int) -> tuple[int, int]:
    """Rows around one, of its response alone."""
    step, sequence = tokens.step.to_numpy(), tokens.sequence_id.to_numpy()
    start, stop = max(0, row - before), min(len(tokens), row + after + 1)
    same = (step[start:stop] == step[row]) & (sequence[start:stop] == sequence[row])
    own = np.flatnonzero(same)
    return start + int(own[0]), start + int(own[-1]) + 1


def _chosen(classes: Any, steps: Any, size: Any) -> Iterator[int]:
    """Rows to show: the largest of every class, then of every step, then of each class in each step."""
    order = np.argsort(-size, kind="stable")
    for most, names in (
        (_EACH, [classes]),
        (1, [steps]),
        (1, [steps, classes]),
        (3, [steps]),
        (3, [steps, classes]),
    ):
        taken: dict[Any, int] = {}
        columns = [name[order] for name in names]
        for place, row in enumerate(order):
            key = tuple(column[place] for column in columns)
            taken[key] = taken.get(key, 0) + 1
            if taken[key] <= most:
                yield int(row)


def _spec(entries: Entries, most: int) -> dict[str, Any]:
    tokens = entries.table
    classes = np.array(entries.labels(WAY), dtype=object)
    steps, influence = tokens.step.to_numpy(), tokens.influence.to_numpy()
    size = np.abs(influence)
    scale = float(size.max()) or 1.0
    texts = tokens.token.to_numpy()
    room, taken, rows = most, set(), []
    for row in _chosen(classes, steps, size):
        if row in taken:
            continue
        start, stop = _window(tokens, row, BEFORE, AFTER)
        room -= stop - start
        if room < 0:
            break
        taken.add(row)
        shown = tokens.iloc[row]
        facts = [
            f"step {steps[row]}",
            classes[row],
            str(shown.kind),
            f"p {text.number(float(shown.probability))}",
            f"entropy {text.number(float(shown.entropy))}",
            f"advantage {text.number(float(shown.advantage))}",
            f"influence {text.plus_minus(float(influence[row]), float(shown.stderr))}",
        ]
        rows.append(
            [
                int(steps[row]),
                classes[row],
                float(f"{influence[row]:.3g}"),
                ", ".join(facts),
                visible(shown.prompt[-_PROMPT:]),
                row - start,
                [[texts[k], level_of(influence[k], scale)] for k in range(start, stop)],
            ]
        )
    return {
        "steps": [int(step) for step in np.unique(steps)],
        "classes": entries.order(WAY),
        "rows": rows,
        "most": _EACH,
    }

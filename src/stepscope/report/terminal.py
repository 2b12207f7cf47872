"""The answer of a measurement in a terminal: the sentence, the waterfall, the largest tokens in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepscope.errors import RunFolderError, printable
from stepscope.reading.answer import TopToken, Waterfall, top_tokens, waterfall
from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.load import reads_artifacts
from stepscope.report.page import measured
from stepscope.report.units import Unit, unit_of
from stepscope.stats import Estimate

MOST = 5
"""Tokens shown of either kind."""

LOWERS, RAISES = "blue", "dark_orange"
WIDTH = 18
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Answer:
    """What a measurement says of the step at its own learning rate.

    Attributes:
        sentences: the change, in words.
        unit: that changes are printed in.
        waterfall: what it is made of; None where that was not measured.
        lowered: tokens that lowered the quantity most, the largest first.
        raised: those that raised it.
    """

    sentences: Sequence[str]
    unit: Unit
    waterfall: Waterfall | None
    lowered: Sequence[TopToken]
    raised: Sequence[TopToken]


@reads_artifacts
def answer_of(folder: Path, most: int = MOST) -> Answer:
    """The answer that a measurement's artifacts hold.

    Args:
        folder: of the measurement.
        most: tokens of either kind.

    Raises:
        RunFolderError: there is no measured change in it.
    """
    measurement = Measurement(folder)
    if measurement.change is None:
        raise RunFolderError(f"{folder}: no measured change in it; run the stages rollouts, step and change")
    lowered, raised = (top_tokens(measurement, most, sign) for sign in (-1, 1))
    return Answer(measured(folder), unit_of(measurement.change), waterfall(measurement), lowered, raised)


def as_record(answer: Answer, page: Path) -> Mapping[str, Any]:
    """The same as plain values, all of them changes of the quantity by this step."""
    found = answer.waterfall
    return {
        "sentence": " ".join(answer.sentences),
        "change": None if found is None else _record(found.change),
        "before": None if found is None else _record(found.before),
        "parts": []
        if found is None
        else [{"name": part.name, "tokens": part.tokens, **_record(part.value)} for part in found.parts],
        "lowered": [_token_record(token) for token in answer.lowered],
        "raised": [_token_record(token) for token in answer.raised],
        "page": str(page),
    }


def printed(answer: Answer, page: Path, *, file: IO[str]) -> None:
    """Print the answer: in colour where the file is a terminal, with tokens in ``[[ ]]`` where it is none."""
    console = Console(file=file, highlight=False, force_jupyter=False)
    for sentence in answer.sentences:
        console.print(Text(printable(sentence), style="bold"))
    if (found := answer.waterfall) is not None:
        console.print(_bars(found, answer.unit))
    for tokens, verb, colour in ((answer.lowered, "lowered", LOWERS), (answer.raised, "raised", RAISES)):
        if tokens:
            marked = not console.is_terminal
            console.print(_places(tokens, f"What {verb} it most", colour, answer.unit, marked=marked))
    console.print(Text("Changes by this step, ± one standard error; ○ not resolved from zero.", style="dim"))
    console.print(Text(f"page: {page}"), soft_wrap=True)


def _bars(found: Waterfall, unit: Unit) -> Table:
    rows = [*((part.name, part.value) for part in found.parts), ("the whole change", found.change)]
    largest = max((abs(value.value) for _, value in rows if math.isfinite(value.value)), default=0.0)
    table = Table(
        box=box.SIMPLE_HEAD, title="What the change is made of", title_justify="left", title_style=""
    )
    table.add_column("")
    table.add_column(unit.label, justify="right")
    table.add_column("95 %", justify="right")
    table.add_column("")
    for name, value in rows:
        length = round(WIDTH * abs(value.value) / largest) if largest and math.isfinite(value.value) else 0
        bar = Text("█" * length or "▏", style=LOWERS if value.value < 0 else RAISES)
        if not value.resolved:
            bar.append(" ○", style="dim")
        shown = unit.change(value)
        table.add_row(name, text.bare(shown), text.interval(shown), bar)
    return table


def _places(tokens: Sequence[TopToken], title: str, colour: str, unit: Unit, *, marked: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="")
    table.add_column("token, where it stands")
    table.add_column("times", justify="right")
    table.add_column(unit.label, justify="right")
    table.add_column("share", justify="right")
    for token in tokens:
        place = Text(_line(token.before), style="dim")
        shown = _line(token.token)
        place.append(f"[[{shown}]]" if marked else shown, style=f"bold reverse {colour}")
        place.append(_line(token.after), style="dim")
        value = text.bare(unit.change(token.value)) + ("" if token.value.resolved else " ○")
        table.add_row(place, f"x {len(token.places)}", value, text.percent(token.share))
    return table


def _line(words: str) -> str:
    """A text of unknown origin on one line, blanks kept, as a terminal can be shown it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words.replace("\n", "⏎"))


def _record(value: Estimate) -> dict[str, Any]:
    numbers = {name: getattr(value, name) for name in ("value", "stderr", "low", "high")}
    return {
        **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
        "unit": value.unit,
        "resolved": value.resolved,
        "reliable": value.reliable,
    }


def _token_record(token: TopToken) -> dict[str, Any]:
    places = [{"sequence": sequence, "position": position} for sequence, position in token.places]
    around = {"token": token.token, "before": token.before, "after": token.after}
    return {**around, "places": places, "share": token.share, **_record(token.value)}

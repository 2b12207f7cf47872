"""What there is to see of a source at a step, before any tracker has a look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stepscope.results import FloatArray
from stepscope.stats import Estimate

SHOWN = 6
"""Responses of an entry."""

MOST = 600
"""Tokens shown of a response."""

PROMPT = 1500
"""Characters shown of a prompt: its last ones."""


@dataclass(frozen=True)
class ShownResponse:
    """A response whose tokens have a number each.

    Attributes:
        prompt: as the policy was asked.
        tokens: texts of its tokens; joined up they are the response.
        values: (tok,) a number per token; nan where there is none.
        facts: what else is known of it, by name: reward, correct, step.
    """

    prompt: str
    tokens: Sequence[str]
    values: FloatArray
    facts: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The response."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Responses:
    """Some responses, all coloured on one scale.

    Attributes:
        what: what the numbers of the tokens are, with their unit.
        signed: whether they lower (blue) and raise (orange) something; without it one colour tells how large
            they are.
        shown: the responses.
    """

    what: str
    signed: bool
    shown: Sequence[ShownResponse]

    @property
    def scale(self) -> float:
        """The largest |value|, that of the strongest colour; 1 where there is none."""
        largest = [float(np.abs(v[np.isfinite(v)]).max(initial=0.0)) for v in (r.values for r in self.shown)]
        return max(largest, default=0.0) or 1.0

    def strengths(self, response: ShownResponse) -> FloatArray:
        """(tok,) of colour: -1 to 1, on a square-root scale; 0 where a token has no number."""
        values = np.where(np.isfinite(response.values), response.values, 0.0)
        return np.asarray(np.sign(values) * np.sqrt(np.abs(values) / self.scale), dtype=np.float64)


@dataclass(frozen=True)
class Entry:
    """What a source has to show at a step.

    Attributes:
        source: ``probe``, ``probe/NAME``, ``eval`` or ``ledger``; the first part of every name.
        step: optimizer step of the training that it belongs to.
        scalars: name to number; those that are not finite are left out.
        figures: name to estimate, for the one table that says how sure the numbers are.
        histograms: name to values; those that are not finite are left out.
        responses: coloured; None for none.
    """

    source: str
    step: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    histograms: Mapping[str, FloatArray] = field(default_factory=dict)
    responses: Responses | None = None

    def name(self, of: str) -> str:
        """The name under which trackers have it."""
        return f"stepscope/{self.source}/{of}"

    def named_scalars(self) -> Iterator[tuple[str, float]]:
        """The finite ones with their whole names."""
        return ((self.name(n), float(v)) for n, v in self.scalars.items() if np.isfinite(v))

    def named_histograms(self) -> Iterator[tuple[str, FloatArray]]:
        """The finite values with whole names; those that have none are left out."""
        for name, values in self.histograms.items():
            finite = values[np.isfinite(values)]
            if finite.size:
                yield self.name(name), finite


FIGURE_COLUMNS = ("figure", "value", "stderr", "low", "high", "unit", "reliable", "reason")
"""Columns of the table of figures."""


def figure_rows(figures: Mapping[str, Estimate]) -> list[list[str | float | bool]]:
    """The rows of the table of figures."""
    return [[n, e.value, e.stderr, e.low, e.high, e.unit, e.reliable, e.reason] for n, e in figures.items()]


def strongest(totals: FloatArray) -> list[int]:
    """Places of the sequences with the largest |total|, the largest first; at most :data:`SHOWN`."""
    order = np.argsort(-np.abs(np.nan_to_num(totals)), kind="stable")
    return [int(i) for i in order[:SHOWN]]

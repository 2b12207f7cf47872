"""``summary.json``: the headline figures of a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepscope.results.brief import html_figures
from stepscope.results.records import FlatRecord
from stepscope.stats import Estimate


@dataclass(frozen=True, repr=False)
class Summary(FlatRecord):
    """The headline figures.

    Attributes:
        figures: name to estimate.
    """

    content = "figures"

    figures: Mapping[str, Estimate]

    def _repr_html_(self) -> str:
        return html_figures("Summary", self.figures)

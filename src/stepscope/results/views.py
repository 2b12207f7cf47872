"""Results as a notebook shows them: which can be looked at is said here, how they look is not.

Tables, figures and coloured responses are those of the page, which stands above everything that has them. So
the classes below inherit what can be asked of them, and ``stepscope.notebook``, the one module that knows
how, is named here once and imported when somebody looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepscope.stats import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go

_NOTEBOOK = "stepscope.notebook"


@dataclass(frozen=True)
class Parts:
    """What would be stored of a result: it is shown like a measurement that has nothing else.

    Attributes:
        title: of what is shown.
        found: artifacts by the name that they have in ``stepscope.reading.measurement.Measurement``.
        figures: shown before them, by name.
    """

    title: str
    found: Mapping[str, Any]
    figures: Mapping[str, Estimate] = field(default_factory=dict)


class Inline:
    """HTML that a notebook shows where it is the last line of a cell, and a text wherever else it stands.

    Attributes:
        html: a self-contained piece of it; everything of a run in it is escaped.
        text: what ``print`` shows.
    """

    def __init__(self, html: str, text: str = "") -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """The text."""
        return self.text or f"<HTML of {len(self.html):,} characters>"


class Shown:
    """A result with a view of its own in a notebook."""

    def _repr_html_(self) -> str:
        """Headline, facts and the first rows of the tables, as the page has them."""
        html: str = _notebook().html(self._viewed())
        return html

    def _viewed(self) -> Any:
        """What the view is of: itself, or what would be stored of it."""
        return self


class Plotted(Shown):
    """A result that is drawn."""

    def plot(self, name: str = "") -> go.Figure:
        """A figure of the page as a figure of plotly, with the page's numbers, errors and colours.

        Colours are the dark ones where ``plotly.io.templates.default`` is a dark template.

        Args:
            name: of the figure; the first there is by default. A name that is not there is answered with
                those that are.

        Returns:
            The figure; what it shows, with errors, n and units, is in ``layout.meta["caption"]``.

        Raises:
            MeasurementError: there is no figure of that name, or none at all.
        """
        return _notebook().figure(self._viewed(), name)


class Readable(Shown):
    """A result that is read in its responses."""

    def show(self, *, policy: Any = None, most: int = 6) -> Inline:
        """Responses with their tokens coloured by what they did, as the page shows them.

        Args:
            policy: by whose tokenizer tokens get their texts, where they are not stored with them; without,
                a response is shown whole, or its tokens by their ids where these carry an influence.
            most: responses shown.

        Returns:
            What a notebook shows; ``print`` gives the same without colours.

        Raises:
            MeasurementError: there are no responses.
        """
        found: Inline = _notebook().responses(self._viewed(), policy=policy, most=most)
        return found


def _notebook() -> Any:
    return import_module(_NOTEBOOK)

"""How results look in a notebook: views made of the page's own sections, figures and responses.

``stepscope.results.views`` names this package and calls the three functions below; nothing else imports it.
Views stand in ``views``, what a page is in ``pages``, the command ``explain`` as a function in ``explain``.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from stepscope.errors import MeasurementError
from stepscope.notebook.views import view
from stepscope.report import inline
from stepscope.results.views import Inline


def html(shown: object) -> str:
    """What stands below a cell."""
    found = view(shown)
    return inline.sections_html(found.title, (found.head or found.sections)())


def figure(shown: object, name: str = "") -> go.Figure:
    """One of its figures; see :meth:`stepscope.results.views.Plotted.plot`."""
    found, known = view(shown), []
    for section in found.sections():
        for each in (*section.figures, *section.more_figures):
            if name in ("", each.key):
                return inline.drawn(each)
            known.append(each.key)
    if not known:
        raise MeasurementError(f"{found.title}: nothing in it can be drawn")
    raise MeasurementError(f"{found.title}: no figure {name!r}; there are {', '.join(known)}")


def responses(shown: object, *, policy: Any = None, most: int = 6) -> Inline:
    """Its responses; see :meth:`stepscope.results.views.Readable.show`."""
    if most < 1:
        raise MeasurementError(f"most is {most}, expected at least 1")
    found = view(shown, policy)
    shown_ones = next((section.responses for section in found.sections() if section.responses), None)
    if not shown_ones:
        raise MeasurementError(f"{found.title}: no responses to show; measure the stage rollouts")
    return inline.responses_html(shown_ones[:most])

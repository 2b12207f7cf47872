"""Records whose ``repr`` is a line, and a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from typing import Any

from stepscope.stats import Estimate


class Brief:
    """A record whose ``repr`` is a line for a notebook: what is large is shown by its size."""

    def __repr__(self) -> str:
        """Name and fields, in the order they are declared in."""
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._briefly())})"

    def _repr_html_(self) -> str:
        """A row for each field."""
        return html_table(type(self).__name__, self._briefly())

    def _briefly(self) -> list[tuple[str, str]]:
        return [(f.name, _brief(getattr(self, f.name))) for f in fields(self)]  # type: ignore[arg-type]


STYLE = (
    ".stepscope{font:13px/1.45 system-ui,sans-serif;max-width:62rem;overflow-x:auto}"
    ".stepscope table{border-collapse:collapse;margin:.4em 0;font-variant-numeric:tabular-nums}"
    ".stepscope caption{caption-side:top;text-align:left;font-weight:600;color:inherit;padding:0}"
    ".stepscope tr{background:none!important}"
    ".stepscope :is(th,td){text-align:left;vertical-align:top;border:0;padding:.15em .9em .15em 0;"
    "border-bottom:1px solid rgba(128,128,128,.3)}"
    ".stepscope .num{text-align:right;white-space:nowrap}"
    ".stepscope p{margin:.4em 0}"
    ".stepscope .dim{opacity:.72}"
)
"""How everything looks that a notebook shows: colours are the notebook's own, light or dark."""


def framed(body: str, style: str = "") -> str:
    """A piece of HTML with the style of all of them, and more of its own."""
    return f'<div class="stepscope"><style>{STYLE}{style}</style>{body}</div>'


def html_table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Texts as a table of HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return framed(f"<table><caption>{escape(title)}</caption><tbody>{body}</tbody></table>")


def html_figures(title: str, figures: Mapping[str, Estimate]) -> str:
    """Estimates by name as a table of HTML; why one is not reliable stands in its row."""
    return html_table(title, ((name, _brief(e), e.reason, e.method) for name, e in figures.items()))


def _brief(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, Estimate):
        return f"{value.value:.4g} +- {value.stderr:.2g} {value.unit}"
    if (shape := getattr(value, "shape", None)) is not None:
        return f"<{'x'.join(map(str, shape))}>"
    if isinstance(value, Mapping | list | tuple) and value:
        return f"<{len(value)} entries>"
    text = repr(value)
    return text if isinstance(value, Brief) or len(text) <= 60 else f"<{type(value).__name__}>"

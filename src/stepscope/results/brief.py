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


def html_table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Texts as a table of HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><tbody>{body}</tbody></table>"


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

"""Records whose ``repr`` is a line for a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stepscope.stats import Estimate


class Brief:
    """A record whose ``repr`` is a line for a notebook: what is large is shown by its size."""

    def __repr__(self) -> str:
        """Name and fields, in the order they are declared in."""
        parts = [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"


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

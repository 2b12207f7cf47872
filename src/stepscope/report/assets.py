"""What a page carries besides its content: style, scripts, the library of its figures, packed texts.

The library is plotly.js' own bundle ``cartesian`` (scatter, bar, box and heat map are in it), as npm's
``plotly.js-cartesian-dist-min`` has it: a third of the whole one. It lies in ``vendor`` as gzip and goes into
the page in base64, which a browser unpacks itself (``DecompressionStream``), in a seventh of the whole one's
bytes.
"""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from pathlib import Path

from markupsafe import Markup

_HERE = Path(__file__).parent
_PLOTLY = _HERE / "vendor/plotly-cartesian-4.1.1.min.js.gz"
_SCRIPTS = (
    *("core", "figures", "boards", "excerpts"),
    *("explore_data", "explore_table", "explore_reading", "explore"),
    *("tables", "tabs", "tips", "start"),
)
"""Parts of the page's script, in the order in which they need one another."""


def packed(text: str) -> Markup:
    """A text as gzip in base64, the same for the same text; it holds no character of markup."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode())


@cache
def plotly() -> Markup:
    """The library of the figures, packed."""
    return Markup(base64.b64encode(_PLOTLY.read_bytes()).decode())


@cache
def script() -> Markup:
    """The page's own script, its parts in one closure."""
    parts = ((_HERE / f"scripts/{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    return Markup('"use strict";\n(async () => {\n' + "\n".join(parts) + "})();\n")


@cache
def style() -> Markup:
    """The page's style sheet."""
    return Markup((_HERE / "scripts/style.css").read_text(encoding="utf-8"))


class Held:
    """What the scripts of one page show: figures, boards and excerpts, in one packed text of the page.

    Packed together they take a sixth of what they take as JSON, and a third of typed arrays in base64.
    """

    def __init__(self) -> None:
        self._values: list[object] = []

    def keep(self, value: object) -> int:
        """Keep a value; its place among all of them."""
        self._values.append(value)
        return len(self._values) - 1

    def packed(self) -> Markup:
        """All of them, a JSON list."""
        return packed(json.dumps(self._values, separators=(",", ":"), allow_nan=False))

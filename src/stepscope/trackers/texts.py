"""Coloured responses as text: HTML with colours, and the little HTML that TensorBoard lets through."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from stepscope.trackers.entry import MOST, PROMPT, Responses, ShownResponse

BLUE, ORANGE, GREY = "0,114,178", "213,94,0", "117,112,179"
"""Lowers, raises, and how large something is that does neither."""

LOWERS, RAISES, LARGE = "\N{LARGE BLUE SQUARE}", "\N{LARGE ORANGE SQUARE}", "\N{LARGE PURPLE SQUARE}"
"""The same as characters, for a page that shows no colours."""

MARKED = 0.45
"""Strength from which a token is marked there: a fifth of the strongest on the square-root scale."""

STRONGEST = 8
"""Tokens in the table of the strongest of a response."""


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def clean(text: str) -> str:
    """A text that UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")


def prompt_of(response: ShownResponse) -> str:
    """The end of its prompt."""
    text = clean(response.prompt)
    return text if len(text) <= PROMPT else f"... {text[-PROMPT:]}"


def facts_of(response: ShownResponse) -> str:
    """Its facts in a line."""
    said = (
        f"{name} {value if isinstance(value, str) else number(value)}"
        for name, value in response.facts.items()
        if isinstance(value, str) or np.isfinite(value)
    )
    return ", ".join([*said, f"{len(response.tokens)} tokens"])


def legend_of(responses: Responses) -> str:
    """What the colours are."""
    strongest = f"the strongest is {number(responses.scale)}"
    if responses.signed:
        return f"{responses.what}: blue lowers, orange raises; {strongest}"
    return f"{responses.what}: the darker, the larger; {strongest}"


def coloured_html(responses: Responses) -> str:
    """A page of its own: every token with its colour, and its number where the pointer is."""
    parts = [
        '<div style="font:14px/1.6 system-ui,sans-serif;color:#111;background:#fff;padding:8px">'
        f"<p>{escape(clean(legend_of(responses)))}</p>"
    ]
    for response in responses.shown:
        parts.append(
            f"<h4>{escape(clean(facts_of(response)))}</h4>"
            f'<pre style="white-space:pre-wrap;color:#555">{escape(prompt_of(response))}</pre>'
            f'<p style="white-space:pre-wrap">{"".join(_spans(responses, response))}</p>'
        )
    return "".join([*parts, "</div>"])


def _spans(responses: Responses, response: ShownResponse) -> Iterator[str]:
    for token, value, strength in _tokens(responses, response):
        text = escape(clean(token))
        if np.isfinite(value):
            colour = GREY if not responses.signed else BLUE if strength < 0 else ORANGE
            style = f"background:rgba({colour},{0.7 * abs(strength):.2f})"
            yield f'<span style="{style}" title="{number(value)}">{text}</span>'
        else:
            yield f"<span>{text}</span>"
    yield _rest(response)


def marked_html(responses: Responses) -> str:
    """What TensorBoard's text plugin shows: it takes tables and emphasis, and no colour but a character's.

    The strongest tokens have a coloured square before them; those that raise are bold, those that lower in
    italics. Below each response stand its strongest tokens with their numbers.
    """
    parts = [f"<p>{escape(clean(legend_of(responses)))}</p>"]
    for response in responses.shown:
        parts.append(
            f"<h4>{escape(clean(facts_of(response)))}</h4>"
            f"<blockquote>{_lines(prompt_of(response))}</blockquote>"
            f"<p>{''.join(_marks(responses, response))}</p>{_strongest(response)}"
        )
    return "\n".join(parts)


def _marks(responses: Responses, response: ShownResponse) -> Iterator[str]:
    for token, _, strength in _tokens(responses, response):
        text = _lines(clean(token))
        if abs(strength) < MARKED:
            yield text
        elif strength < 0:
            yield f"{LOWERS}<em>{text}</em>"
        else:
            yield f"{RAISES if responses.signed else LARGE}<strong>{text}</strong>"
    yield _rest(response)


def _strongest(response: ShownResponse) -> str:
    values = np.nan_to_num(response.values)
    order = [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:STRONGEST] if values[i] != 0]
    if not order:
        return ""
    rows = "".join(
        f"<tr><td><code>{_lines(clean(response.tokens[i])) or '(end)'}</code></td><td>{i}</td>"
        f"<td>{number(values[i])}</td></tr>"
        for i in order
    )
    head = "<thead><tr><th>token</th><th>position</th><th>value</th></tr></thead>"
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def figures_html(rows: list[list[str | float | bool]], columns: tuple[str, ...]) -> str:
    """A table of figures with their errors."""

    def cell(value: str | float | bool) -> str:
        shown = number(value) if isinstance(value, float) else str(value)
        return f"<td>{escape(clean(shown))}</td>"

    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tokens(responses: Responses, response: ShownResponse) -> Iterator[tuple[str, float, float]]:
    strengths = responses.strengths(response)
    return zip(response.tokens[:MOST], response.values[:MOST], strengths[:MOST], strict=True)


def _rest(response: ShownResponse) -> str:
    further = len(response.tokens) - MOST
    return f" ... {further} more tokens" if further > 0 else ""


def _lines(text: str) -> str:
    """Escaped, with its line ends to be seen."""
    return escape(text).replace("\n", "\N{RETURN SYMBOL}<br>")

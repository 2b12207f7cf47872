# ruff: noqa: RUF001 (typographic signs are meant)
"""Ways to divide the tokens of a training into classes, each from a table of tokens.

A table has its columns as attributes: the data frame of a ledger
(:func:`stepscope.reading.rollups.recorded_tokens`), or :class:`stepscope.rules.Tokens` inside a training,
where only some of the columns are known (:data:`IN_TRAINING`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Labels = Sequence[Any]
"""(tok,) a class for each token."""

END, PART = "⟨end⟩", "⟨part⟩"
"""Tokens without a text of their own: the end of a response, and bytes of a character still to come."""

QUADRANTS = ("right, likely", "right, rare", "wrong, likely", "wrong, rare", "no advantage")
"""Sign of the advantage, and of log p + H: whether the token was likelier than the policy expected."""

RARITIES = (0.01, 0.1, 0.5, 0.9, 0.99)
"""Bounds of the probability of a token."""

PASS_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the share of correct answers to the prompt in its batch."""

UNKNOWN = "unknown"

MARKERS = frozenset(
    """wait hmm but however so therefore thus hence because since alternatively maybe perhaps let lets check
    verify recheck actually first second then next finally now if suppose assume note recall again instead
    although though""".split()  # noqa: SIM905
)
"""Words that lead from one thought to the next."""

KINDS = (
    "digits",
    "operators",
    "words",
    "reasoning markers",
    "format tags",
    "punctuation",
    "white space",
    "end of sequence",
    "parts of characters",
)

_TAG = re.compile(r"</?[A-Za-z][\w-]*>|<\|[^|<>]{1,40}\|>|\\boxed\{|####")
_OPERATORS = re.compile(r"[-+*/=^%<>×÷·−≤≥≠≈√]+")


def kinds(texts: Sequence[str], ended: bool) -> list[str]:
    r"""The kind of each token of one response.

    A token is of a format tag (``<think>``, ``</answer>``, ``\\boxed{``, ``####``) where any of its
    characters is, however the tokenizer cuts the tag.

    Args:
        texts: what each token adds to the text.
        ended: whether the last one is the end of the sequence.
    """
    ends = np.cumsum([len(text) for text in texts])
    tagged = np.zeros(int(ends[-1]) + 1 if len(texts) else 1, dtype=np.bool_)
    for found in _TAG.finditer("".join(texts)):
        tagged[found.start() : found.end()] = True
    names = []
    for text, end in zip(texts, ends, strict=True):
        names.append("format tags" if tagged[end - len(text) : end].any() else _kind(text))
    if ended and names:
        names[-1] = "end of sequence"
    return names


def _kind(text: str) -> str:
    bare = text.strip()
    if not bare:
        return "white space" if text else "parts of characters"
    if bare.replace(",", "").replace(".", "").isdecimal():
        return "digits"
    if _OPERATORS.fullmatch(bare):
        return "operators"
    if any(character.isalpha() for character in bare):
        word = re.sub(r"\W", "", bare).lower()
        return "reasoning markers" if word in MARKERS else "words"
    return "punctuation"


def token_names(texts: Sequence[str], ended: bool) -> list[str]:
    """What each token of one response goes by: its text, or that it has none of its own."""
    last = len(texts) - 1
    return [text or (END if ended and k == last else PART) for k, text in enumerate(texts)]


def by_quadrant(table: Any) -> Labels:
    """Sign of the advantage times that of log p - E log p = log p + H (the covariance of 2505.22617).

    A token with log p + H = 0, of which the policy was certain, counts as likely.
    """
    likely = np.asarray(table.logprob + table.entropy >= 0)
    advantage = np.asarray(table.advantage)
    names = np.where(advantage > 0, "right, ", "wrong, ") + np.where(likely, "likely", "rare").astype(object)
    return list(np.where(advantage == 0, "no advantage", np.where(np.isnan(advantage), UNKNOWN, names)))


def by_rarity(table: Any) -> Labels:
    """Probability of the token when it was drawn."""
    names = np.array(_rarities(), dtype=object)
    return list(names[np.searchsorted(RARITIES, np.exp(np.asarray(table.logprob)), side="right")])


def _rarities() -> list[str]:
    bounds = ["0", *(f"{b:g}" for b in RARITIES), "1"]
    return [f"{a} to {b}" for a, b in itertools.pairwise(bounds)]


def by_pass_rate(table: Any) -> Labels:
    """Share of correct answers to its prompt in the batch."""
    rate = np.asarray(table.pass_rate)
    names = _pass_rates()
    place = np.searchsorted(PASS_RATES, rate, side="left").clip(0, len(names) - 1)
    found = np.array(names, dtype=object)[place]
    return list(np.where(np.isnan(rate), UNKNOWN, np.where(rate == 1, "1", found)))


def _pass_rates() -> list[str]:
    names = ["0", *(f"above {a:g} to {b:g}" for a, b in itertools.pairwise(PASS_RATES))]
    return [*names[:-1], f"above {PASS_RATES[-2]:g}, below 1"]


def by_position(table: Any) -> Labels:
    """Position in the response, in bins that double: 0, 1, 2 to 3, 4 to 7, ..."""
    power = np.frexp(np.asarray(table.position, dtype=np.float64))[1]
    return [_bin(p) for p in power.tolist()]


def _bin(power: int) -> str:
    return str(2**power // 2) if power < 2 else f"{2 ** (power - 1)} to {2**power - 1}"


WAYS: Mapping[str, Callable[[Any], Labels]] = {
    "quadrant": by_quadrant,
    "kind": lambda table: list(table.kind),
    "rarity": by_rarity,
    "position": by_position,
    "pass_rate": by_pass_rate,
    "token": lambda table: list(table.token),
    "prompt": lambda table: list(table.prompt),
    "step": lambda table: list(table.step),
}
"""Name of a way to its function of the table of tokens."""

IN_TRAINING = ("quadrant", "rarity", "position", "kind", "token")
"""Ways that need no more than a training knows of a token before it takes the step."""

LABELS: Mapping[str, Sequence[str]] = {
    "quadrant": (*QUADRANTS, UNKNOWN),
    "kind": KINDS,
    "rarity": _rarities(),
    "position": [_bin(power) for power in range(32)],
    "pass_rate": (*_pass_rates(), "1", UNKNOWN),
}
"""All classes of the ways that have them fixed."""

_ORDERS: Mapping[str, Sequence[str]] = {"quadrant": QUADRANTS, "kind": KINDS}


def ordered(name: str, labels: Labels) -> list[Any]:
    """The classes that occur: in their own order where they have one, numbers by size, others as texts."""
    there = set(labels)
    known = [label for label in _ORDERS.get(name, ()) if label in there]
    rest = there.difference(known)
    if all(isinstance(label, int | float | np.number) for label in rest):
        return [*known, *sorted(rest)]
    return [*known, *sorted(rest, key=lambda label: (_leading(str(label)), str(label)))]


def _leading(label: str) -> float:
    """The number in a label such as ``16 to 31`` or ``above 0.5 to 0.75``; none comes last."""
    found = re.match(r"(?:above )?(\d+(?:\.\d+)?)(?: to |, below |$)", label)
    return float(found[1]) + (label.startswith("above") * 1e-9) if found else float("inf")

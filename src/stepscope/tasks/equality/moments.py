"""Dates, times of day and ratios: figures that belong together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "jan january", "feb february", "mar march", "apr april", "may", "jun june", "jul july",
            "aug august", "sep sept september", "oct october", "nov november", "dec december",
        ),
        1,
    )
    for name in names.split()
}  # fmt: skip
_MONTH = "|".join(sorted(_MONTHS, key=len, reverse=True))
_DATES = (
    re.compile(r"(?P<y>[0-9]{4})[-/.](?P<n>[0-9]{1,2})[-/.](?P<d>[0-9]{1,2})", re.ASCII),
    re.compile(
        rf"(?:the )?(?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)?(?: of)?[ -](?P<m>{_MONTH})\.?,?"
        r"(?:[ -](?P<y>[0-9]{4}))?",
        re.ASCII | re.I,
    ),
    re.compile(
        rf"(?P<m>{_MONTH})\.? (?:the )?(?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)?,?(?: (?P<y>[0-9]{{4}}))?",
        re.ASCII | re.I,
    ),
    re.compile(rf"(?P<m>{_MONTH})\.?,? (?P<y>[0-9]{{4}})", re.ASCII | re.I),
)
_TIME = re.compile(
    r"([0-9]{1,2})(?:[:.h]([0-9]{2}))?(?::([0-9]{2}))?\s*(am|pm|a\.m|p\.m|a\.m\.|p\.m\.|o'clock|uhr|h)?",
    re.ASCII | re.I,
)
_COLONS = re.compile(r"([0-9]+(?:\.[0-9]+)?)((?:\s*:\s*[0-9]+(?:\.[0-9]+)?)+)", re.ASCII)
_TO = re.compile(r"([0-9]+(?:\.[0-9]+)?) to ([0-9]+(?:\.[0-9]+)?)", re.ASCII)


@dataclass(frozen=True)
class Moment:
    """A date (year, month, day; what is not said is None) or a time of day (hour, minute, second)."""

    kind: str
    fields: tuple[int | None, ...]
    bare: bool = False
    """A time without am, pm or the like: it may count 12 or 24 hours."""


@dataclass(frozen=True)
class Ratio:
    """A ratio in lowest terms."""

    terms: tuple[int, ...]


def read_moment(text: str) -> Moment | None:
    """A date or a time of day; dates whose day and month could be told apart only by country are none."""
    for pattern in _DATES:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            month = _MONTHS[found["m"].lower()] if found.get("m") else int(found["n"])
            day = int(found["d"]) if found.get("d") else None
            year = int(found["y"]) if found.get("y") else None
            return Moment("date", (year, month, day)) if month <= 12 and (day or 1) <= 31 else None
    return _read_time(text)


def _read_time(text: str) -> Moment | None:
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hour, minute, second = (int(g or 0) for g in match.groups()[:3])
    suffix = (match.group(4) or "").lower().replace(".", "")
    if match.group(2) is None and (match.group(3) or suffix not in ("am", "pm", "o'clock", "uhr")):
        return None
    if not suffix and ":" not in text:
        return None
    if hour > 24 or minute > 59 or second > 59 or (suffix in ("am", "pm") and not 1 <= hour <= 12):
        return None
    if suffix in ("am", "pm"):
        hour = hour % 12 + (12 if suffix == "pm" else 0)
    return Moment("time", (hour, minute, second), bare=suffix not in ("am", "pm"))


def read_ratio(text: str) -> Ratio | None:
    """``3:2``, ``1 : 2 : 3`` or ``3 to 2``, in lowest terms."""
    if match := _COLONS.fullmatch(text):
        terms = [Fraction(t) for t in re.split(r"\s*:\s*", text)]
    elif match := _TO.fullmatch(text):
        terms = [Fraction(t) for t in match.groups()]
    else:
        return None
    scale = math.lcm(*(t.denominator for t in terms))
    whole = [int(t * scale) for t in terms]
    return Ratio(tuple(w // (math.gcd(*whole) or 1) for w in whole))


def same_moment(gold: Moment, answer: Moment) -> bool:
    """The same fields; a reference without am or pm takes an answer with ``am``, the same hour."""
    if (gold.kind, gold.fields) != (answer.kind, answer.fields):
        return False
    return gold.bare or not answer.bare or (gold.fields[0] or 0) > 12

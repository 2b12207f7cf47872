"""Dates, times of day and ratios: figures that belong together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date
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
} | {
    name: number
    for number, names in enumerate(
        (
            "janvier enero januar", "février febrero februar", "mars marzo märz", "avril abril", "mai mayo",
            "juin junio juni", "juillet julio juli", "août agosto", "septembre septiembre",
            "octobre octubre oktober", "novembre noviembre", "décembre diciembre dezember",
        ),
        1,
    )
    for name in names.split()
}  # fmt: skip
_MONTH = "|".join(sorted(_MONTHS, key=len, reverse=True))
_DATES = (
    re.compile(r"(?P<y>[0-9]{4})(?:[-/.]|年)(?P<n>[0-9]{1,2})(?:[-/.]|月)(?P<d>[0-9]{1,2})日?", re.ASCII),
    re.compile(r"(?P<n>0?[1-9]|1[0-2])[/.-](?P<d>1[3-9]|2[0-9]|3[01])[/.-](?P<y>[0-9]{4})", re.ASCII),
    re.compile(r"(?P<d>1[3-9]|2[0-9]|3[01])[/.-](?P<n>0?[1-9]|1[0-2])[/.-](?P<y>[0-9]{4})", re.ASCII),
    re.compile(
        rf"(?:the )?(?P<d>[0-9]{{1,2}})(?:st|nd|rd|th|\.)?(?: of| de)?[ -](?P<m>{_MONTH})\.?,?"
        r"(?:(?: de)?[ -](?P<y>[0-9]{4}))?",
        re.I,
    ),
    re.compile(
        rf"(?P<m>{_MONTH})\.? (?:the )?(?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)?,?(?: (?P<y>[0-9]{{4}}))?",
        re.ASCII | re.I,
    ),
    re.compile(rf"(?P<m>{_MONTH})\.?,? (?P<y>[0-9]{{4}})", re.ASCII | re.I),
)
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_WEEKDAY = re.compile(rf"({'|'.join(_WEEKDAYS)}),? (.*)|(.*?),? (?:an? )?\(?({'|'.join(_WEEKDAYS)})\)?", re.I)
_NAMED = {"noon": 12, "midday": 12, "12 noon": 12, "midnight": 0, "12 midnight": 0}
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
    """A date or a time of day; dates whose day and month could be told apart only by country are none.

    A day of the week beside a full date must be the one of that date.
    """
    text = re.sub(r"^(?:at|on)\s+", "", text, flags=re.IGNORECASE)
    if text.lower() in _NAMED:
        return Moment("time", (_NAMED[text.lower()], 0, 0))
    if match := _WEEKDAY.fullmatch(text):
        moment = read_moment(match.group(2) or match.group(3) or "")
        weekday = _WEEKDAYS.index((match.group(1) or match.group(4)).lower())
        return moment if moment is not None and _weekday(moment) == weekday else None
    for pattern in _DATES:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            month = _MONTHS[found["m"].lower()] if found.get("m") else int(found["n"])
            day = int(found["d"]) if found.get("d") else None
            year = int(found["y"]) if found.get("y") else None
            return Moment("date", (year, month, day)) if month <= 12 and (day or 1) <= 31 else None
    return _read_time(text)


def _weekday(moment: Moment) -> int | None:
    """0 for Monday; None for a time and for a date that is not full or that no calendar has."""
    if moment.kind != "date" or None in moment.fields:
        return None
    try:
        return date(*(f or 0 for f in moment.fields)).weekday()
    except ValueError:
        return None


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
    return gold.bare or not answer.bare or not 1 <= (gold.fields[0] or 0) <= 12

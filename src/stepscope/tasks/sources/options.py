"""Options of a task specification: ``digits=2,terms=3`` after the colon."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from stepscope.errors import TaskError

MAX_CHARACTERS = 2_000
"""Longer options are refused unread."""

LARGEST = 1_000_000_000
"""Largest number an option may have, either way."""

_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")


def parse_options(text: str, spec: str) -> dict[str, Any]:
    """Read ``key=value,key=value``; values are JSON where they can be (``3``, ``0.5``, ``true``, ``[1,2]``).

    Raises:
        TaskError: a part is not of the form key=value, a key comes twice, or a number is beyond ``LARGEST``.
    """
    if len(text) > MAX_CHARACTERS:
        raise TaskError(
            f"task {spec[:40]!r}...: {len(text)} characters of options, expected at most {MAX_CHARACTERS}"
        )
    options: dict[str, Any] = {}
    for part in _COMMA_OUTSIDE_BRACKETS.split(text) if text else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise TaskError(f"task {spec!r}: expected key=value after the colon, got {part!r}")
        if key in options:
            raise TaskError(f"task {spec!r}: option {key!r} is given twice")
        options[key] = _value(value)
        if not _is_bounded(options[key]):
            raise TaskError(f"task {spec!r}: {key} must be a number between -{LARGEST} and {LARGEST}")
    return options


def _value(text: str) -> Any:
    """What JSON makes of it, and the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_bounded(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_bounded, value))
    return not isinstance(value, int | float) or abs(value) <= LARGEST  # false of nan


def format_options(options: Mapping[str, Any]) -> str:
    """The inverse of :func:`parse_options`, keys in alphabetical order."""
    return ",".join(
        f"{k}={v if isinstance(v, str) else json.dumps(v, separators=(',', ':'))}"
        for k, v in sorted(options.items())
    )


def require_known(options: Mapping[str, Any], known: Iterable[str], spec: str) -> None:
    """Refuse option names that do not exist, all of them at once.

    Raises:
        TaskError: with the nearest match of each unknown name.
    """
    names = sorted(known)
    wrong = []
    for key in options:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            wrong.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if wrong:
        raise TaskError(f"task {spec!r}: unknown option {', '.join(wrong)}; options are {', '.join(names)}")


def take_flag(options: dict[str, Any], key: str, spec: str) -> bool:
    """Remove an option that is true or false, false where it is not given, and return it.

    Raises:
        TaskError: it is neither.
    """
    value = options.pop(key, False)
    if not isinstance(value, bool):
        raise TaskError(f"task {spec!r}: {key} must be true or false, got {value!r}")
    return value


def take_count(
    options: dict[str, Any], key: str, default: int, spec: str, *, least: int = 1, most: int = LARGEST
) -> int:
    """Remove an integer option and return it.

    Raises:
        TaskError: it is not an integer, or not between ``least`` and ``most``.
    """
    value = options.pop(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise TaskError(
            f"task {spec!r}: {key} must be a whole number of at least {least} and at most {most}, "
            f"got {value!r}"
        )
    return value

"""Options of a task specification: ``digits=2,terms=3`` after the colon."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from stepscope.errors import TaskError

_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")


def parse_options(text: str, spec: str) -> dict[str, Any]:
    """Read ``key=value,key=value``; values are JSON where they can be (``3``, ``0.5``, ``true``, ``[1,2]``).

    Raises:
        TaskError: a part is not of the form key=value, or a key comes twice.
    """
    options: dict[str, Any] = {}
    for part in _COMMA_OUTSIDE_BRACKETS.split(text) if text else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise TaskError(f"task {spec!r}: expected key=value after the colon, got {part!r}")
        if key in options:
            raise TaskError(f"task {spec!r}: option {key!r} is given twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


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


def take_count(options: dict[str, Any], key: str, default: int, spec: str, *, least: int = 1) -> int:
    """Remove an integer option and return it.

    Raises:
        TaskError: it is not an integer, or smaller than ``least``.
    """
    value = options.pop(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TaskError(f"task {spec!r}: {key} must be a whole number of at least {least}, got {value!r}")
    return value

"""Rows of a task's data: read in one place, their types checked and never converted, named by file and line.

The standard library reads the JSON because it alone can hand over a number as the text that stands in the
file: an answer of 5,000 digits or ``1.10`` stays what it was.
"""

from __future__ import annotations

import codecs
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.problem import ANSWER, END_ANSWER, END_THINK, THINK

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused: all rows are held in memory."""

MAX_LINE_BYTES = 1 << 24
"""Longer lines are refused: no prompt is that long, and a file without line ends is one line."""

TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
_SHOWN_KEYS = 8


class Number(str):
    """A number of a JSON text, as it is written there."""

    __slots__ = ()


@dataclass(frozen=True)
class Row:
    """One row: its fields, each handed out only as the type it has to be.

    Attributes:
        where: file and line, for errors.
        fields: names and values.
    """

    where: str
    fields: Mapping[str, Any]

    def refuse(self, why: str) -> TaskError:
        """The error that says what is wrong with this row."""
        return TaskError(f"{self.where}: {why}")

    def text(self, name: str) -> str:
        """A text that is not blank and has a UTF-8 form.

        Raises:
            TaskError: the field holds anything else.
        """
        value = self.fields[name]
        if isinstance(value, list):
            raise self.refuse(
                f"{name} must be a text, got a list; of a conversation give the user's message as a text "
                "(a chat template is applied by template=chat:{question})"
            )
        if not isinstance(value, str) or isinstance(value, Number) or not value.strip():
            raise self.refuse(f"{name} must be a text that is not empty, got {shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.refuse(
                f"{name} holds half a surrogate pair at character {error.start + 1}, which is no text; "
                "write the file again as UTF-8"
            ) from error
        return value

    def optional_text(self, name: str) -> str | None:
        """The same, or None where the field is missing, null or blank.

        Raises:
            TaskError: the field holds anything else.
        """
        value = self.fields.get(name)
        blank = type(value) is str and not value.strip()
        return None if value is None or blank else self.text(name)

    def answer(self, name: str) -> str:
        """A reference answer: a text, or a number as it is written; an ``<answer>`` block is opened.

        Raises:
            TaskError: it is neither, is ``nan``, or has tags inside.
        """
        value = self.fields[name]
        if isinstance(value, Number):
            return str(value)
        if not isinstance(value, str):
            raise self.refuse(f"{name} must be a text or a number, got {shown(value)}")
        text = self.text(name).strip()
        if text.startswith(ANSWER) and text.endswith(END_ANSWER):
            text = text.removeprefix(ANSWER).removesuffix(END_ANSWER).strip()
        if not text or text.casefold() == "nan":
            raise self.refuse(f"{name} must be an answer, got {shown(value)}; leave the row out")
        if any(tag in text for tag in TAGS):
            raise self.refuse(f"{name} has tags inside ({shown(text)}); give the bare answer")
        return text

    def parted(self, name: str, text: str) -> tuple[str, str | None]:
        """Thought and answer of a text that may be a whole response.

        Raises:
            TaskError: its tags do not make one think block and at most one answer block after it.
        """
        if not any(tag in text for tag in TAGS):
            return text, None
        thought, closed, rest = text.strip().removeprefix(THINK).partition(END_THINK)
        rest = rest.strip()
        answer = rest.removeprefix(ANSWER).removesuffix(END_ANSWER) if rest.startswith(ANSWER) else ""
        whole = closed and rest in ("", f"{ANSWER}{answer}{END_ANSWER}")
        if not whole or any(tag in thought + answer for tag in TAGS):
            raise self.refuse(
                f"{name} has tags that are not one {THINK} and one {ANSWER} block; give the bare thought, or "
                "the whole response"
            )
        return thought.strip(), answer.strip() or None


def kind_of(path: Path) -> str:
    """``file``, ``folder``, or empty for all else: nothing there, no path at all, a pipe that never ends."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else ""


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON-lines file with the number of their line, counted from 0; empty lines are passed over.

    A byte order mark at the beginning is taken off.

    Raises:
        TaskError: the file cannot be read or is too large, a line is no JSON object, or one of ``fields`` is
            missing.
    """
    if kind_of(path) != "file":
        raise TaskError(f"cannot read {path}: no such file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise TaskError(f"{path}: {size} bytes, expected at most {MAX_FILE_BYTES}; take a part of it")
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                row = _read_line(line, f"{path} line {number + 1}", number, fields)
                if row is not None:
                    yield number, row
                number += 1
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error}") from error


def _read_line(line: bytes, where: str, number: int, fields: Sequence[str]) -> Row | None:
    if len(line) > MAX_LINE_BYTES:
        raise TaskError(
            f"{where}: longer than {MAX_LINE_BYTES} bytes; give one JSON object a line (a JSON array is none)"
        )
    if number == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: not UTF-8 (byte {error.start + 1}); write the file as UTF-8") from error
    if not text.strip():
        return None
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise TaskError(f"{where}: expected a JSON object, got {shown(found)}")
    row = Row(where, found)
    row_has(row, fields)
    return row


def row_has(row: Row, fields: Sequence[str]) -> None:
    """Refuse a row that lacks a field.

    Raises:
        TaskError: naming the first field that is missing, and those that are there.
    """
    missing = [name for name in fields if name not in row.fields]
    if missing:
        there = [ascii(key)[:40] for key in sorted(row.fields)[:_SHOWN_KEYS]]
        more = ", ..." if len(row.fields) > _SHOWN_KEYS else ""
        raise row.refuse(
            f"no field {missing[0]!r} among [{', '.join(there)}{more}]; each row needs {', '.join(fields)}"
        )


def parse_json(text: str, where: str) -> Any:
    """Read strict JSON: numbers stay text, no ``NaN``, no key twice.

    Raises:
        TaskError: the text is anything else, or is nested too deeply to be read.
    """
    try:
        return json.loads(
            text,
            parse_int=Number,
            parse_float=Number,
            parse_constant=_no_constant,
            object_pairs_hook=_no_key_twice,
        )
    except RecursionError as error:
        raise TaskError(f"{where}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise TaskError(f"{where}: not valid JSON ({error})") from error


def shown(value: Any) -> str:
    """What a value is, in a few characters, whatever it holds."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Number | int | float):
        return str(value)[:40]
    if isinstance(value, str):
        return ascii(value[:40]) + ("..." if len(value) > 40 else "")
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {ascii(twice)[:40]} appears twice")
    return found

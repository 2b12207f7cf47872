r"""Where the answer stands in a response, and what keeping the format means. Linear in its length.

=============== ============================================= ===============================================
answer format   the answer                                    formatted, what ``format_weight`` rewards
=============== ============================================= ===============================================
``tags``        content of the only ``<answer>`` block        one think block, then one answer block
``boxed``       content of the last ``\boxed{}``              exactly one box
``hash``        the line after the last ``####`` (GSM8K)      exactly one ``####``, and its line is the last
``last_number`` the last number                               there is a number
``regex:...``   group 1 of the last match of the expression   there is a match
=============== ============================================= ===============================================

A response is read from the beginning of its think block on, which may be in the prompt. All but ``tags`` read
what follows the last ``</think>``, the whole response where there is none; formatted also asks that a think
block is closed.
"""

from __future__ import annotations

import difflib
import re
import warnings
from dataclasses import dataclass
from typing import Protocol

import regex

from stepscope.errors import TaskError
from stepscope.tasks.equality.text import BOX, braces
from stepscope.tasks.problem import ANSWER, END_ANSWER, END_THINK, THINK

MARK = "####"
REGEX = "regex:"
TIME_LIMIT = 1.0
"""Seconds that a user's regular expression may take over one response."""
MAX_PATTERN = 500

_LAST_NUMBER = re.compile(
    "(?:(?<![\\w)\\]])[-+\N{MINUS SIGN}])?[$€£]?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+|\s?%)?"
)


@dataclass(frozen=True)
class Reading:
    """What a response says.

    Attributes:
        answer: the answer without surrounding white space; None where the response has none.
        formatted: it keeps the format.
    """

    answer: str | None
    formatted: bool


class AnswerFormat(Protocol):
    """Where the answer stands."""

    @property
    def name(self) -> str:
        """As :func:`load_answer_format` takes it."""

    def read(self, text: str) -> Reading:
        """Read a decoded response, with the opening that its prompt ends with before it."""

    def lay_out(self, thought: str, answer: str, *, opening: str = "", compact: bool = False) -> str:
        """The response of a demonstration, less the opening; ``compact``: without line breaks.

        Raises:
            TaskError: the format only says how an answer is read.
        """


@dataclass(frozen=True)
class Tags:
    """The blocks of DeepSeek-R1-Zero."""

    name: str = "tags"

    def read(self, text: str) -> Reading:
        """The answer of the only answer block; formatted with one think block before it and nothing else."""
        start, stop = text.find(ANSWER), text.find(END_ANSWER)
        one_answer = text.count(ANSWER) == 1 and text.count(END_ANSWER) == 1 and start < stop
        if not one_answer:
            return Reading(answer=None, formatted=False)
        answer = text[start + len(ANSWER) : stop].strip()
        close = text.find(END_THINK)
        formatted = (
            text.count(THINK) == 1
            and text.count(END_THINK) == 1
            and text.lstrip().startswith(THINK)
            and close < start
            and not text[close + len(END_THINK) : start].strip()
            and not text[stop + len(END_ANSWER) :].strip()
        )
        return Reading(answer=answer, formatted=formatted)

    def lay_out(self, thought: str, answer: str, *, opening: str = "", compact: bool = False) -> str:
        """Think block, answer block, tags included."""
        answered = f"{ANSWER}{answer}{END_ANSWER}"
        if END_THINK in opening:
            return answered
        start = "" if opening else THINK
        return start + _thought(thought, opening or THINK, compact) + answered


@dataclass(frozen=True)
class Boxed:
    r"""``\boxed{}``, as the prompts of Qwen and DeepSeek ask for it."""

    name: str = "boxed"

    def read(self, text: str) -> Reading:
        """The last box whose braces balance; a box that stays open is none."""
        said, closed = _after_thought(text)
        closing = braces(said)
        outer: list[tuple[int, int]] = []
        for box in BOX.finditer(said):
            if box.end() in closing and (not outer or box.start() > outer[-1][1]):
                outer.append((box.end() + 1, closing[box.end()]))
        if not outer:
            return Reading(answer=None, formatted=False)
        start, stop = outer[-1]
        return Reading(said[start:stop].strip(), closed and len(outer) == 1)

    def lay_out(self, thought: str, answer: str, *, opening: str = "", compact: bool = False) -> str:
        """The thought and the box."""
        return _thought(thought, opening, compact) + f"\\boxed{{{answer}}}"


@dataclass(frozen=True)
class Hash:
    """``#### 18`` on a line of its own, as in GSM8K."""

    name: str = "hash"

    def read(self, text: str) -> Reading:
        """The rest of the line after the last mark."""
        said, closed = _after_thought(text)
        before, mark, after = said.rpartition(MARK)
        line, _, rest = after.strip(" \t").partition("\n")
        answer = line.strip()
        if not mark or not answer:
            return Reading(answer=None, formatted=False)
        return Reading(answer, closed and MARK not in before and not rest.strip())

    def lay_out(self, thought: str, answer: str, *, opening: str = "", compact: bool = False) -> str:
        """The thought and the mark."""
        return _thought(thought, opening, compact) + f"{MARK} {answer}"


@dataclass(frozen=True)
class LastNumber:
    """Whatever number comes last."""

    name: str = "last_number"

    def read(self, text: str) -> Reading:
        """The last number, with its sign, currency, denominator or percent sign."""
        said, closed = _after_thought(text)
        answer = None
        for match in _LAST_NUMBER.finditer(said):
            answer = match.group().strip()
        return Reading(answer, closed and answer is not None)

    def lay_out(self, thought: str, answer: str, *, opening: str = "", compact: bool = False) -> str:
        """The thought and a sentence with the answer."""
        return _thought(thought, opening, compact) + f"The answer is {answer}"


@dataclass(frozen=True)
class Expression:
    """A regular expression of the user's with one group."""

    pattern: str

    @property
    def name(self) -> str:
        """``regex:`` and the expression."""
        return REGEX + self.pattern

    def read(self, text: str) -> Reading:
        """Group 1 of the last match; an expression that takes longer than ``TIME_LIMIT`` finds nothing."""
        said, closed = _after_thought(text)
        answer = None
        try:
            for match in regex.compile(self.pattern).finditer(said, timeout=TIME_LIMIT):
                answer = match.group(1)
        except TimeoutError:
            warnings.warn(
                f"answer_format {self.pattern[:60]!r}: took more than {TIME_LIMIT:g} s over a response of "
                f"{len(text)} characters, which counts as one without an answer; avoid nested repetitions",
                stacklevel=2,
            )
            return Reading(answer=None, formatted=False)
        return Reading(None if answer is None else answer.strip(), closed and answer is not None)

    def lay_out(self, thought: str, answer: str, *, opening: str = "", compact: bool = False) -> str:
        """Not possible.

        Raises:
            TaskError: always.
        """
        raise TaskError(
            f"answer_format {self.name[:60]!r}: a regular expression says how an answer is read, not how a "
            f"demonstration writes it; use one of {', '.join(_NAMED)} for the warm-up, or sft=null"
        )


TAGS = Tags()
_NAMED: dict[str, AnswerFormat] = {f.name: f for f in (TAGS, Boxed(), Hash(), LastNumber())}


def answer_formats() -> list[AnswerFormat]:
    """The formats that have a name."""
    return list(_NAMED.values())


def load_answer_format(name: str) -> AnswerFormat:
    r"""An answer format: ``tags``, ``boxed``, ``hash``, ``last_number``, or ``regex:`` and an expression.

    Raises:
        TaskError: no such name, or an expression that is not valid or has not exactly one group.
    """
    if name in _NAMED:
        return _NAMED[name]
    if not name.startswith(REGEX):
        close = difflib.get_close_matches(name, _NAMED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TaskError(
            f"unknown answer_format {name[:60]!r}: give one of {', '.join(_NAMED)}, or "
            f"{REGEX}EXPRESSION{hint}"
        )
    pattern = name.removeprefix(REGEX)
    if len(pattern) > MAX_PATTERN:
        raise TaskError(
            f"answer_format: the expression has {len(pattern)} characters, expected at most {MAX_PATTERN}"
        )
    try:
        groups = regex.compile(pattern).groups
    except (regex.error, OverflowError, RecursionError) as error:
        raise TaskError(
            f"answer_format {name[:60]!r}: not a regular expression ({error}); mend it"
        ) from error
    if groups != 1:
        raise TaskError(
            f"answer_format {name[:60]!r}: the expression has {groups} groups, expected the one that is the "
            "answer; write the others as (?:...)"
        )
    return Expression(pattern)


def _after_thought(text: str) -> tuple[str, bool]:
    """What follows the thought, and whether a think block is closed as it should be."""
    said = text.rpartition(END_THINK)[2]
    return said, text.count(THINK) == text.count(END_THINK) <= 1


def _thought(thought: str, opening: str, compact: bool) -> str:
    """A thought before an answer, in the think block where the prompt opens one."""
    around = "" if compact else "\n"
    if opening and END_THINK not in opening:
        start = "" if opening[-1].isspace() else around
        return f"{start}{thought}{around}{END_THINK}{around}"
    return f"{thought}{around}" if thought else ""

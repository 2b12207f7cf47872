"""Reading a response: its answer block and its format. Linear in the length of the text."""

from __future__ import annotations

from dataclasses import dataclass

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"


@dataclass(frozen=True)
class Reading:
    """What a response says.

    Attributes:
        answer: content of the answer block without surrounding white space; None unless there is exactly one.
        formatted: one think block, then one answer block, and nothing around them but white space.
    """

    answer: str | None
    formatted: bool


def read_response(whole: str) -> Reading:
    """Read a response, from the beginning of its think block on, which may be in the prompt."""
    start, stop = whole.find(ANSWER), whole.find(END_ANSWER)
    one_answer = whole.count(ANSWER) == 1 and whole.count(END_ANSWER) == 1 and start < stop
    if not one_answer:
        return Reading(answer=None, formatted=False)
    answer = whole[start + len(ANSWER) : stop].strip()
    close = whole.find(END_THINK)
    formatted = (
        whole.count(THINK) == 1
        and whole.count(END_THINK) == 1
        and whole.lstrip().startswith(THINK)
        and close < start
        and not whole[close + len(END_THINK) : start].strip()
        and not whole[stop + len(END_ANSWER) :].strip()
    )
    return Reading(answer=answer, formatted=formatted)

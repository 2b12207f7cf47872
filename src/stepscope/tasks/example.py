"""One response with its prompt and its grade: what is shown, and kept, where rewards are at fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.records import Record

if TYPE_CHECKING:
    from stepscope.tasks.problem import Written

BRIEF = 240
"""Most characters of a text in one line; its middle is left out."""


@dataclass(frozen=True)
class Example(Record):
    """A response and what became of it.

    Attributes:
        prompt: as the policy got it.
        response: what it wrote.
        truncated: it was cut at the longest length.
        grader: what graded it: a task, or a function of the user's.
        reward: what it earned; None where it was not graded.
        correct: whether it counts as correct; None where it was not graded.
        answer: what was read as its answer; None where nothing was, or a function graded.
        answer_format: where an answer was looked for; empty where a function graded.
        reference: the right answer; empty where it is not known.
        fault: what went wrong; empty for nothing.
    """

    prompt: str
    response: str
    truncated: bool
    grader: str
    reward: float | None = None
    correct: bool | None = None
    answer: str | None = None
    answer_format: str = ""
    reference: str = ""
    fault: str = ""

    @classmethod
    def ungraded(cls, one: Written, *, grader: str, fault: str) -> Example:
        """A response that could not be graded."""
        return cls(one.prompt, one.response, one.truncated, grader, reference=one.problem.answer, fault=fault)

    @property
    def grade(self) -> str:
        """The verdict in words."""
        if self.reward is None:
            return "not graded"
        found = f"reward {self.reward:.4g} by {self.grader}"
        if self.answer_format:
            found += (
                f", no answer found where {self.answer_format} looks"
                if self.answer is None
                else f", answer read: {brief(self.answer)}"
            )
        return found + (f", right answer: {brief(self.reference)}" if self.reference else "")

    def __str__(self) -> str:
        """In a line."""
        cut = " (cut at the longest length)" if self.truncated else ""
        return f"the prompt {brief(self.prompt)} was answered{cut} {brief(self.response)}: {self.grade}"


def brief(text: str) -> str:
    """A text in quotes, without its middle where it is long."""
    half = BRIEF // 2
    return repr(text if len(text) <= BRIEF else f"{text[:half]} ... {text[-half:]}")

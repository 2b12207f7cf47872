"""What a task is made of: problems, scores, and the two protocols of asking and grading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stepscope.errors import TaskError

SPLITS = ("train", "test")
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
"""The tags of a thought and of an answer."""


@dataclass(frozen=True)
class Chat:
    """A prompt in messages, for the tokenizer's chat template.

    Attributes:
        messages: each with ``role`` and ``content``, as Transformers and TRL take them.
        variables: further variables of the template, TRL's ``chat_template_kwargs``: ``enable_thinking`` and
            the like.
        prefill: text that the assistant's turn begins with, after what the template itself puts there.
        template: a chat template in place of the tokenizer's; empty for the tokenizer's own.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    template: str = ""


@dataclass(frozen=True)
class Problem:
    """One question with its answer.

    Attributes:
        prompt_id: global id, for example ``arithmetic/train/12``; it never changes.
        question: the bare question; a template turns it into a prompt. Problems with the same question are
            one prompt, whatever their ids.
        answer: the reference answer as text; empty where only a scorer exists.
        metadata: what the source needs to grade or to demonstrate.
    """

    prompt_id: str
    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> Mapping[str, Any]:
        """What a reward function gets of the problem: the row's own columns, else question and answer."""
        found: Mapping[str, Any] | None = self.metadata.get("columns")
        return {"question": self.question, "answer": self.answer} if found is None else found


@dataclass(frozen=True)
class Score:
    """What a response earned.

    Attributes:
        reward: grade of the answer in [0, 1] (1 for correct and 0 otherwise unless the task gives partial
            credit) plus ``format_weight`` for a well-formed response. It does not depend on the length.
        correct: an answer stands where the answer format says, and it is right.
        formatted: the response keeps the answer format, see :mod:`stepscope.tasks.formats.response`.
    """

    reward: float
    correct: bool
    formatted: bool


@dataclass(frozen=True)
class Written:
    """A response as it was sampled, with all that a grader may look at.

    Attributes:
        problem: that was asked.
        asked: the prompt, as the task gave it.
        prompt: its text.
        prompt_ids: its token ids.
        response: the text of the response, without the tokens that end or pad it.
        token_ids: of the response, with its end.
        truncated: it was cut at the longest length.
    """

    problem: Problem
    asked: str | Chat
    prompt: str
    prompt_ids: Sequence[int]
    response: str
    token_ids: Sequence[int]
    truncated: bool


@dataclass(frozen=True)
class Worked:
    """A solved problem: the thought and the answer of a demonstration."""

    thought: str
    answer: str


class Source(Protocol):
    """Where problems come from and how an answer to one is graded."""

    @property
    def digest(self) -> str:
        """What tells one state of the data apart from another; empty where the specification says it all."""

    @property
    def shared(self) -> frozenset[str]:
        """Questions that both splits ask, as :func:`stepscope.results.same_text` has them."""

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of ``train`` or ``test``, in a fixed order."""

    def grade(self, problem: Problem, answer: str) -> float:
        """Credit in [0, 1] for the text of an answer; 1 is correct."""

    def worked(self, problem: Problem) -> Worked:
        """A worked solution.

        Raises:
            TaskError: the source has none.
        """


class Task(Protocol):
    """What is asked and how a response is scored."""

    @property
    def spec(self) -> str:
        """The specification it was loaded from, for example ``arithmetic``."""

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of ``train`` or ``test``, in a fixed order."""

    def prompt(self, problem: Problem, tokenizer: Any) -> str | Chat:
        """What is asked: a text, or messages for the tokenizer's chat template."""

    def score(self, problem: Problem, response: str) -> Score:
        """Score of a response: its text without the tokens that end or pad it."""

    def formatted(self, response: str) -> bool:
        """Whether a response keeps the format; the same verdict as in :meth:`score`."""

    def demonstration(self, problem: Problem) -> str:
        """A full worked response in the answer format; it scores as correct and formatted.

        Raises:
            TaskError: the task has no worked solution, or one that the task itself does not take.
        """


def require_split(split: str) -> None:
    """Refuse a split that does not exist.

    Raises:
        TaskError: ``split`` is neither ``train`` nor ``test``.
    """
    if split not in SPLITS:
        raise TaskError(f"unknown split {split!r}; the splits are train and test")

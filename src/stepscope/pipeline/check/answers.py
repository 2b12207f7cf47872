"""Where do the answers of a checkpoint stand? A few responses, read in every answer format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepscope.errors import BatchError, TaskError
from stepscope.pipeline.inputs.tasks import open_task
from stepscope.policy.check.findings import Finding
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.state import Policy
from stepscope.tasks import Problem, Score, TemplatedTask
from stepscope.tasks.formats.response import AnswerFormat, LastNumber, answer_formats
from stepscope.tasks.problem import Chat

NUM_RESPONSES = 16
MAX_TOKENS = 512
"""Longest response sampled here, so that a check stays a matter of seconds to minutes."""


@dataclass(frozen=True)
class _Recorder:
    """A task that keeps what it is asked to score."""

    task: TemplatedTask
    seen: list[tuple[Problem, str]] = field(default_factory=list)

    @property
    def spec(self) -> str:
        return self.task.spec

    def problems(self, split: str) -> Sequence[Problem]:
        return self.task.problems(split)

    def prompt(self, problem: Problem, tokenizer: Any) -> str | Chat:
        return self.task.prompt(problem, tokenizer)

    def score(self, problem: Problem, response: str) -> Score:
        self.seen.append((problem, response))
        return Score(0.0, False, False)

    def formatted(self, response: str) -> bool:
        return self.task.formatted(response)

    def demonstration(self, problem: Problem) -> str:
        return self.task.demonstration(problem)


@dataclass(frozen=True)
class _Count:
    """How an answer format fares: answers found, and right ones among them."""

    stands: AnswerFormat
    found: int
    right: int

    def __str__(self) -> str:
        return f"{self.stands.name} {self.found} ({self.right} right)"


def answer_findings(policy: Policy, spec: str | None) -> list[Finding]:
    """Which answer formats find an answer in sampled responses, and which of those answers are right.

    Args:
        policy: samples ``NUM_RESPONSES`` responses of at most ``MAX_TOKENS`` tokens, always the same.
        spec: the task, or None for the one the checkpoint names; without either nothing is found.

    Raises:
        TaskError: ``spec`` cannot be loaded.
    """
    if not (spec or policy.settings.task):
        return []
    try:
        task = open_task(spec, policy)
        recorder = _Recorder(task)
        split = "test" if len(task.problems("test")) else "train"
        settings = policy.settings
        short = replace(settings, max_response_tokens=min(settings.max_response_tokens, MAX_TOKENS))
        sampled = sample_rollouts(
            replace(policy, settings=short),
            recorder,
            num_prompts=min(NUM_RESPONSES, len(task.problems(split))),
            group_size=1,
            seed=0,
            split=split,
        )
    except (TaskError, BatchError) as error:
        if spec and isinstance(error, TaskError):
            raise
        return [replace(Finding.from_error(error), level="warn")]
    formats = answer_formats()
    if task.answer_format not in formats:
        formats.append(task.answer_format)
    counts = [_count(task, stands, recorder.seen) for stands in formats]
    cut = int(sampled.truncated.sum())
    return [verdict(counts, task.answer_format, len(recorder.seen), cut, short.max_response_tokens)]


def _count(task: TemplatedTask, stands: AnswerFormat, seen: list[tuple[Problem, str]]) -> _Count:
    read = [(problem, stands.read(task.opening + response).answer) for problem, response in seen]
    grades = [task.source.grade(problem, answer) for problem, answer in read if answer is not None]
    return _Count(stands, len(grades), sum(grade >= 1 for grade in grades))


def verdict(counts: Sequence[_Count], chosen: AnswerFormat, total: int, cut: int, longest: int) -> Finding:
    """Is the answer format that is set the one the responses keep?

    A better one finds at least twice as many answers. The last number, which any text with a digit has, is
    only proposed where it finds right ones and no other format finds anything to speak of.
    """
    mine = next(c for c in counts if c.stands == chosen)
    what = f"answers found in {total} responses: {', '.join(map(str, counts))}; the format is {chosen.name}"
    if cut:
        what += f"; {cut} responses are cut at {longest} tokens"
    named = [c for c in counts if not isinstance(c.stands, LastNumber)]
    best = max(named, key=lambda c: (c.found, c.right))
    if 4 * best.found < total:
        best = next((c for c in counts if isinstance(c.stands, LastNumber) and c.right), best)
    if best.stands != chosen and best.found >= max(2 * mine.found, 1) and best.right >= mine.right:
        return Finding("warn", what, f"use loss.answer_format={best.stands.name} (training: answer_format)")
    if not mine.found:
        return Finding(
            "warn",
            what,
            "no answer is found: look at the prompts, and set loss.prompt_template to that of the run",
        )
    return Finding("ok", what)

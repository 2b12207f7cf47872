"""Where do the answers of a checkpoint stand? Responses read in every answer format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepscope.policy.check.findings import Finding
from stepscope.results import Rollouts
from stepscope.tasks import Problem, TemplatedTask
from stepscope.tasks.formats.response import AnswerFormat, LastNumber, answer_formats
from stepscope.tasks.problem import SPLITS


@dataclass(frozen=True)
class _Count:
    """How an answer format fares: answers found, and right ones among them."""

    stands: AnswerFormat
    found: int
    right: int

    def __str__(self) -> str:
        return f"{self.stands.name} {self.found} ({self.right} right)"


def answer_finding(task: TemplatedTask, sampled: Rollouts) -> tuple[Finding, str]:
    """Which answer formats find an answer in sampled responses, and which of those answers are right.

    Args:
        task: that was asked.
        sampled: its responses.

    Returns:
        The finding, and the name of the format to set instead, or "".
    """
    problems = {p.prompt_id: p for split in SPLITS for p in task.problems(split)}
    seen = [(problems[i], text) for i, text in zip(sampled.prompt_ids, sampled.responses, strict=True)]
    formats = answer_formats()
    if task.answer_format not in formats:
        formats.append(task.answer_format)
    counts = [_count(task, stands, seen) for stands in formats]
    cut = int(sampled.truncated.sum())
    return verdict(counts, task.answer_format, len(seen), cut, sampled.max_response_tokens)


def _count(task: TemplatedTask, stands: AnswerFormat, seen: Sequence[tuple[Problem, str]]) -> _Count:
    read = [(problem, stands.read(task.opening + response).answer) for problem, response in seen]
    grades = [task.source.grade(problem, answer) for problem, answer in read if answer is not None]
    return _Count(stands, len(grades), sum(grade >= 1 for grade in grades))


def verdict(
    counts: Sequence[_Count], chosen: AnswerFormat, total: int, cut: int, longest: int
) -> tuple[Finding, str]:
    """Is the answer format that is set the one the responses keep? And which is to be set instead, if any.

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
        cure = f"use loss.answer_format={best.stands.name} (training: answer_format)"
        return Finding("warn", what, cure), best.stands.name
    if not mine.found:
        cure = "no answer is found: look at the prompts, and set loss.prompt_template to that of the run"
        return Finding("warn", what, cure), ""
    return Finding("ok", what), ""

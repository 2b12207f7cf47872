"""Problems that are stored as data: which of them ask the same, and which state of the data they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stepscope.errors import TaskError
from stepscope.results import same_text
from stepscope.tasks.problem import SPLITS, Problem, Worked, require_split


@dataclass(frozen=True)
class Stored:
    """A source that holds all its problems.

    A problem's metadata has ``where`` (file and line), ``solution`` (the thought of its demonstration) and,
    where that came as a whole response, ``shown`` (the answer it gave).

    Attributes:
        rows: split to its problems, in the order of the data.
    """

    rows: dict[str, tuple[Problem, ...]]

    def problems(self, split: str) -> Sequence[Problem]:
        """The rows of a split in the order of the data, copies included."""
        require_split(split)
        return self.rows[split]

    def worked(self, problem: Problem) -> Worked:
        """The row's solution, an empty thought where it has none, and its answer."""
        return Worked(problem.metadata["solution"], problem.metadata.get("shown", problem.answer))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, questions, answers and solutions; where the file lies does not enter."""
        found = hashlib.sha256()
        for split in SPLITS:
            for problem in self.rows[split]:
                content = {k: v for k, v in problem.metadata.items() if k != "where"}
                row = [problem.prompt_id, problem.question, problem.answer, content]
                found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return found.hexdigest()

    @cached_property
    def shared(self) -> frozenset[str]:
        """Questions that both splits ask, as :func:`stepscope.results.same_text` has them."""
        train, test = ({same_text(p.question) for p in self.rows[split]} for split in SPLITS)
        return frozenset(train & test)

    def grade(self, problem: Problem, answer: str) -> float:
        """Credit of an answer; each source has its own."""
        raise NotImplementedError

    def refuse_contradictions(self) -> None:
        """A question is its text: two rows that ask it must take the same answer.

        Raises:
            TaskError: naming the first two that do not, and how many more there are.
        """
        first: dict[str, Problem] = {}
        wrong: list[tuple[Problem, Problem]] = []
        for problem in (p for split in SPLITS for p in self.rows[split]):
            other = first.setdefault(same_text(problem.question), problem)
            if other.answer != problem.answer and self.grade(other, problem.answer) < 1:
                wrong.append((other, problem))
        if wrong:
            old, new = wrong[0]
            more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
            raise TaskError(
                f"{new.metadata['where']}: asks what {old.metadata['where']} asks, with another answer "
                f"({new.answer[:40]!r}, {old.answer[:40]!r} there){more}; leave one of them out"
            )

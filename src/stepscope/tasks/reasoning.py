"""Any task of reasoning-gym with its own scorer (Stojanovski et al. 2025): generated, verifiable, offline.

Generation and scoring both run in the helper process: the scorers evaluate text, and some generators depend
on Python's hash seed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from stepscope.errors import TaskError
from stepscope.tasks.options import format_options, parse_options, take_count
from stepscope.tasks.problem import Problem, Worked, require_split
from stepscope.tasks.worker import shared_worker

MAX_CHARACTERS = 20_000
MAX_PROBLEMS = 10_000
ITEM_LIMIT = 120.0
SCORE_LIMIT = 6.0


@dataclass(frozen=True)
class ReasoningGym:
    """Source of the tasks ``rg:NAME`` and ``rg:NAME:key=value,...``.

    Problems are generated when asked for, and each depends on its own number only. The hash of a question
    decides its split (a quarter of all questions are test questions), so the splits cannot overlap. In a task
    with few different questions one may come twice within a split.

    Attributes:
        name: of the reasoning-gym dataset.
        config: its options.
        seed: first seed of the generator.
        train_size: problems of the training split.
        test_size: problems of the test split.
    """

    name: str
    config: dict[str, Any]
    seed: int = 0
    train_size: int = 4_000
    test_size: int = 500
    _cache: dict[str, Problem] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_options(cls, text: str) -> ReasoningGym:
        """Read ``NAME`` or ``NAME:size=500,test_size=100,seed=0,min_terms=2``.

        Raises:
            TaskError: no such dataset, no such option, or the dataset refuses a value.
        """
        spec = f"rg:{text}"
        name, _, options_text = text.partition(":")
        options = parse_options(options_text, spec)
        train = take_count(options, "size", cls.train_size, spec)
        test = take_count(options, "test_size", cls.test_size, spec)
        seed = take_count(options, "seed", cls.seed, spec, least=0)
        if max(train, test) > MAX_PROBLEMS:
            raise TaskError(f"task {spec!r}: at most {MAX_PROBLEMS} problems a split, got {max(train, test)}")
        reply = _ask(
            {"op": "describe", "name": name, "config": json.dumps(options)}, ITEM_LIMIT, f"task {spec!r}"
        )
        if "names" in reply:
            close = difflib.get_close_matches(name, reply["names"], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TaskError(
                f"task {spec!r}: reasoning-gym has no dataset {name!r}{hint}; it has "
                f"{', '.join(reply['names'])}"
            )
        if "options" in reply:
            wrong = ", ".join(sorted(set(options) - set(reply["options"])))
            raise TaskError(
                f"task {spec!r}: {name} has no option {wrong}; options are {', '.join(reply['options'])}, "
                "and size, test_size, seed"
            )
        if "refused" in reply:
            raise TaskError(f"task {spec!r}: {name} refuses these options ({reply['refused']})")
        return cls(name, options, seed, train, test)

    @property
    def prefix(self) -> str:
        """Beginning of the prompt ids: the options that change what is asked, and nothing else."""
        options = self.config | ({"seed": self.seed} if self.seed else {})
        return f"rg:{self.name}:{format_options(options)}" if options else f"rg:{self.name}"

    def problems(self, split: str) -> Sequence[Problem]:
        """A sequence that generates each problem at its first use."""
        require_split(split)
        return _Generated(self, split, self.train_size if split == "train" else self.test_size)

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of a split.

        Raises:
            TaskError: the generator fails, or the task has too few different questions for two splits.
        """
        prompt_id = f"{self.prefix}/{split}/{index}"
        if prompt_id not in self._cache:
            question = {"op": "item", "seed": self.seed, "split": split, **self._item(index)}
            reply = _ask(question, ITEM_LIMIT, prompt_id)
            if "exhausted" in reply:
                raise TaskError(
                    f"{prompt_id}: none of {reply['exhausted']} generated questions belongs to the split; "
                    "the task has too few different questions, make it harder through its options"
                )
            metadata = {"index": index, "seed": reply["seed"], "has_answer": reply["answer"] is not None}
            self._cache[prompt_id] = Problem(prompt_id, reply["question"], reply["answer"] or "", metadata)
        return self._cache[prompt_id]

    def grade(self, problem: Problem, answer: str) -> float:
        """The score of the task's own scorer, partial credit included; 0 if it fails or takes too long."""
        if len(answer) > MAX_CHARACTERS:
            return 0.0
        item = self._item(problem.metadata["index"])
        question = {"op": "score", "seed": problem.metadata["seed"], "answer": answer, **item}
        reply = shared_worker().ask(question, time_limit=SCORE_LIMIT)
        return 0.0 if reply is None else float(reply["value"])

    def worked(self, problem: Problem) -> Worked:
        """The reference answer after an empty thought: reasoning-gym gives no solutions.

        Raises:
            TaskError: the item has no reference answer, or its own scorer does not take it for correct.
        """
        if not problem.metadata["has_answer"]:
            raise TaskError(
                f"{problem.prompt_id}: {self.name} has no reference answers, so nothing to demonstrate"
            )
        if self.grade(problem, problem.answer.strip()) < 1:
            raise TaskError(f"{problem.prompt_id}: the scorer of {self.name} refuses the reference answer")
        return Worked("", problem.answer.strip())

    def _item(self, index: int) -> dict[str, Any]:
        return {"name": self.name, "config": json.dumps(self.config), "index": index}


@dataclass(frozen=True)
class _Generated(Sequence[Problem]):
    source: ReasoningGym
    split: str
    size: int

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self.source.problem(self.split, i) for i in range(self.size)[index]]
        return self.source.problem(self.split, range(self.size)[index])


def _ask(question: dict[str, Any], limit: float, where: str) -> dict[str, Any]:
    reply = shared_worker().ask(question, time_limit=limit)
    if reply is None:
        raise TaskError(
            f"{where}: reasoning-gym failed or took more than {limit:.0f} s to generate; choose other options"
        )
    return reply

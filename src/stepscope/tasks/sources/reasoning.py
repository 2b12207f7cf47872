"""Any task of reasoning-gym with its own scorer (Stojanovski et al. 2025): generated, verifiable, offline.

Generation and scoring both run in the helper process: the scorers evaluate text, and some generators depend
on Python's hash seed. A task whose scorer gives full marks to nonsense is refused when it is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, overload

from stepscope.errors import TaskError
from stepscope.tasks.judge.guards import EVALUATING
from stepscope.tasks.judge.worker import shared_worker
from stepscope.tasks.problem import Problem, Worked, require_split
from stepscope.tasks.sources.options import format_options, parse_options, take_count, take_flag

MAX_CHARACTERS = 20_000
MAX_PROBLEMS = 10_000
ITEM_LIMIT = 120.0
"""Seconds: acre computes five for each seed, and a test question takes four seeds on average."""

SCORE_LIMIT = 6.0

NONSENSE = ("banana", "nan", "1*2*3*4", "((((")
"""Right nowhere: a word, a number that is none, a term of other numbers than asked for, open brackets."""

PROBED = 4
"""Problems whose scorer is tried with them."""

UNISOLATED = "STEPSCOPE_UNISOLATED"
"""Environment variable that allows, set to 1, scorers that evaluate answers where nothing isolates them."""


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
            TaskError: no such dataset, no such option, or the dataset refuses a value; its scorer evaluates
                answers and this system cannot isolate it; its scorer rewards nonsense.
        """
        spec = f"rg:{text}"
        name, _, options_text = text.partition(":")
        options = parse_options(options_text, spec)
        train = take_count(options, "size", cls.train_size, spec, most=MAX_PROBLEMS)
        test = take_count(options, "test_size", cls.test_size, spec, most=MAX_PROBLEMS)
        seed = take_count(options, "seed", cls.seed, spec, least=0)
        accepted = take_flag(options, "accept_unsound", spec)
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
                "and size, test_size, seed, accept_unsound"
            )
        if "refused" in reply:
            raise TaskError(
                f"task {spec!r}: {name} refuses these options ({' '.join(reply['refused'][:200].split())})"
            )
        _require_isolation(name, spec)
        source = cls(name, options, seed, train, test)
        if not accepted:
            source._require_sound(spec)
        return source

    @property
    def prefix(self) -> str:
        """Beginning of the prompt ids: the options that change what is asked, and nothing else."""
        options = self.config | ({"seed": self.seed} if self.seed else {})
        return f"rg:{self.name}:{format_options(options)}" if options else f"rg:{self.name}"

    @property
    def digest(self) -> str:
        """The version of reasoning-gym, whose generators make the problems."""
        return f"reasoning-gym {version('reasoning-gym')}"

    @property
    def shared(self) -> frozenset[str]:
        """None: a question's hash decides its split."""
        return frozenset()

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
        return self._verdict(problem, answer) or 0.0

    def worked(self, problem: Problem) -> Worked:
        """The reference answer after an empty thought: reasoning-gym gives no solutions.

        Raises:
            TaskError: the item has no reference answer.
        """
        if not problem.metadata["has_answer"]:
            raise TaskError(
                f"{problem.prompt_id}: {self.name} has no reference answers, so nothing to demonstrate"
            )
        return Worked("", problem.answer.strip())

    def _verdict(self, problem: Problem, answer: str) -> float | None:
        """The scorer's word; None if it failed, took too long, or said what is no score."""
        item = self._item(problem.metadata["index"])
        question = {"op": "score", "seed": problem.metadata["seed"], "answer": answer, **item}
        reply = shared_worker().ask(question, time_limit=SCORE_LIMIT)
        if reply is None:
            warnings.warn(
                f"rg:{self.name}: the scorer gave no verdict on an answer (it failed, took more than "
                f"{SCORE_LIMIT:.0f} s, or its reward is not from 0 to 1); such an answer counts as wrong",
                stacklevel=2,
            )
            return None
        return float(reply["value"])

    def _require_sound(self, spec: str) -> None:
        """Try the scorer with nonsense, and with 0 where the reference is another number.

        Raises:
            TaskError: it gives full marks, or no verdict on anything.
        """
        verdicts = []
        for problem in self.problems("train")[:PROBED]:
            for answer in (*NONSENSE, *(["0"] if _is_far_from_zero(problem.answer) else [])):
                verdicts.append(self._verdict(problem, answer))
                if (verdicts[-1] or 0.0) >= 1 and answer != problem.answer:
                    raise TaskError(
                        f"task {spec!r}: the scorer of {self.name} takes {answer!r} for a correct answer to "
                        f"{problem.prompt_id} (reference {problem.answer[:40]!r}), and training would learn "
                        "that; choose another task, or give the option accept_unsound=true"
                    )
        if all(verdict is None for verdict in verdicts):
            raise TaskError(
                f"task {spec!r}: the scorer of {self.name} gives no verdict on anything it was tried with "
                "in the helper process; choose another task"
            )

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


def _require_isolation(name: str, spec: str) -> None:
    missing = shared_worker().isolation() if name in EVALUATING else ""
    if missing and os.environ.get(UNISOLATED) != "1":
        raise TaskError(
            f"task {spec!r}: the scorer of {name} evaluates answers as code and cannot be isolated here "
            f"({missing}); choose another task, or set {UNISOLATED}=1 in the environment to run it anyway"
        )


def _is_far_from_zero(text: str) -> bool:
    try:
        return abs(float(text)) > 0.01
    except ValueError:
        return False


def _ask(question: dict[str, Any], limit: float, where: str) -> dict[str, Any]:
    reply = shared_worker().ask(question, time_limit=limit)
    if reply is None:
        raise TaskError(
            f"{where}: reasoning-gym failed or took more than {limit:.0f} s to generate; choose other options"
        )
    return reply

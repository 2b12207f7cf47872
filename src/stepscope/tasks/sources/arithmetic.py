"""Built-in sums with a difficulty dial and a chain of thought that a tiny model can learn.

A question is ``12+7-5``; its chain of thought works from left to right, ``12+7=19;19-5=14``. Partial sums are
never negative.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.problem import Problem, Worked, require_split
from stepscope.tasks.sources.options import format_options, parse_options, require_known, take_count

_MISSES = 500
MAX_PROBLEMS = 1_000_000
"""Most problems of a split: they are made at once."""
_INTEGER = re.compile(r"-?[0-9]{1,15}", re.ASCII)
_RANGE = re.compile(r"([0-9]+)-([0-9]+)", re.ASCII)


@dataclass(frozen=True)
class Dial:
    """Difficulty.

    Attributes:
        terms: fewest and most terms of a sum; drawn uniformly.
        digits: fewest and most digits of a term; drawn uniformly for each term.
        ops: ``+`` or ``+-``.
    """

    terms: tuple[int, int] = (3, 5)
    digits: tuple[int, int] = (1, 1)
    ops: str = "+-"

    def prefix(self) -> str:
        """Beginning of the prompt ids: ``arithmetic``, and the options that are not at their default."""
        default = Dial()
        changed: dict[str, Any] = {}
        for name, (low, high), alone in (
            ("terms", self.terms, self.terms[1]),
            ("digits", self.digits, 1),
        ):
            if (low, high) != getattr(default, name):
                changed[name] = str(high) if low == alone else f"{low}-{high}"
        if self.ops != default.ops:
            changed["ops"] = self.ops
        return f"arithmetic:{format_options(changed)}" if changed else "arithmetic"


@dataclass(frozen=True)
class Arithmetic:
    """Generated sums; source of the task ``arithmetic``.

    Attributes:
        dial: difficulty.
        train_size: most problems of the training split (fewer where the dial allows no more different ones).
        test_size: most problems of the test split.
    """

    dial: Dial = Dial()
    train_size: int = 10_000
    test_size: int = 1_000

    @classmethod
    def from_options(cls, text: str) -> Arithmetic:
        """Read the dial from ``terms=3-5,digits=1,ops=+-,train=10000,test=1000``.

        Raises:
            TaskError: an option is unknown or out of range.
        """
        spec = f"arithmetic:{text}" if text else "arithmetic"
        options = parse_options(text, spec)
        require_known(options, ("terms", "digits", "ops", "train", "test"), spec)
        train = take_count(options, "train", cls.train_size, spec, most=MAX_PROBLEMS)
        test = take_count(options, "test", cls.test_size, spec, most=MAX_PROBLEMS)
        default = Dial()
        ops = options.get("ops", default.ops)
        if ops not in ("+", "+-"):
            raise TaskError(f"task {spec!r}: ops must be + or +-, got {ops!r}")
        terms = _read_range(options, "terms", default.terms, spec, least=2, most=20)
        digits = _read_range(options, "digits", default.digits, spec, least=1, most=9)
        return cls(Dial(terms, digits, ops), train, test)

    @property
    def digest(self) -> str:
        """Empty: the specification says all."""
        return ""

    @property
    def shared(self) -> frozenset[str]:
        """None: a question's hash decides its split."""
        return frozenset()

    def problems(self, split: str) -> Sequence[Problem]:
        """Distinct sums; the hash of a question decides its split, so the splits cannot overlap."""
        require_split(split)
        return _generate(self.dial, self.train_size, self.test_size)[split]

    def grade(self, problem: Problem, answer: str) -> float:
        """1 for the integer itself; an expression such as ``12+7`` is no answer."""
        match = _INTEGER.fullmatch(answer.strip())
        return float(match is not None and int(match.group()) == int(problem.answer))

    def worked(self, problem: Problem) -> Worked:
        """The sum from left to right, one step per operator."""
        total, *rest = re.findall(r"[+-]?[0-9]+", problem.question)
        steps = []
        for term in rest:
            value = int(total) + int(term)
            steps.append(f"{total}{term}={value}")
            total = str(value)
        return Worked(";".join(steps), problem.answer)


def _read_range(
    options: dict[str, Any], key: str, default: tuple[int, int], spec: str, *, least: int, most: int
) -> tuple[int, int]:
    value = options.get(key)
    if value is None:
        return default
    match = _RANGE.fullmatch(str(value))
    if match:
        low, high = int(match.group(1)), int(match.group(2))
    elif isinstance(value, int) and not isinstance(value, bool):
        low, high = (1 if key == "digits" else value), value
    else:
        raise TaskError(f"task {spec!r}: {key} must be a whole number or a range such as 2-4, got {value!r}")
    if not least <= low <= high <= most:
        raise TaskError(f"task {spec!r}: {key} must lie between {least} and {most}, got {value!r}")
    return low, high


def _draw(generator: random.Random, dial: Dial) -> tuple[str, int]:
    while True:
        count = generator.randint(*dial.terms)
        question, total = "", 0
        for i in range(count):
            digits = generator.randint(*dial.digits)
            term = generator.randint(10 ** (digits - 1), 10**digits - 1)
            op = generator.choice(dial.ops) if i else ""
            question += f"{op}{term}"
            total += -term if op == "-" else term
            if total < 0:
                break
        else:
            return question, total


@functools.lru_cache(maxsize=16)
def _generate(dial: Dial, train_size: int, test_size: int) -> dict[str, tuple[Problem, ...]]:
    """One stream of distinct questions, dealt to the splits; a larger size only makes a split longer."""
    prefix = dial.prefix()
    generator = random.Random(f"stepscope {prefix}")
    wanted = {"train": train_size, "test": test_size}
    found: dict[str, list[Problem]] = {"train": [], "test": []}
    seen: set[str] = set()
    misses = 0
    while misses < _MISSES and any(len(found[s]) < wanted[s] for s in wanted):
        question, answer = _draw(generator, dial)
        if question in seen:
            misses += 1
            continue
        misses = 0
        seen.add(question)
        split = "test" if hashlib.blake2b(question.encode(), digest_size=1).digest()[0] < 32 else "train"
        rows = found[split]
        if len(rows) < wanted[split]:
            rows.append(Problem(f"{prefix}/{split}/{len(rows)}", question, str(answer)))
    return {split: tuple(rows) for split, rows in found.items()}

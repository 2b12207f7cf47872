"""The helper process of :mod:`stepscope.tasks.judge.worker`: its operations.

Questions are ``equal`` (math-verify), and for reasoning-gym ``describe``, ``item`` and ``score``. How they
are asked and answered, and what keeps an answer from doing harm, is in :mod:`stepscope.tasks.judge.forking`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import random
import re
import signal
import types
from pathlib import Path
from typing import Any

from stepscope.tasks.judge.forking import Operations, Server
from stepscope.tasks.judge.guards import EVALUATING, EXPRESSIONS, read_literals_only, require_expression

SOFT_LIMIT = 2
"""Seconds given to each step of math-verify, and to a scorer, before it is interrupted from within."""

DATASET_SIZE = 10_000
SEEDS_APART = 1_000_000
TRIES = 64
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_FORMULA = re.compile(r"[\\^_{(\[]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])")

BAD_ANSWER = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    PermissionError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a scorer may raise over text that is no answer at all."""


def as_latex(text: str) -> str:
    """Mark a formula as one, so that it is read as a whole and not searched for numbers."""
    if "$" in text or "boxed" in text or _WORD.search(text) or not _FORMULA.search(text):
        return text
    return f"${text}$"


def equal(reference: str, answer: str) -> bool:
    """Math-verify's verdict."""
    math_verify = importlib.import_module("math_verify")
    gold = math_verify.parse(as_latex(reference), parsing_timeout=SOFT_LIMIT)
    value = math_verify.parse(as_latex(answer), parsing_timeout=SOFT_LIMIT)
    return bool(math_verify.verify(gold, value, timeout_seconds=SOFT_LIMIT))


@functools.cache
def load_math_verify() -> None:
    """Import it, build its grammar, and let it meet the usual notation: children inherit what it caches."""
    equal("$\\frac{1}{2}x^{2}+\\sqrt{3}$", "$\\frac{3}{4}(x-1)$")
    equal("$(1, 2]$", "\\boxed{2\\pi}")
    equal("1/2", "0.5")


@functools.cache
def registry() -> dict[str, Any]:
    """All reasoning-gym tasks: name to (dataset class, configuration class)."""
    registered: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
    read_literals_only()
    return registered


@functools.lru_cache(maxsize=24)
def dataset(name: str, config: str, seed: int) -> Any:
    """One seed's dataset, always of the same size: in some tasks the size changes the items."""
    random.seed(seed)
    create = importlib.import_module("reasoning_gym").create_dataset
    return create(name, **json.loads(config), seed=seed, size=DATASET_SIZE)


@functools.lru_cache(maxsize=4096)
def entry(name: str, config: str, seed: int, index: int) -> dict[str, Any]:
    """Item ``index``; the global generator is seeded too, because some tasks use it."""
    random.seed(seed + index)
    item: dict[str, Any] = dataset(name, config, seed)[index]
    return item


def describe(name: str, config: str) -> dict[str, Any]:
    """Whether a task exists and takes these options."""
    names = sorted(registry())
    if name not in names:
        return {"names": names}
    config_class = registry()[name][1]
    known = [f.name for f in dataclasses.fields(config_class) if f.name not in ("seed", "size")]
    if set(json.loads(config)) - set(known):
        return {"options": known}
    try:
        dataset(name, config, 0)
    except (AssertionError, *BAD_ANSWER) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"ok": True}


def item(name: str, config: str, seed: int, index: int, split: str) -> dict[str, Any]:
    """Item ``index`` of a split: the first candidate whose question hashes to that split."""
    for attempt in range(TRIES):
        tried = seed + SEEDS_APART * (2 * attempt + (split == "test"))
        found = entry(name, config, tried, index)
        bucket = hashlib.blake2b(found["question"].encode(), digest_size=1).digest()[0]
        if (bucket < 64) == (split == "test"):
            answer = found["answer"]
            return {
                "question": found["question"],
                "answer": answer if isinstance(answer, str) or answer is None else str(answer),
                "seed": tried,
            }
    return {"exhausted": TRIES}


def score(name: str, config: str, seed: int, index: int, answer: str) -> float:
    """The task's own scorer; text that it cannot read earns nothing."""
    signal.alarm(SOFT_LIMIT)
    try:
        if name in EXPRESSIONS:
            require_expression(answer)
        return float(dataset(name, config, seed).score_answer(answer, entry(name, config, seed, index)))
    except (TimeoutError, *BAD_ANSWER):
        return 0.0
    finally:
        signal.alarm(0)


def out_of_time(signum: int, frame: types.FrameType | None) -> None:
    """Interrupt a scorer."""
    raise TimeoutError


def prepare(op: str, question: dict[str, Any]) -> None:
    """Load and generate what a question needs: the time this takes says nothing about the answer."""
    if op == "equal":
        load_math_verify()
    elif op == "score":
        entry(question["name"], question["config"], question["seed"], question["index"])
    else:
        registry()


def answer_to(op: str, question: dict[str, Any]) -> dict[str, Any]:
    """Dispatch one question."""
    if op == "equal":
        return {"value": equal(**question)}
    if op == "score":
        return {"value": score(**question)}
    if op == "item":
        return item(**question)
    return describe(**question)


def loaded() -> object:
    """How much has been loaded and generated so far."""
    return tuple(cached.cache_info().misses for cached in (load_math_verify, registry, dataset, entry))


def main() -> None:
    """Serve until standard input ends; the working directory is the helper's own."""
    signal.signal(signal.SIGALRM, out_of_time)
    operations = Operations(
        prepare=prepare,
        answer=answer_to,
        reads_answer=lambda op: op in ("equal", "score"),
        evaluates=lambda arguments: arguments.get("name") in EVALUATING,
        trial={"equal": {"op": "equal", "reference": "1/2", "answer": r"$\frac{1}{2}$"}}.get,
        loaded=loaded,
    )
    Server(operations, Path.cwd()).serve()

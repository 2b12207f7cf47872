"""The helper process of :mod:`stepscope.tasks.worker`; run as a script, imports nothing of stepscope.

Reads one JSON question per line from standard input; writes an empty line when all it needs for that question
is loaded, and then the answer as one line of JSON. A question that makes it crash or hang costs the process,
not the trainer. Some scorers of reasoning-gym evaluate the answer as Python, so from the start the process
may not start programs, write files or open connections.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import tempfile
import types
from typing import Any

MEMORY_LIMIT = 6 << 30
ERROR_LOG_LIMIT = 1 << 20
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = (
    "ctypes.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.spawn",
    "shutil.",
    "socket.connect",
    "socket.sendto",
    "subprocess.Popen",
    "webbrowser.open",
)
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
    """Import it and build its grammar."""
    equal("1", "$x$")


@functools.cache
def registry() -> dict[str, Any]:
    """All reasoning-gym tasks: name to (dataset class, configuration class)."""
    registered: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
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
        entry(**{k: question[k] for k in ("name", "config", "seed", "index")})
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


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no program is started, no file written or removed, no connection opened from here."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"{event} is not allowed in the helper process")


def settle_matplotlib() -> None:
    """Let matplotlib choose its folder while one can be made; reasoning-gym imports it and never plots."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.get_configdir()
        matplotlib.get_cachedir()


def main() -> None:
    """Serve until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (ERROR_LOG_LIMIT, ERROR_LOG_LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, out_of_time)
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    ctypes.pythonapi.Py_IsInitialized()  # loaded now: sympy imports ctypes, the hook refuses it any library
    settle_matplotlib()
    sys.addaudithook(refuse)
    for line in sys.stdin:
        question = json.loads(line)
        op = question.pop("op")
        prepare(op, question)
        replies.write("\n")
        replies.write(json.dumps(answer_to(op, question)) + "\n")


if __name__ == "__main__":
    main()

"""How the helper answers: it loads what questions need, and forks a child for what an answer needs.

The loaded process never evaluates an answer. A child does, behind the system-call filter of
:mod:`stepscope.tasks.judge.jail`, and says one number over a pipe of its own; killing it costs a fork, not a
start.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from stepscope.tasks.judge.jail import SystemCalls, end_with_parent, isolate, limit_resources

BATCH = 1000
"""Answers a child reads before the next one takes its place; one where the scorer may evaluate the answer."""

MAX_REPLY = 4096
TRIAL_LIMIT = 60.0


@dataclass(frozen=True)
class Operations:
    """What a helper can do.

    Attributes:
        prepare: loads and generates what a question needs; the time this takes says nothing about the answer.
        answer: answers a question, ``value`` being the verdict where there is one.
        reads_answer: whether a question holds untrusted text, so that a child has to answer it.
        evaluates: whether the scorer may evaluate that text.
        trial: a question for a child whose verdict is true, if the operation has one: were something refused
            that scoring needs, every answer would count as wrong.
        loaded: changes whenever ``prepare`` loaded or generated anything a child would not have.
    """

    prepare: Callable[[str, dict[str, Any]], None]
    answer: Callable[[str, dict[str, Any]], dict[str, Any]]
    reads_answer: Callable[[str], bool]
    evaluates: Callable[[dict[str, Any]], bool]
    trial: Callable[[str], dict[str, Any] | None]
    loaded: Callable[[], object]


class Child:
    """A forked process that answers questions one after the other."""

    def __init__(self, operations: Operations, system_calls: SystemCalls | None, first: str) -> None:
        self.loaded, self.served = operations.loaded(), 0
        questions, self._questions = os.pipe()
        self._replies, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _live(operations, system_calls, first, questions, replies)
        os.close(questions)
        os.close(replies)

    def ask(self, line: str, deadline: float) -> bytes | None:
        """The reply to a question (the first one it knows); None at the end of the stream or of the time."""
        if self.served:
            try:
                os.write(self._questions, line.encode())
            except BrokenPipeError:
                return None
        self.served += 1
        reply = b""
        while not reply.endswith(b"\n") and len(reply) < MAX_REPLY:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                return None
            chunk = os.read(self._replies, MAX_REPLY)
            if not chunk:
                return None
            reply += chunk
        return reply

    def end(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)  # it is ours until waited for, even if it has ended
        os.waitpid(self.pid, 0)
        os.close(self._questions)
        os.close(self._replies)


def _live(
    operations: Operations, system_calls: SystemCalls | None, first: str, questions: int, replies: int
) -> NoReturn:
    """The life of a child: never returns to the code that forked it."""
    try:
        os.dup2(questions, 0)
        os.dup2(replies, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        end_with_parent()
        if system_calls is not None:
            system_calls.restrict()
        line = first
        while line:
            asked = json.loads(line)
            op, arguments = split(asked["question"])
            reply = {"number": asked["number"], **operations.answer(op, arguments)}
            os.write(1, json.dumps(reply).encode() + b"\n")
            line = sys.stdin.readline()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(1)


def split(question: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A question's operation and its arguments."""
    return question["op"], {k: v for k, v in question.items() if k != "op"}


def verdict(reply: bytes | None, number: int) -> dict[str, Any] | None:
    """What a child said to question ``number``, if it is a verdict: true, false, or a number from 0 to 1."""
    if reply is None or reply.find(b"\n") != len(reply) - 1:
        return None
    try:
        said = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or set(said) != {"number", "value"} or said["number"] != number:
        return None
    value = said["value"]
    sane = isinstance(value, bool | int | float) and math.isfinite(value) and 0 <= value <= 1
    return {"value": value} if sane else None


class Server:
    """The loaded process: standard input and output, and the child at work.

    Attributes:
        isolation: why children are not isolated; empty where they are.
    """

    def __init__(self, operations: Operations, private: Path) -> None:
        self._operations = operations
        self._child: Child | None = None
        limit_resources()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.disable(logging.CRITICAL)
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._system_calls, self.isolation = isolate(private)

    def serve(self) -> None:
        """Until standard input ends."""
        self._reply({"isolation": self.isolation})
        for line in sys.stdin:
            asked = json.loads(line)
            number, question = asked["number"], asked["question"]
            op, arguments = split(question)
            before = self._operations.loaded()
            self._operations.prepare(op, arguments)
            if self._operations.loaded() != before:
                gc.collect()
                gc.freeze()  # children share these pages as long as nobody counts references in them
                self._try(op)
            self._reply({"number": number})
            if self._operations.reads_answer(op):
                reply = self._from_child(line, number, arguments, time.monotonic() + asked["limit"])
            else:
                reply = self._operations.answer(op, arguments)
            self._reply({"number": number, "reply": reply})
        self._end_child()

    def _try(self, op: str) -> None:
        """Raises RuntimeError if children cannot do what they are for."""
        question = self._operations.trial(op)
        if question is None:
            return
        line = json.dumps({"number": 0, "question": question}) + "\n"
        if self._from_child(line, 0, split(question)[1], time.monotonic() + TRIAL_LIMIT) != {"value": True}:
            raise RuntimeError(f"a child gives no right verdict on {question}")

    def _from_child(
        self, line: str, number: int, arguments: dict[str, Any], deadline: float
    ) -> dict[str, Any] | None:
        """A verdict, or None if the child died over the question or had no verdict within the time.

        A death is asked about once more, of a new child: the question need not be its cause, earlier ones may
        have left the child in a bad state, or the kernel ended it for want of memory.
        """
        alone = self._operations.evaluates(arguments)
        for _ in range(2):
            child = self._child_for(line, alone)
            said = verdict(child.ask(line, deadline), number)
            if alone or said is None:
                self._end_child()
            if said is not None or time.monotonic() >= deadline:
                return said
        return None

    def _child_for(self, line: str, alone: bool) -> Child:
        child = self._child
        if child is None or alone or child.served >= BATCH or child.loaded != self._operations.loaded():
            self._end_child()
            child = self._child = Child(self._operations, self._system_calls, line)
        return child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _reply(self, reply: dict[str, Any]) -> None:
        self._replies.write(json.dumps(reply) + "\n")

"""A reward function of the user's own, called as TRL's GRPO trainer calls it, and held to what it returns."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from stepscope.errors import RewardError, shown
from stepscope.own_code import own_function, own_source, what_happened
from stepscope.tasks.example import Example
from stepscope.tasks.problem import Chat, Written

SIGNATURE = "reward(prompts, completions, **columns) -> list[float]"

TAKEN = frozenset(("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"))
"""What the function is given besides the columns of the data."""

NOT_PASSED = frozenset(("prompt", "completion"))
"""Columns that TRL keeps to itself."""


@dataclass(frozen=True)
class OwnReward:
    """Grades a batch of responses with a function ``reward(prompts, completions, **columns) -> list[float]``.

    Called once with a whole batch, as TRL does with the batch of a process: ``prompts`` as the data have
    them (texts, or lists of messages), ``completions`` likewise (texts without special tokens, or lists of
    one message of the assistant), the columns of the data, and ``completion_ids``, ``trainer_state``,
    ``log_extra`` and ``log_metric``. A function that does not take ``**kwargs`` gets what it names. It may
    be a coroutine.

    Attributes:
        name: ``module:function``.
        function: the function.
        state: passed as ``trainer_state``: of the checkpoint, where that has one.
    """

    name: str
    function: Callable[..., Any]
    state: Any = None

    @classmethod
    def named(cls, name: str) -> OwnReward:
        """The function of a name, imported.

        Raises:
            ConfigError: there is none; see :func:`stepscope.own_code.own_function`.
        """
        return cls(name, own_function(name, "reward"))

    @property
    def source(self) -> dict[str, str]:
        """Name, and file and SHA-256 of the module."""
        return own_source(self.name)

    def grade(self, written: Sequence[Written], tokenizer: Any) -> list[float]:
        """(seq,) rewards of a batch.

        Args:
            written: the responses, in their order.
            tokenizer: decodes them as TRL does.

        Raises:
            RewardError: the function fails, or what it returns is not one finite number for each response.
        """
        chats = any(isinstance(one.asked, Chat) for one in written)
        prompts = [copy.deepcopy(_prompt(one.asked)) for one in written]
        given = {
            "prompts": prompts,
            "completions": completions(written, tokenizer, chats=chats),
            "completion_ids": [list(one.token_ids) for one in written],
            **copy.deepcopy(_columns(written)),
            "trainer_state": SimpleNamespace(global_step=0) if self.state is None else self.state,
            "log_extra": _nothing,
            "log_metric": _nothing,
        }
        try:
            found = self.function(**self._accepted(given))
            if inspect.isawaitable(found):
                with ThreadPoolExecutor(1) as beside:  # in a notebook this thread has a loop that runs
                    found = beside.submit(asyncio.run, _awaited(found)).result()
        except Exception as error:
            raise self._refused(
                f"it raised {what_happened(error)} when it was called with {len(written)} responses and "
                f"{', '.join(given)}; mend the function",
                written[0],
            ) from error
        return self._numbers(found, written)

    def _accepted(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """All, or of a function without ``**kwargs`` what it names."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return given
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return given
        return {name: value for name, value in given.items() if name in {p.name for p in parameters}}

    def _numbers(self, found: Any, written: Sequence[Written]) -> list[float]:
        values = found.tolist() if hasattr(found, "tolist") else found
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
            raise self._refused(
                f"it returned {_kind(found)}, expected a list of {len(written)} numbers, one for each "
                f"response; its signature is {SIGNATURE}",
                written[0],
            )
        if len(values) != len(written):
            raise self._refused(
                f"it returned {len(values)} values for {len(written)} responses, expected one for each, in "
                "their order; mend the function",
                written[0],
            )
        for one, value in zip(written, values, strict=True):
            number = isinstance(value, int | float | np.integer | np.floating | np.bool_)
            if not number or not math.isfinite(value):
                raise self._refused(
                    f"it returned {shown(value)} for a response, expected a finite number; give 0 to what "
                    "cannot be graded",
                    one,
                )
        return [float(value) for value in values]

    def _refused(self, why: str, one: Written) -> RewardError:
        example = Example.ungraded(one, grader=self.name, fault=why)
        return RewardError(f"reward {self.name}: {why}", example)


def completions(written: Sequence[Written], tokenizer: Any, *, chats: bool) -> list[Any]:
    """Responses as TRL hands them to reward functions: texts without special tokens, or a message each.

    With a tokenizer that can parse its own responses (``response_template`` or ``response_schema``) the
    message is what it makes of one, and the text where it cannot.
    """
    texts = [tokenizer.decode(list(one.token_ids), skip_special_tokens=True) for one in written]
    if not chats:
        return texts
    parses = [getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")]
    if not any(parses):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return [
        [_message(tokenizer, one, text, with_prefix=parses[0])]
        for one, text in zip(written, texts, strict=True)
    ]


def _message(tokenizer: Any, one: Written, text: str, *, with_prefix: bool) -> dict[str, Any]:
    """As ``trl.chat_template_utils.parse_response``."""
    prefix = {"prefix": list(one.prompt_ids)} if with_prefix else {}
    try:
        found: dict[str, Any] | None = tokenizer.parse_response(list(one.token_ids), **prefix)
    except (ValueError, TypeError):
        found = None
    if found is None:
        return {"role": "assistant", "content": text}
    content = found.get("content")
    end = tokenizer.eos_token or ""
    return {**found, "content": content.removesuffix(end) if isinstance(content, str) else content or ""}


def _prompt(asked: str | Chat) -> Any:
    return asked if isinstance(asked, str) else [dict(message) for message in asked.messages]


def _columns(written: Sequence[Written]) -> dict[str, list[Any]]:
    rows = [one.problem.columns for one in written]
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in NOT_PASSED]
    return {name: [row.get(name) for row in rows] for name in names}


async def _awaited(found: Any) -> Any:
    return await found


def _nothing(*_: Any, **__: Any) -> None:
    """What a function logs is for the training's log, and there is none here."""


def _kind(found: Any) -> str:
    return (
        shown(found) if found is None or isinstance(found, int | float | str) else f"a {type(found).__name__}"
    )

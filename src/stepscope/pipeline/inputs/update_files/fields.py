"""What a row of a dump says of one response, under one set of names and with every type checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepscope.errors import BatchError, shown
from stepscope.pipeline.inputs.update_files.rows import STEP, Dump, Row
from stepscope.results import BoolArray, FloatArray

PROMPT = ("prompt", "input")
RESPONSE = ("response", "completion", "output")
PROMPT_IDS = ("prompt_token_ids", "prompt_ids")
RESPONSE_IDS = ("response_token_ids", "response_ids", "completion_token_ids", "completion_ids")
MASK = ("response_mask", "tool_mask", "env_mask", "loss_mask", "completion_mask")
LOGPROBS = (
    "logprobs",
    "sampling_logprobs",
    "rollout_logprobs",
    "rollout_log_probs",
    "inference_logprobs",
    "completion_logprobs",
)
OLD_LOGPROBS = ("old_logprobs", "old_log_probs", "old_per_token_logps")
ADVANTAGE = ("advantage", "advantages")
REWARD = ("reward", "rewards", "score", "total_reward")
TRUNCATED = ("truncated", "is_truncated")
CORRECT = ("correct", "acc")
GROUP = ("prompt_id", "group_id", "group_index", "uid")
"""Names under which fields are known, the first that is there wins."""

_NUMBERS = (bool, int, float)
ROUNDING = 1e-3
"""Nats that a log-prob may be above 0 by the rounding of a half type."""

LARGEST_TOKEN = 2**31
"""No vocabulary has so many."""


@dataclass(frozen=True)
class Logged:
    """One response as it was logged; None for what was not.

    Attributes:
        where: file and row, for errors.
        prompt: text, or messages.
        response: text, or messages.
        prompt_ids: token ids of the prompt.
        response_ids: token ids of the response.
        mask: (tok,) True on response tokens that the policy wrote.
        logprobs: (tok,) log-probs as the sampler gave them, nan where it gave none.
        old_logprobs: (tok,) log-probs that the loss divides by.
        advantage: of the response.
        token_advantages: (tok,) where they differ within it.
        reward: total reward.
        truncated: whether it was cut.
        correct: whether the answer was right.
        group: name of the group that shares a baseline.
    """

    where: str
    prompt: Any = None
    response: Any = None
    prompt_ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] | None = None
    mask: BoolArray | None = None
    logprobs: FloatArray | None = None
    old_logprobs: FloatArray | None = None
    advantage: float | None = None
    token_advantages: FloatArray | None = None
    reward: float | None = None
    truncated: bool | None = None
    correct: bool | None = None
    group: str | None = None

    @property
    def level(self) -> float | None:
        """The advantage, or the mean of those of the tokens that the policy wrote."""
        if self.token_advantages is None:
            return self.advantage
        own = self.token_advantages if self.mask is None else self.token_advantages[self.mask]
        return float(own.mean()) if len(own) else 0.0


def logged(
    dump: Dump,
    reward_functions: frozenset[str] = frozenset(),
    reward_weights: tuple[float, ...] | None = None,
) -> list[Logged]:
    """The rows of a dump, read.

    Args:
        dump: the rows.
        reward_functions: names of TRL's, where they are known; else every column of numbers is one.
        reward_weights: their weights, in the order of the columns; None for 1 each.

    Raises:
        BatchError: a field is of the wrong type, its length is not that of the response, or neither text nor
            ids of prompt and response are there; or there are not as many weights as rewards.
    """
    names = _reward_parts(dump, reward_functions) if dump.kind == "trl" else ()
    weights = (1.0,) * len(names) if reward_weights is None else reward_weights
    if names and len(names) != len(weights):
        raise BatchError(
            f"{dump.path}: {len(names)} columns of rewards ({', '.join(names)[:120]}), and the run weighed "
            f"{len(weights)} (reward_weights); give a table with a column reward, their weighted sum"
        )
    parts = dict(zip(names, weights, strict=False))
    return [
        _read(_Fields(f"{dump.path}, row {i}", _split(row) if dump.kind == "slime" else row), parts)
        for i, row in enumerate(dump.rows)
    ]


def _reward_parts(dump: Dump, functions: frozenset[str]) -> tuple[str, ...]:
    """TRL has a column of numbers for each reward function, under the function's name."""
    known = {*STEP, *PROMPT, *RESPONSE, *ADVANTAGE, *CORRECT, *TRUNCATED, *GROUP, "images"}
    names = [name for name in dump.rows[0] if (name in functions if functions else name not in known)]
    if not functions and any(name in REWARD for name in names):
        return ()
    return tuple(n for n in names if all(row[n] is None or type(row[n]) in (int, float) for row in dump.rows))


def _split(row: Row) -> Row:
    """A sample of slime: prompt and response are one list of tokens."""
    tokens, count = row["tokens"], row.get("response_length")
    if type(count) is not int or not isinstance(tokens, list) or not 0 < count < len(tokens):
        return row
    further: dict[str, Any] = {"prompt_token_ids": tokens[:-count], "response_token_ids": tokens[-count:]}
    if isinstance(status := row.get("status"), str):
        further["truncated"] = status == "truncated"
    kept = {k: v for k, v in row.items() if k not in ("prompt", "response") and v is not None}
    return {**kept, **further}


def _read(row: _Fields, parts: Mapping[str, float]) -> Logged:
    prompt_ids, response_ids = row.ids(PROMPT_IDS), row.ids(RESPONSE_IDS)
    prompt, response = row.words(PROMPT), row.words(RESPONSE)
    if (prompt is None and prompt_ids is None) or (response is None and response_ids is None):
        raise row.refuse(
            f"neither ids nor text of prompt and response; expected one of {', '.join(PROMPT_IDS + PROMPT)} "
            f"and one of {', '.join(RESPONSE_IDS + RESPONSE)}, got {', '.join(list(row.values)[:12])}"
        )
    count = None if response_ids is None else len(response_ids)
    mask = row.numbers(MASK, count)
    advantage = row.value(ADVANTAGE)
    per_token = row.numbers(ADVANTAGE, count, gaps=mask) if isinstance(advantage, list) else None
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise row.refuse("its mask holds other values than 0 and 1; 1 stands for a token of the policy")
    reward = row.number(REWARD)
    if parts:
        found = [(row.number((name,)), weight) for name, weight in parts.items()]
        reward = math.fsum(weight * value for value, weight in found if value is not None)
    truncated, correct = row.number(TRUNCATED), row.number(CORRECT)
    group = row.value(GROUP)
    return Logged(
        where=row.where,
        prompt=prompt,
        response=response,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        mask=None if mask is None else mask.astype(np.bool_),
        logprobs=row.numbers(LOGPROBS, count, gaps=mask, missing=True, most=ROUNDING),
        old_logprobs=row.numbers(OLD_LOGPROBS, count, gaps=mask, most=ROUNDING),
        advantage=None if per_token is not None else row.number(ADVANTAGE),
        token_advantages=per_token,
        reward=reward,
        truncated=None if truncated is None else bool(truncated),
        correct=None if correct is None else correct > 0,
        group=None if group is None else str(group),
    )


@dataclass(frozen=True)
class _Fields:
    """Typed access to a row: the first of several names that is there and not null."""

    where: str
    values: Mapping[str, Any]

    def refuse(self, why: str) -> BatchError:
        return BatchError(f"{self.where}: {why}")

    def value(self, names: Sequence[str]) -> Any:
        return next((self.values[n] for n in names if self.values.get(n) is not None), None)

    def words(self, names: Sequence[str]) -> str | list[dict[str, Any]] | None:
        """A text, or messages with a role each, null fields left out."""
        value = self.value(names)
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise self.refuse(f"{names[0]} holds what is no text ({error}); mend it") from error
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(m, dict) and m.get("role") for m in value):
            return [{k: v for k, v in message.items() if v is not None} for message in value]
        if names is RESPONSE and value == []:
            return ""
        raise self.refuse(f"{names[0]} is {shown(value)}, expected a text or messages with roles")

    def ids(self, names: Sequence[str]) -> tuple[int, ...] | None:
        value = self.value(names)
        if value is None:
            return None
        sound = isinstance(value, list) and all(type(t) is int and 0 <= t < LARGEST_TOKEN for t in value)
        if not sound or not value:
            raise self.refuse(f"{names[0]} is {shown(value)}, expected a list of token ids that is not empty")
        return tuple(value)

    def number(self, names: Sequence[str]) -> float | None:
        value = self.value(names)
        if value is None:
            return None
        if not _finite(value):
            raise self.refuse(f"{names[0]} is {shown(value)}, expected a finite number")
        return float(value)

    def numbers(
        self,
        names: Sequence[str],
        count: int | None,
        *,
        gaps: FloatArray | None = None,
        missing: bool = False,
        most: float = math.inf,
    ) -> FloatArray | None:
        """A number for every response token.

        Args:
            names: of the field.
            count: response tokens.
            gaps: (tok,) 0 where there need be no number; it is 0 there.
            missing: others may be missing too, and are nan.
            most: no number may be above it.
        """
        value = self.value(names)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.refuse(f"{names[0]} is {shown(value)}, expected a list with a number per token")
        if count is None:
            raise self.refuse(
                f"{names[0]} has a value per token, and the tokens' ids are not there; log them"
            )
        if len(value) != count:
            raise self.refuse(f"{names[0]} has {len(value)} values for {count} response tokens")
        kept = np.ones(count, dtype=np.bool_) if gaps is None else gaps.astype(np.bool_)
        found = np.zeros(count)
        for k, number in enumerate(value):
            if not kept[k]:
                continue
            if missing and (number is None or number != number):
                found[k] = math.nan
                continue
            if not _finite(number) or number > most:
                limit = "" if most == math.inf else ", at most 0: a logarithm of a probability"
                raise self.refuse(
                    f"{names[0]} of token {k} is {shown(number)}, expected a finite number{limit}"
                )
            found[k] = number
        return found


def _finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return type(value) in _NUMBERS and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False

"""Frozen result records shared by all layers; plain numpy, no torch.

Axes are named ``prompt, seq, tok, vocab, lr``. Ragged token data are tuples with one array per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from stepscope.errors import BatchError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rollouts:
    """A batch of sampled responses, one entry per sequence on every field.

    Attributes:
        prompt_ids: global id of the prompt, for example ``arithmetic/train/12``; equal ids form a group.
        prompts: the prompt as given to the tokenizer.
        responses: the decoded response.
        prompt_token_ids: token ids of the prompt, no padding.
        response_token_ids: token ids of the response, no padding; the end-of-sequence token counts.
        rewards: (seq,) total reward.
        correct: (seq,) whether the answer was verified correct.
        truncated: (seq,) whether the response was cut at ``max_response_tokens`` without an end-of-sequence token.
        logprobs: per sequence (tok,) log-prob of each response token at ``temperature``, in nats.
        entropies: per sequence (tok,) entropy of the policy before each response token, in nats.
        temperature: sampling temperature; the policy is the softmax of logits / temperature.
        max_response_tokens: L, the longest response allowed.
        advantages: (seq,) or None where the batch makes no step.
    """

    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    prompt_token_ids: tuple[tuple[int, ...], ...]
    response_token_ids: tuple[tuple[int, ...], ...]
    rewards: FloatArray
    correct: BoolArray
    truncated: BoolArray
    logprobs: tuple[FloatArray, ...]
    entropies: tuple[FloatArray, ...]
    temperature: float
    max_response_tokens: int
    advantages: FloatArray | None = None

    def __post_init__(self) -> None:
        """Refuse fields of different length."""
        for name in (
            "prompts",
            "responses",
            "prompt_token_ids",
            "response_token_ids",
            "rewards",
            "correct",
            "truncated",
            "logprobs",
            "entropies",
        ):
            if len(getattr(self, name)) != len(self.prompt_ids):
                raise BatchError(
                    f"rollouts: {name} has {len(getattr(self, name))} entries, expected {len(self.prompt_ids)}, "
                    "one per sequence"
                )
        if self.advantages is not None and len(self.advantages) != len(self.prompt_ids):
            raise BatchError(
                f"rollouts: {len(self.advantages)} advantages for {len(self.prompt_ids)} sequences"
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.prompt_ids)

    @cached_property
    def num_tokens(self) -> IntArray:
        """(seq,) response lengths in tokens."""
        return np.array([len(ids) for ids in self.response_token_ids], dtype=np.int64)

    @cached_property
    def prompt_index(self) -> IntArray:
        """(seq,) cluster number of each sequence's prompt, numbered in order of first appearance."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(p, len(numbers)) for p in self.prompt_ids], dtype=np.int64)

    @property
    def num_prompts(self) -> int:
        """Number of distinct prompts."""
        return len(set(self.prompt_ids))

    @cached_property
    def entropy_per_seq(self) -> FloatArray:
        """(seq,) sum of the position entropies of each response, in nats."""
        return np.array([float(h.sum()) for h in self.entropies])

    def select(self, indices: Sequence[int] | IntArray) -> Rollouts:
        """The sub-batch at ``indices``, in that order."""
        idx = [int(i) for i in indices]

        def pick(values: tuple[_T, ...]) -> tuple[_T, ...]:
            return tuple(values[i] for i in idx)

        return replace(
            self,
            prompt_ids=pick(self.prompt_ids),
            prompts=pick(self.prompts),
            responses=pick(self.responses),
            prompt_token_ids=pick(self.prompt_token_ids),
            response_token_ids=pick(self.response_token_ids),
            rewards=self.rewards[idx],
            correct=self.correct[idx],
            truncated=self.truncated[idx],
            logprobs=pick(self.logprobs),
            entropies=pick(self.entropies),
            advantages=None if self.advantages is None else self.advantages[idx],
        )

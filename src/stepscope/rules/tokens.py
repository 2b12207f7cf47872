"""The table of tokens that rules look at: one entry per response token, in the order of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from stepscope.results import BoolArray, Brief, FloatArray, IntArray
from stepscope.results.tables import TextArray
from stepscope.rules.program import Program


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokens(Brief):
    """What a rule may look at, of the tokens of one optimizer step that are in the loss.

    Attributes:
        sequence: (tok,) sequence of each token, never falling.
        logprob: (tok,) l = log pi(y|s) of the policy to be updated, nats.
        old_logprob: (tok,) the same of the policy that sampled; equal on policy.
        entropy: (tok,) H, nats.
        advantages: (seq,) A.
        token_advantages: (tok,) A of each token, where it differs within a sequence.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio.
        discriminator: (tok,) M = sum_v pi_v^2 (log pi_v + H), where a rule needs it.
        entropy_influence: (tok,) what the token adds to the change of the entropy by the step that the loss
            would take as it is, nats per unit of lr, where a rule needs it.
        reward_influence: (tok,) the same for the expected reward.
        program: what its sequences do to entropy and reward together, where a rule needs it.
        position: (tok,) place in the response, from 0, where a rule needs it.
        token: (tok,) what it goes by (:func:`stepscope.rules.token_classes.token_names`), where a rule needs
            it.
        kind: (tok,) its kind, likewise.
    """

    sequence: IntArray
    logprob: FloatArray
    old_logprob: FloatArray
    entropy: FloatArray
    advantages: FloatArray
    token_advantages: FloatArray | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    discriminator: FloatArray | None = None
    entropy_influence: FloatArray | None = None
    reward_influence: FloatArray | None = None
    program: Program | None = None
    position: IntArray | None = None
    token: TextArray | None = None
    kind: TextArray | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.sequence)

    @property
    def advantage(self) -> FloatArray:
        """(tok,) A of the token, or of its sequence."""
        if self.token_advantages is not None:
            return self.token_advantages
        return np.asarray(self.advantages[self.sequence], dtype=np.float64)

    @cached_property
    def probability(self) -> FloatArray:
        """(tok,) p."""
        return np.exp(self.logprob)

    @cached_property
    def missing(self) -> FloatArray:
        """(tok,) 1 - p, exact for p near 1."""
        return -np.expm1(self.logprob)

    @cached_property
    def ratio(self) -> FloatArray:
        """(tok,) r = pi / pi_old."""
        return np.exp(self.logprob - self.old_logprob)

    @cached_property
    def clipped(self) -> BoolArray:
        """(tok,) True where PPO's clipping leaves the token without gradient."""
        high = (self.advantage > 0) & (self.ratio > 1 + self.epsilon_high)
        low = (self.advantage < 0) & (self.ratio < 1 - self.epsilon_low)
        return np.asarray(high | low)

    @cached_property
    def surprise(self) -> FloatArray:
        """(tok,) l + H: below zero where the token is rarer than the policy expects."""
        return self.logprob + self.entropy

    @cached_property
    def discriminant(self) -> FloatArray:
        """(tok,) S = p (l + H)."""
        return self.probability * self.surprise

    def micro_batches(
        self, size: int | None, order: IntArray | None = None
    ) -> Iterator[tuple[IntArray, Tokens]]:
        """Tables of so many sequences in turn, of all for None: places of their tokens in this one, and it.

        Args:
            size: sequences of a table; those without a token count, and a table without any does not come.
            order: the sequences, as they are cut; that of this table by default.
        """
        sequences = np.arange(len(self.advantages)) if order is None else order
        size = size or len(sequences)
        for start in range(0, len(sequences), size):
            places, part = self._of(sequences[start : start + size])
            if len(part):
                yield places, part

    def _of(self, sequences: IntArray) -> tuple[IntArray, Tokens]:
        number = np.full(len(self.advantages), -1)
        number[sequences] = np.arange(len(sequences))
        own = number[self.sequence]
        places = np.argsort(own, kind="stable")[np.count_nonzero(own < 0) :]
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Tokens)}
        del values["sequence"], values["advantages"]
        taken: dict[str, Any] = {
            name: v[places] if isinstance(v, np.ndarray) else v for name, v in values.items()
        }
        return places, Tokens(sequence=own[places], advantages=self.advantages[sequences], **taken)


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenFacts(Tokens):
    """What criteria may look at beside it.

    Attributes:
        discriminator: (tok,) M = sum_v pi_v^2 (log pi_v + H).
        position: (tok,) position in the response, from 0.
        collision: (tok,) sum_v pi_v^2.
        rewards: (seq,) total rewards.
        correct: (seq,) 1 where the answer is correct.
        prompt: (seq,) number of the prompt.
        micro_batch_size: sequences, in the order of the batch, over which micro-batch criteria centre.
        modelled: name to (tok,) influence on the entropy as a model of the kernel predicts it, nats per token
            and unit of lr; empty where none was made.
    """

    discriminator: FloatArray
    position: IntArray
    collision: FloatArray
    rewards: FloatArray
    correct: FloatArray
    prompt: IntArray
    micro_batch_size: int = 8
    modelled: Mapping[str, FloatArray] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> FloatArray:
        """(seq,) response lengths."""
        return np.bincount(self.sequence, minlength=len(self.advantages)).astype(np.float64)

    def per_sequence(self, values: FloatArray) -> FloatArray:
        """(seq,) sums of (tok,) values over each response."""
        sums = np.bincount(self.sequence, weights=values, minlength=len(self.advantages))
        return np.asarray(sums, dtype=np.float64)

    def per_prompt(self, values: FloatArray) -> FloatArray:
        """(seq,) mean over each sequence's prompt group of (seq,) values."""
        sums = np.bincount(self.prompt, weights=values)
        return np.asarray((sums / np.bincount(self.prompt))[self.prompt], dtype=np.float64)


def covariance(tokens: Tokens) -> FloatArray:
    """(tok,) Cov_k = (l_k - mean l)(A_k - mean A), means over the table's tokens (2505.22617, Eq. 10)."""
    logprob, advantage = tokens.logprob, tokens.advantage
    return np.asarray((logprob - logprob.mean()) * (advantage - advantage.mean()), dtype=np.float64)


def largest(values: FloatArray, count: int, among: BoolArray | None = None) -> BoolArray:
    """(tok,) True on the ``count`` largest values among some tokens, the first of equal ones."""
    found = np.zeros(len(values), dtype=np.bool_)
    places = np.arange(len(values)) if among is None else np.flatnonzero(among)
    found[places[np.argsort(-values[places], kind="stable")[:count]]] = True
    return found

"""What a criterion is, and what it may look at: numbers per response token that need no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import BatchError, MeasurementError
from stepscope.policy.forward import TokenBatch, forward
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.state import Policy
from stepscope.results import Brief, FloatArray, IntArray, Rollouts

Level = Literal["token", "sequence"]
Kind = Literal["literature", "control"]
Target = Literal["signed", "magnitude"]


@dataclass(frozen=True, repr=False)
class TokenFacts(Brief):
    """What criteria may look at: one entry per response token of the update batch, in the order of the batch.

    Attributes:
        sequence: (tok,) sequence of each token.
        position: (tok,) its position in the response, from 0.
        logprob: (tok,) l = log pi(y|s) of the policy, nats.
        old_logprob: (tok,) the same of the policy that sampled; equal on policy.
        entropy: (tok,) H, nats.
        collision: (tok,) sum_v pi_v^2.
        discriminator: (tok,) M = sum_v pi_v^2 (log pi_v + H).
        advantages: (seq,) A.
        rewards: (seq,) total rewards.
        correct: (seq,) 1 where the answer is correct.
        prompt: (seq,) number of the prompt.
        micro_batch_size: sequences, in the order of the batch, over which micro-batch criteria centre.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio.
    """

    sequence: IntArray
    position: IntArray
    logprob: FloatArray
    old_logprob: FloatArray
    entropy: FloatArray
    collision: FloatArray
    discriminator: FloatArray
    advantages: FloatArray
    rewards: FloatArray
    correct: FloatArray
    prompt: IntArray
    micro_batch_size: int = 8
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

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
    def clipped(self) -> FloatArray:
        """(tok,) 1 where PPO's clipping has taken the gradient away."""
        high = (self.advantage > 0) & (self.ratio > 1 + self.epsilon_high)
        low = (self.advantage < 0) & (self.ratio < 1 - self.epsilon_low)
        return (high | low).astype(np.float64)

    @cached_property
    def surprise(self) -> FloatArray:
        """(tok,) l + H: below zero where the token is rarer than the policy expects."""
        return self.logprob + self.entropy

    @cached_property
    def discriminant(self) -> FloatArray:
        """(tok,) S = p (l + H)."""
        return self.probability * self.surprise

    @property
    def advantage(self) -> FloatArray:
        """(tok,) A of the token's sequence."""
        return np.asarray(self.advantages[self.sequence], dtype=np.float64)

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

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.sequence)


@dataclass(frozen=True)
class Criterion:
    """A named score.

    Attributes:
        name: column of ``criteria_tokens.parquet``.
        score: the function; returns (tok,) values, or (seq,) for the level ``sequence``.
        formula: in words and symbols.
        sign: sign convention, and what was added here to the published use.
        paper: arXiv number or other source; empty for controls.
        equation: where in the paper; empty where none was read.
        verified: whether the formula was read in the paper itself or in public code that implements it.
        level: what is scored; a signed token criterion also scores sequences, by its sum.
        kind: ``literature``, or ``control`` for the trivial ones a criterion has to beat.
        target: ``signed`` scores are ranked against the change itself, ``magnitude`` ones against its size.
    """

    name: str
    score: Callable[[TokenFacts], FloatArray]
    formula: str
    sign: str = "c > 0: predicted to raise the entropy"
    paper: str = ""
    equation: str = ""
    verified: bool = True
    level: Level = "token"
    kind: Kind = "literature"
    target: Target = "signed"

    def __call__(self, facts: TokenFacts) -> FloatArray:
        """The score of every token (or sequence) of a batch.

        Raises:
            MeasurementError: the function returned another number of values, or one that is not finite.
        """
        found = np.asarray(self.score(facts), dtype=np.float64)
        expected = len(facts) if self.level == "token" else len(facts.advantages)
        if found.shape != (expected,):
            raise MeasurementError(
                f"criterion {self.name}: returned shape {found.shape}, expected ({expected},), one value per "
                f"{self.level}; mend its function"
            )
        if not np.isfinite(found).all():
            raise MeasurementError(
                f"criterion {self.name}: {int((~np.isfinite(found)).sum())} of its values are not finite; "
                "mend its function"
            )
        return found

    def definition(self) -> dict[str, Any]:
        """What the page says about it."""
        return {
            "formula": self.formula,
            "paper": self.paper,
            "equation": self.equation,
            "sign": self.sign,
            "verified": self.verified,
            "level": self.level,
            "kind": self.kind,
            "target": self.target,
        }


def token_facts(
    policy: Policy,
    update: Rollouts,
    *,
    micro_batch_size: int = 8,
    budget: Budget = Budget(),
) -> TokenFacts:
    """The token table of an update batch: one forward pass.

    Args:
        policy: whose step is looked at; its settings give the clip range.
        update: sequences with advantages.
        micro_batch_size: sequences over which micro-batch criteria centre.
        budget: what may be used at a time.

    Raises:
        BatchError: the batch has no advantages.
    """
    if update.advantages is None:
        raise BatchError("update batch: it has no advantages, which criteria need; use groups of at least 2")

    def fields(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            out = forward(policy.model, batch, temperature=update.temperature, keep_squares=True)
        assert out.collisions is not None
        assert out.discriminators is not None
        stacked = torch.stack([out.logprobs, out.entropies, out.collisions, out.discriminators], -1)
        return stacked.double().cpu()

    rows = torch.cat(sweep_rows(policy, update, fields, budget=budget))
    logprob, entropy, collision, discriminator = rows.T.contiguous().numpy()
    return TokenFacts(
        sequence=np.repeat(np.arange(len(update)), update.num_tokens),
        position=np.concatenate([np.arange(n) for n in update.num_tokens]),
        logprob=logprob,
        old_logprob=np.concatenate(update.logprobs),
        entropy=entropy,
        collision=collision,
        discriminator=discriminator,
        advantages=update.advantages,
        rewards=update.rewards,
        correct=update.correct.astype(np.float64),
        prompt=update.prompt_index,
        micro_batch_size=micro_batch_size,
        epsilon_low=policy.settings.epsilon_low,
        epsilon_high=policy.settings.epsilon_high,
    )

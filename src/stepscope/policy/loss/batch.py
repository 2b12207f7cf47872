"""What a loss is a function of: the log-probs of a padded batch of responses, and what goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from stepscope.policy.loss.settings import StepSettings
from stepscope.results import Brief


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Further(Brief):
    """What only some losses look at.

    Attributes:
        sampler_logprobs: (seq, tok) l as the engine that sampled gave it, where it is known.
        rewards: (seq,) for losses of preferences.
        group: (seq,) number of each response's prompt group, for the same.
        pieces: rows of each micro-batch, for losses that depend on how a batch was cut; one by default.
        random: of losses that draw tokens; by default by the seed of the settings.
        divergences: (seq, tok) KL(pi | ref) of the next token, for losses that sum over the vocabulary.
    """

    sampler_logprobs: Tensor | None = None
    rewards: Tensor | None = None
    group: Tensor | None = None
    pieces: Sequence[Tensor] = ()
    random: np.random.Generator | None = None
    divergences: Tensor | None = None


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LossBatch(Brief):
    """A batch as losses see it; every tensor is (seq, tok) unless said otherwise.

    Attributes:
        logprobs: l of the policy, differentiated.
        old_logprobs: l of the policy that sampled; equal to ``logprobs`` on policy.
        advantages: A of every token.
        mask: True on the tokens in the loss; rows of False for sequences taken out of it.
        settings: of the run.
        rewards: (seq,) rewards, where a loss looks at them.
        group: (seq,) number of each sequence's prompt group, where a loss looks at it.
        ref_logprobs: l of the reference policy, where there is one.
        sampler_logprobs: l as the engine that sampled gave it, nan where it gave none; None where it is not
            known.
        random: of losses that draw tokens.
        divergences: KL(pi | ref) of the next token, where a loss looks at it.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    settings: StepSettings
    rewards: Tensor | None = None
    group: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    divergences: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The mask as numbers."""
        return self.mask.to(self.logprobs.dtype)

    @property
    def log_ratio(self) -> Tensor:
        """Log r = l - l_old."""
        return self.logprobs - self.old_logprobs

    def rows(self, chosen: Tensor) -> LossBatch:
        """The sequences of these numbers, in that order."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[chosen]

        return replace(
            self,
            logprobs=self.logprobs[chosen],
            old_logprobs=self.old_logprobs[chosen],
            advantages=self.advantages[chosen],
            mask=self.mask[chosen],
            rewards=pick(self.rewards),
            group=pick(self.group),
            ref_logprobs=pick(self.ref_logprobs),
            sampler_logprobs=pick(self.sampler_logprobs),
            divergences=pick(self.divergences),
        )

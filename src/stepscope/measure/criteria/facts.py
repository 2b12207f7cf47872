"""The token table of an update batch, from one forward pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import BatchError
from stepscope.policy.forward import TokenBatch, forward
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.rules import TokenFacts


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

    rows = [row.numpy() for row in sweep_rows(policy, update, fields, budget=budget)]
    logprob, entropy, collision, discriminator = np.ascontiguousarray(update.flat(rows).T)
    sequence, position = update.places
    return TokenFacts(
        sequence=sequence,
        position=position,
        logprob=logprob,
        old_logprob=update.flat(update.behaviour),
        entropy=entropy,
        collision=collision,
        discriminator=discriminator,
        advantages=update.advantages,
        token_advantages=None if update.token_advantages is None else update.flat(update.token_advantages),
        rewards=update.rewards,
        correct=update.correct.astype(np.float64),
        prompt=update.prompt_index,
        micro_batch_size=micro_batch_size,
        epsilon_low=policy.settings.epsilon_low,
        epsilon_high=policy.settings.epsilon_high,
    )

"""Update batches of random tokens for the gradient-based measurements, and the steps they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.policy.loss.surrogate import advantages
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts


def random_rollouts(policy: Policy, *, num_prompts: int, group_size: int, seed: int = 0) -> Rollouts:
    """Random token ids as responses, scored by the policy; a step does not care who wrote them."""
    vocab = policy.model.config.vocab_size
    rng = np.random.default_rng(seed)
    count = num_prompts * group_size
    prompts = [tuple(rng.integers(2, vocab, rng.integers(2, 5)).tolist()) for _ in range(num_prompts)]
    responses = [tuple(rng.integers(1, vocab, rng.integers(1, 6)).tolist()) for _ in range(count)]
    index = np.repeat(np.arange(num_prompts), group_size)
    rewards = rng.random(count)
    drawn = Rollouts(
        prompt_ids=tuple(f"p{seed}/{i}" for i in index),
        prompts=("",) * count,
        responses=("",) * count,
        prompt_token_ids=tuple(prompts[i] for i in index),
        response_token_ids=tuple(responses),
        rewards=rewards,
        correct=rewards > 0.5,
        truncated=np.zeros(count, dtype=bool),
        logprobs=tuple(np.zeros(len(r)) for r in responses),
        entropies=tuple(np.zeros(len(r)) for r in responses),
        temperature=policy.settings.temperature,
        max_response_tokens=6,
        advantages=advantages(rewards, index, policy.settings.scale_rewards),
    )
    logprobs, entropies = score_rollouts(policy, drawn)
    return replace(drawn, logprobs=logprobs, entropies=entropies)


@pytest.fixture
def draw_rollouts() -> Callable[..., Rollouts]:
    """Make a batch: ``draw_rollouts(policy, num_prompts=3, group_size=4, seed=0)``."""
    return random_rollouts


@pytest.fixture
def draw_update() -> Callable[..., Step]:
    """Make a batch and the step it makes: the batch is ``step.update``."""

    def draw(policy: Policy, *, num_prompts: int, group_size: int, seed: int = 0) -> Step:
        return reconstruct_step(
            policy, random_rollouts(policy, num_prompts=num_prompts, group_size=group_size, seed=seed)
        )

    return draw

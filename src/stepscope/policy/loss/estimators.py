"""Advantages of a graded batch, by the estimators of TRL and verl.

R_i is the reward of response i, one of G in its group; n_i its tokens that the policy wrote. Where an
estimator whitens, means and variances (Bessel's) are over those tokens of the whole batch.

Source: TRL 1.16, ``_generate_and_score_completions`` of its trainers; verl 0.9.1,
``verl/trainer/ppo/core_algos.py``. Pinned by ``tests/policy/test_advantages.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from stepscope.errors import ConfigError
from stepscope.policy.loss.advantages import STD_EPSILON, advantages
from stepscope.policy.loss.base import LossParameters
from stepscope.policy.loss.kl import kl_penalty
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.verl import PREFIX
from stepscope.results import FloatArray, IntArray, Rollouts

VERL_EPSILON = 1e-6
"""verl adds it to a group's standard deviation."""

TINY = 1e-8
"""verl adds it to variances and counts before it divides."""


class Normalised(LossParameters):
    """``normalize_advantages``: standardise over the batch, as TRL's RLOOTrainer can."""

    normalize_advantages: bool = False


class Discounted(LossParameters):
    """``gamma``: a token's return is the reward times gamma to the number of the policy's tokens after it."""

    gamma: float = Field(default=1.0, ge=0, le=1)


@dataclass(frozen=True)
class Graded:
    """What estimators look at.

    Attributes:
        rewards: (seq,) R.
        group: (seq,) number of each response's group.
        lengths: (seq,) n.
        scale: the settings' ``scale_rewards``.
        penalties: per sequence (n,) what each token takes off the reward; None for nothing.
    """

    rewards: FloatArray
    group: IntArray
    lengths: IntArray
    scale: str
    penalties: tuple[FloatArray, ...] | None = None

    def per_group(self, of: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """(seq,) a function of each group's rewards, over its responses; 0 for a response alone."""
        found = np.zeros(len(self.rewards))
        for number in np.unique(self.group):
            members = self.group == number
            if members.sum() > 1:
                found[members] = of(self.rewards[members])
        return found

    @property
    def scores(self) -> FloatArray:
        """(seq,) R before anything was taken off it."""
        if self.penalties is None:
            return self.rewards
        taken = np.array([row.sum() for row in self.penalties])
        return np.asarray(self.rewards + taken, dtype=np.float64)

    @property
    def baseline(self) -> FloatArray:
        """(seq,) mean of each group, 0 for a response alone, as verl has it."""
        return self.per_group(lambda r: np.full(len(r), r.mean()))

    @property
    def deviation(self) -> FloatArray:
        """(seq,) standard deviation of each group, 1 for a response alone."""
        found = self.per_group(lambda r: np.full(len(r), r.std(ddof=1)))
        sizes = self.per_group(lambda r: np.full(len(r), len(r)))
        return np.where(sizes > 1, found, 1.0)


def _whitened(values: FloatArray, counts: IntArray) -> FloatArray:
    """Verl's ``masked_whiten`` of values that stand on so many tokens each."""
    total = counts.sum()
    mean = (values * counts).sum() / (total + TINY)
    variance = ((values - mean) ** 2 * counts).sum() / (total + TINY) * total / (total - 1)
    return np.asarray((values - mean) / np.sqrt(variance + TINY))


def trl_grpo(graded: Graded, own: LossParameters) -> FloatArray:
    """R less its group's mean, scaled as ``scale_rewards`` says."""
    return advantages(graded.rewards, graded.group, graded.scale)


def trl_rloo(graded: Graded, own: Normalised) -> FloatArray:
    """R less the mean of the others of its group (Ahmadian et al. 2024, arXiv:2402.14740)."""
    found = graded.per_group(lambda r: r - (r.sum() - r) / (len(r) - 1))
    if not own.normalize_advantages:
        return found
    return np.asarray((found - found.mean()) / (found.std(ddof=1) + STD_EPSILON))


def normalize_then_sum(graded: Graded, own: LossParameters) -> FloatArray:
    """Standardised in its group, then over the batch: TRL's ``multi_objective_aggregation`` of one reward."""
    each = advantages(graded.rewards, graded.group, "group")
    return np.asarray((each - each.mean()) / (each.std(ddof=1) + STD_EPSILON))


def grpo(graded: Graded, own: LossParameters) -> FloatArray:
    """(R - mean)/(std + 1e-6), without the division where ``scale_rewards`` is ``none``."""
    centred = graded.rewards - graded.baseline
    return centred if graded.scale == "none" else centred / (graded.deviation + VERL_EPSILON)


def gdpo(graded: Graded, own: LossParameters) -> FloatArray:
    """``verl:grpo``, whitened; verl's, for one reward (arXiv:2601.05242)."""
    return _whitened(grpo(graded, own), graded.lengths)


def grpo_passk(graded: Graded, own: LossParameters) -> FloatArray:
    """Largest less second largest R on the best response of a group, 0 elsewhere (arXiv:2503.19595)."""

    def of(rewards: FloatArray) -> FloatArray:
        second, first = np.sort(rewards)[-2:]
        found = np.zeros(len(rewards))
        found[int(rewards.argmax())] = first - second
        return found if graded.scale == "none" else found / (rewards.std(ddof=1) + VERL_EPSILON)

    return graded.per_group(of)


def reinforce_plus_plus_baseline(graded: Graded, own: LossParameters) -> FloatArray:
    """R - mean, whitened (arXiv:2501.03262)."""
    return _whitened(graded.rewards - graded.baseline, graded.lengths)


def rloo(graded: Graded, own: LossParameters) -> FloatArray:
    """(R - mean) G/(G - 1), and R itself for a response alone."""
    sizes = graded.per_group(lambda r: np.full(len(r), len(r)))
    return np.where(
        sizes > 1, (graded.rewards - graded.baseline) * sizes / np.maximum(sizes - 1, 1), graded.rewards
    )


def rloo_vectorized(graded: Graded, own: LossParameters) -> FloatArray:
    """The same, 0 for a response alone."""
    sizes = graded.per_group(lambda r: np.full(len(r), len(r)))
    return np.asarray((graded.rewards - graded.baseline) * sizes / np.maximum(sizes - 1, 1) * (sizes > 1))


def opo(graded: Graded, own: LossParameters) -> FloatArray:
    """R less its group's mean weighted by length (arXiv:2505.23585)."""
    found = graded.rewards.copy()
    for number in np.unique(graded.group):
        members = graded.group == number
        if members.sum() > 1:
            found[members] -= np.average(graded.rewards[members], weights=graded.lengths[members])
    return found


def gpg(graded: Graded, own: LossParameters) -> FloatArray:
    """(R - mean) times responses over responses with R other than 0 (arXiv:2504.02546)."""
    alpha = len(graded.rewards) / max(1, int(np.count_nonzero(graded.rewards)))
    return np.asarray(alpha * (graded.rewards - graded.baseline))


def reinforce_plus_plus(graded: Graded, own: Discounted) -> FloatArray | list[FloatArray]:
    """Discounted return of every token, penalties taken off, whitened over all tokens (arXiv:2501.03262)."""
    if own.gamma == 1.0 and graded.penalties is None:
        return _whitened(graded.rewards, graded.lengths)
    rows = []
    for i, n in enumerate(graded.lengths):
        own_rewards = np.zeros(n) if graded.penalties is None else -graded.penalties[i]
        own_rewards[-1] += graded.scores[i]
        ahead = np.arange(n)[None, :] - np.arange(n)[:, None]
        rows.append(np.where(ahead >= 0, own.gamma ** np.maximum(ahead, 0), 0.0) @ own_rewards)
    flat = np.concatenate(rows)
    white = _whitened(flat, np.ones(len(flat), dtype=np.int64))
    return np.split(white, np.cumsum(graded.lengths)[:-1])


Function = Callable[[Graded, Any], FloatArray | list[FloatArray]]

ESTIMATORS: dict[str, tuple[Function, type[LossParameters]]] = {
    "": (trl_grpo, LossParameters),
    "rloo": (trl_rloo, Normalised),
    "normalize_then_sum": (normalize_then_sum, LossParameters),
    PREFIX + "grpo": (grpo, LossParameters),
    PREFIX + "gdpo": (gdpo, LossParameters),
    PREFIX + "grpo_passk": (grpo_passk, LossParameters),
    PREFIX + "reinforce_plus_plus": (reinforce_plus_plus, Discounted),
    PREFIX + "reinforce_plus_plus_baseline": (reinforce_plus_plus_baseline, LossParameters),
    PREFIX + "rloo": (rloo, LossParameters),
    PREFIX + "rloo_vectorized": (rloo_vectorized, LossParameters),
    PREFIX + "opo": (opo, LossParameters),
    PREFIX + "gpg": (gpg, LossParameters),
}
"""Estimator and its parameters by the settings' ``advantage_estimator``; the empty one is GRPO's of TRL."""

NEEDS_MORE = {
    PREFIX + "gae": "a critic's values",
    PREFIX + "remax": "the reward of a greedy response",
    PREFIX + "optimal_token_baseline": "the sums of squared probabilities that verl kept",
    PREFIX + "tir_optimal_token_baseline": "the sums of squared probabilities that verl kept",
    PREFIX + "grpo_vectorized": "rounding to float32; its formula is that of verl:grpo",
}
"""verl's other estimators, and what they need that a batch does not have."""


def known_estimator(settings: StepSettings) -> tuple[Function, LossParameters]:
    """The estimator of some settings, with its parameters.

    Raises:
        ConfigError: it is unknown, or needs more than rewards.
    """
    name = settings.advantage_estimator
    if name in NEEDS_MORE:
        raise ConfigError(
            f"advantage_estimator {name} needs {NEEDS_MORE[name]}; give a batch that brings its advantages "
            "per token, or another estimator"
        )
    if name not in ESTIMATORS:
        known = ", ".join(filter(None, ESTIMATORS))
        raise ConfigError(
            f"advantage_estimator: got {name[:60]!r}, expected one of {known}, or nothing for GRPO's; use "
            "one of these"
        )
    if name.startswith(PREFIX) and settings.scale_rewards == "batch":
        raise ConfigError(
            f"scale_rewards: got 'batch', and {name} scales by the group or not at all; use group or none"
        )
    function, kind = ESTIMATORS[name]
    own = kind.read(settings.advantage_parameters, key="advantage_parameters", owner=name or "GRPO")
    return function, own


def with_advantages(
    rollouts: Rollouts, settings: StepSettings, ref_logprobs: Sequence[FloatArray] | None = None
) -> Rollouts:
    """The batch with the advantages that the run's estimator gives its rewards.

    Args:
        rollouts: graded.
        settings: of the run.
        ref_logprobs: log-probs of the reference policy; needed when ``settings.kl_in_reward`` is not zero.

    Raises:
        BatchError: a reward is not finite.
        ConfigError: the estimator is unknown, or needs more than it is given.
    """
    function, own = known_estimator(settings)
    rollouts.refuse_ungraded()
    lengths = rollouts.num_policy_tokens
    penalties = _penalties(rollouts, settings, ref_logprobs)
    rewards = np.asarray(rollouts.rewards, dtype=np.float64)
    if penalties is not None:
        rewards = rewards - np.array([row.sum() for row in penalties])
    graded = Graded(rewards, rollouts.group_index, lengths, settings.scale_rewards, penalties)
    found = function(graded, own)
    if isinstance(found, np.ndarray):
        return replace(rollouts, advantages=found, token_advantages=None)
    means = np.array([row.mean() for row in found])
    return replace(rollouts, advantages=means, token_advantages=rollouts.rows(np.concatenate(found)))


def _penalties(
    rollouts: Rollouts, settings: StepSettings, ref_logprobs: Sequence[FloatArray] | None
) -> tuple[FloatArray, ...] | None:
    """What each token that the policy wrote takes off the reward; None for nothing.

    A response that leaves the loss because it was cut has none, as in TRL.
    """
    if settings.kl_in_reward == 0.0:
        return None
    if ref_logprobs is None:
        raise ConfigError(
            f"kl_in_reward = {settings.kl_in_reward}: advantages need the reference policy's log-probs, got "
            "none; pass ref_logprobs, or give a batch that brings its advantages"
        )
    name = settings.kl_penalty or "k1"
    found = []
    rows = zip(rollouts.behaviour, ref_logprobs, rollouts.written, rollouts.truncated, strict=True)
    for old, ref, mask, cut in rows:
        each = kl_penalty(name, torch.from_numpy(np.asarray(old)), torch.from_numpy(np.asarray(ref))).numpy()
        counted = 0.0 if cut and settings.mask_truncated else settings.kl_in_reward
        found.append(np.asarray(counted * each[mask], dtype=np.float64))
    return tuple(found)

"""A batch that some sampler drew, with the policy's log-probs beside the sampler's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepscope.errors import BatchError
from stepscope.policy.passes import Budget
from stepscope.policy.sampling.base import Convention, Sampler
from stepscope.policy.sampling.decoded import Decoded, Rows, score_decoding
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts

DRIFT_LIMIT = 0.05
"""Mean distance of two log-probs of a token, in nats, that kernels and half types make between one policy and
itself; beyond it a batch counts as drawn by another policy."""

OTHER_POLICY = 0.5
"""The same, beyond which it is refused."""

OUTSIDE_LIMIT = 0.05
"""Share of tokens outside of what truncation keeps, that round-off at its edge may make."""

OTHERWISE_LIMIT = 0.1
"""Relative distance of two temperatures, beyond which a batch that looks drawn at the one is refused at the
other, where chance does not make it."""

CHANCE = 5.0
"""Standard errors that chance makes."""

LEAST_VARIANCE = 25.0
"""Sum of Var[log q] in nats^2 from which the temperature of a batch is judged: its error is then 0.2."""


def with_sampler(
    policy: Policy, rollouts: Rollouts, sampler: Sampler, budget: Budget, *, chosen: bool = False
) -> Rollouts:
    """Score a batch with the measuring forward, and put the sampler's log-probs on what it drew from.

    An engine may leave truncation, or the temperature too, out of the log-probs that it gives. Which it does
    is found from the batch: the convention whose log-probs, as the measuring forward has them, are nearest.
    What it leaves out is then added as the measuring forward has it.

    Args:
        policy: that was to be sampled.
        rollouts: with ``sampler_logprobs`` as the engine gave them, or without.
        sampler: that drew it.
        budget: of the forward pass.
        chosen: whether the responses were kept for what they are, so that they are no sample of what drew
            them.

    Returns:
        The batch with ``logprobs``, ``entropies``, ``sampler_logprobs`` (of what was drawn from) and, where
        temperature or truncation are not the policy's, ``decoding_logprobs``; where there is truncation,
        ``kept_masses``.

    Raises:
        BatchError: the sampler has another policy, or does not draw as it was told.
    """
    decoding = sampler.decoding
    said = score_decoding(policy, rollouts, decoding, order=sampler.order, budget=budget)
    found = replace(rollouts, logprobs=said.logprobs, entropies=said.entropies)
    drawn = said.by_convention["processed"]
    if not decoding.is_policy(rollouts.temperature):
        masses = said.masses if decoding.warpers(sampler.order) else None
        found = replace(found, decoding_logprobs=drawn, kept_masses=masses)
    given = rollouts.sampler_logprobs
    if given is None:
        return replace(found, sampler_logprobs=drawn)
    nearest, gap = nearest_convention(given, said, sampler.conventions)
    _refuse_other(policy, sampler, said, gap)
    if not chosen and gap <= DRIFT_LIMIT:
        _refuse_otherwise(sampler, said, decoding.own_temperature(rollouts.temperature))
    own = said.by_convention[nearest]
    shifted = tuple(g + d - o for g, d, o in zip(given, drawn, own, strict=True))
    return replace(found, sampler_logprobs=shifted)


def nearest_convention(
    given: Sequence[FloatArray], said: Decoded, conventions: Sequence[Convention]
) -> tuple[Convention, float]:
    """The convention that an engine's log-probs follow, and their mean distance from it in nats."""
    gaps = {name: _distance(given, said.by_convention[name]) for name in conventions}
    nearest = min(gaps, key=gaps.__getitem__)
    return nearest, gaps[nearest]


def _distance(one: Sequence[FloatArray], other: Rows) -> float:
    return float(np.abs(np.concatenate(list(one)) - np.concatenate(other)).mean())


def _refuse_other(policy: Policy, sampler: Sampler, said: Decoded, gap: float) -> None:
    if not gap <= OTHER_POLICY:
        raise BatchError(
            f"{sampler.name}: does not serve this policy: its log-probs are {gap:.2g} nats from those of "
            f"{policy.path or 'this policy'} on average, expected less than {DRIFT_LIMIT}; "
            f"{sampler.advice(policy)}"
        )
    outside = 1 - float(np.concatenate(said.kept).mean())
    if not outside <= OUTSIDE_LIMIT:
        raise BatchError(
            f"{sampler.name}: {outside:.0%} of the tokens it drew are ones that {sampler.decoding} excludes, "
            f"expected at most {OUTSIDE_LIMIT:.0%}: it does not truncate as it was asked to; leave "
            "top_k, top_p and min_p away, or use an engine that has them"
        )


def _refuse_otherwise(sampler: Sampler, said: Decoded, temperature: float) -> None:
    """Refuse a batch that was drawn at another temperature or truncation than its log-probs tell of.

    -log q of a token that is drawn from q is H(q) on average, whatever the prefix, and its variance is known
    too. With b/T' in place of 1/T' the mean moves by -(b - 1) Var_q[log q] to first order, which gives b.

    Raises:
        BatchError: b is not 1.
    """
    variance = float(np.concatenate(said.variances).sum())
    if variance < LEAST_VARIANCE:
        return
    surprise = -np.concatenate(said.by_convention["processed"]) - np.concatenate(said.surprises)
    off = -float(surprise.sum()) / variance
    if abs(off) > OTHERWISE_LIMIT and abs(off) * math.sqrt(variance) > CHANCE:
        raise BatchError(
            f"{sampler.name}: does not draw as it was told: its tokens are {abs(surprise.mean()):.2g} nats "
            f"{'more' if off > 0 else 'less'} probable on average than tokens drawn at temperature "
            f"{temperature:g} with {sampler.decoding} ({abs(off) * math.sqrt(variance):.0f} standard "
            "errors), though its log-probs are this policy's; see that it takes temperature, top_p, top_k "
            "and min_p from the request, and has no defaults of its own (vLLM: `--generation-config vllm`)"
        )

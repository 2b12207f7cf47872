"""Influence shrunk towards a less noisy part of itself: ranks that take a half to a third of the probe.

What a token does to an on-policy quantity is what it does at given prefixes and what it does by way of the
prefixes that are reached. The first is an average over positions, the second of products of returns and
scores: the smaller part of the effect and most of the noise. So the first is kept as it is and the second
shrunk towards 0 by the factor of James & Stein (1961) in the form of empirical Bayes (Efron & Morris 1973),

    x_t = fixed_t + lambda (on_policy_t - fixed_t),    lambda = (|d|^2 - sum_t var d_t) / |d|^2, at least 0

with d = on_policy - fixed and var d_t from folds of the probe prompts. It lowers the summed squared error
over tokens and is biased: a token whose effect is by way of the prefixes alone is underrated. Use it to
rank, and the influence itself to add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepscope.measure.influence.attribution import token_products
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.influence.reliability import FEWEST_FOLDS, implied_gain
from stepscope.measure.influence.shares import Influence
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.probe import Bindings, bindings_on
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.gradients.derivatives import Mode
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Brief, FloatArray, Rollouts
from stepscope.results.influence import Shrinkage


@dataclass(frozen=True, repr=False)
class Shrunk(Brief):
    """Influence of tokens shrunk towards that at fixed prefixes.

    Attributes:
        tokens: (tok,) shrunken influence, in the order of the batch.
        shrinkage: how far, and what it gains.
    """

    tokens: FloatArray
    shrinkage: Shrinkage


def shrunk_influence(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    found: Influence,
    *,
    quantity: str | Quantity = "entropy",
    mode: Mode = "auto",
    bindings: Bindings | None = None,
    budget: Budget = Budget(),
) -> Shrunk | None:
    """Shrink an on-policy influence towards that at fixed prefixes.

    Costs a gradient pass over the probe batch and a forward-mode pass over the update batch for each fold.

    Args:
        policy: where the step starts; not changed.
        step: the step.
        probe: the probe batch of ``found``.
        found: influence on the on-policy quantity, with at least four folds.
        quantity: as it was given to ``influence``.
        mode: how token derivatives are taken, see ``directional_derivatives``.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
        budget: what may be used at a time.

    Returns:
        None where there is nothing to shrink towards (a quantity of whole responses, few folds, an influence
        that is at fixed prefixes already).
    """
    if found.version != "on_policy" or len(found.fold_tokens) < FEWEST_FOLDS:
        return None
    chosen = make_quantity(quantity, probe, policy=policy)
    if "fixed_prefix" not in chosen.versions:
        return None
    at_fixed = replace(chosen, normalisation=found.normalisation, version="fixed_prefix")
    bound = bindings_on(bindings, policy, probe, step.direction, budget).bind(at_fixed)
    slope = probe_gradient(policy, probe, bound, groups=found.folds.labels, budget=budget)
    pulled = step_derivative(policy, step, found.through).pulled(slope.parts)
    own = slope.folds(len(found.fold_tokens))
    prior = token_products(policy, step, pulled, own.mixing, mode=mode, budget=budget)
    tokens, kept = shrink(found.fold_tokens, prior, found.folds.shares)
    gain = implied_gain(found.fold_tokens, prior, found.folds.shares, lambda x, y, s: shrink(x, y, s)[0])
    return Shrunk(tokens, Shrinkage(found.quantity, found.through, kept, gain))


def shrink(values: FloatArray, prior: FloatArray, shares: FloatArray) -> tuple[FloatArray, float]:
    """(item,) prior + lambda (values - prior), and lambda.

    Args:
        values: (fold, item) from each fold alone.
        prior: (fold, item) the same of what is kept whole.
        shares: (fold,) weight of each fold; from one fold alone nothing of the rest is kept.
    """
    rest = values - prior
    mean = shares @ rest
    count, size = len(shares), float(mean @ mean)
    if count < 2 or size == 0:
        return shares @ prior, 0.0
    noise = count / (count - 1) * float(((shares[:, None] * (rest - mean)) ** 2).sum())
    kept = max(0.0, 1 - noise / size)
    return shares @ prior + kept * mean, kept

"""Gradient noise scale: how many prompt groups a batch needs before its gradient is more signal than noise.

The unit is the prompt group, because the responses of a group share a baseline; of HyPO a pair and the
samples of a prompt (:mod:`stepscope.measure.noise.units`). With g_b the gradient of
group b, scaled so that their mean is the batch's gradient, and A = g_b' M g_b' (M = 1, or the optimizer's P),

    |G|^2 = (B |mean g|^2 - mean |g_b|^2) / (B - 1)        unbiased: the mean off-diagonal entry of A
    tr S  = (mean |g_b|^2 - |mean g|^2) B / (B - 1)        noise of one group
    noise scale = tr S / |G|^2                             prompt groups (McCandlish et al. 2018, appendix A)

Numerator and denominator are averaged separately. Everything follows from inner products between sequences;
no (seq, params) matrix outlives the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np

from stepscope.errors import BatchError
from stepscope.intervals import FEWEST
from stepscope.measure.influence.shares import Influence
from stepscope.measure.noise.batch_size import batch_sizes, loss_scale
from stepscope.measure.noise.limits import noise_limits
from stepscope.measure.noise.units import noise_units
from stepscope.measure.step.divergence import sequence_gradients
from stepscope.policy.gradients.gram import grams
from stepscope.policy.loss.surrogate import sums_over_vocabulary
from stepscope.policy.loss.surrogate import token_weights as loss_token_weights
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.results.noise import NoiseScale, NoiseScales
from stepscope.stats import Estimate, jackknife, leave_out


def noise_scale(
    policy: Policy,
    update: Rollouts,
    *,
    preconditioner: ParameterVector | None = None,
    token_weights: tuple[FloatArray, ...] | None = None,
    influences: tuple[Influence, ...] = (),
    reference: Policy | None = None,
    budget: Budget = Budget(),
) -> NoiseScales:
    """Noise scales of the loss gradient, and of the batch's effect on quantities.

    Args:
        policy: its trainable parameters are differentiated.
        update: sequences with advantages; at least two prompts.
        preconditioner: P, for the noise scale in the optimizer's metric.
        token_weights: w_ik of the step, where it was rebuilt already; otherwise from the loss. An entropy
            bonus has none, and no part in the noise.
        influences: influences of ``update``, for the noise scale of their quantities.
        reference: the reference policy, where the loss sums a divergence to it over the vocabulary; None for
            what an adapter started from.
        budget: what may be used at a time.

    Raises:
        BatchError: fewer than two prompts, or no reward variance.
    """
    units, unlike = noise_units(update, policy.settings)
    count = int(units.max()) + 1
    if count < 2:
        raise BatchError(
            f"noise scale: the update batch has {count} prompt, expected at least 2; "
            "the unit is the prompt group, so sample more prompts"
        )
    weights = token_weights or loss_token_weights(update, policy.settings, step=policy.step)
    metrics: dict[str, ParameterVector | None] = {"sgd": None}
    if preconditioner is not None:
        metrics["preconditioned"] = preconditioner
    gradients = sequence_gradients(policy, update, weights, reference)
    found = grams(policy, gradients, metrics=metrics, budget=budget).square
    scales = {
        name: from_products(
            K.numpy(), units, unit="squared gradient norm", method=f"{name} metric", unlike=unlike
        )
        for name, K in found.items()
    }
    sizes = {
        name: batch_sizes(
            group_products(found[name].numpy(), units),
            noise=scale.noise,
            noise_scale=scale.prompts,
            group_size=len(update) / count,
            run_prompts=policy.settings.prompts_per_step,
            # a KL penalty needs the reference's log-probs and is a mean over groups for the most part
            scale=loss_scale(update, policy.settings, weights) if policy.settings.beta == 0 else None,
        )
        for name, scale in scales.items()
    }
    doubt = ""
    if sums_over_vocabulary(policy.settings):
        doubt = "the KL divergence at given prefixes, which belongs to no sequence, is not in it"
    return NoiseScales(
        noise_scale=scales["sgd"].prompts,
        sgd=scales["sgd"],
        preconditioned=scales.get("preconditioned"),
        effects={
            f"{i.quantity}_{i.normalisation}": effect_noise_scale(
                i.sequences, units, unit=i.unit, unlike=unlike, doubt=doubt
            )
            for i in influences
        },
        batch_sizes=sizes,
    )


def effect_noise_scale(
    sequences: FloatArray, prompts: IntArray, *, unit: str, unlike: str = "", doubt: str = ""
) -> NoiseScale:
    """Noise scale of a scalar effect: how many prompts until the batch's effect on a quantity is resolved.

    The effect is one number per sequence, so its inner products are products of numbers: the formulas are
    those of the gradient in one dimension, the direction u. Momentum and decay have no part in it.

    Args:
        sequences: (seq,) influence of each sequence of the update batch.
        prompts: (seq,) prompt of each.
        unit: of the influence.
        unlike: see :func:`from_products`.
        doubt: why the influences do not hold all that the batch does; empty where they do.
    """
    products = np.outer(sequences, sequences)
    found = from_products(
        products, prompts, unit=f"({unit})^2", method="effect of the update batch", unlike=unlike
    )
    names = [f.name for f in fields(found) if isinstance(getattr(found, f.name), Estimate)]
    return replace(found, **{name: getattr(found, name).doubted(doubt) for name in names})


def group_products(K: FloatArray, prompts: IntArray) -> FloatArray:
    """(prompt, prompt) inner products of the group gradients g_b, whose mean is the gradient of the batch.

    Args:
        K: (seq, seq) inner products of c_i, where sum_i c_i is the gradient of the batch.
        prompts: (seq,) prompt of each sequence, numbered from 0.
    """
    count = int(prompts.max()) + 1
    member = (prompts[:, None] == np.arange(count)[None, :]).astype(np.float64)
    return np.asarray(count**2 * member.T @ K @ member)


def from_products(
    K: FloatArray, prompts: IntArray, *, unit: str, method: str, unlike: str = ""
) -> NoiseScale:
    """Noise scale from the inner products of all sequences' contributions to the batch's gradient.

    Args:
        K: (seq, seq) inner products of c_i, where sum_i c_i is the gradient of the batch.
        prompts: (seq,) prompt of each sequence.
        unit: of the inner products.
        method: recorded.
        unlike: why the sequences of a prompt are not draws of one distribution, so that there is no noise
            within prompts; empty where they are.
    """
    labels, index = np.unique(prompts, return_inverse=True)
    count = len(labels)
    sizes = np.bincount(index).astype(np.float64)
    products = group_products(K, index)
    own = np.array([float(np.trace(K[np.ix_(index == b, index == b)])) for b in range(count)])
    scatter = count**2 * sizes * own - np.diag(products)
    within = np.divide(scatter, sizes - 1, out=np.full(count, np.nan), where=sizes > 1)
    everything = np.arange(count)

    def signal(keep: IntArray) -> float:
        part = products[np.ix_(keep, keep)]
        size = len(keep)
        return float((part.sum() - np.trace(part)) / (size * (size - 1)))

    def noise(keep: IntArray) -> float:
        return float(np.trace(products[np.ix_(keep, keep)]) / len(keep)) - signal(keep)

    def inside(keep: IntArray) -> float:
        return float(within[keep].mean())

    def quotient(keep: IntArray) -> float:
        strength = signal(keep)  # exactly 0 where fewer than two groups have a gradient at all
        return noise(keep) / strength if strength else float("nan")

    def estimate(statistic: Callable[[IntArray], float], of: str, in_unit: str) -> Estimate:
        value = statistic(everything)
        _, error = jackknife(leave_out(statistic, everything))
        how = f"{of}, {method}, jackknife over prompts"
        if count < 3 or not np.isfinite(error):
            reason = f"{count} prompts with {int(sizes.min())} responses or more: too few for an error"
            return Estimate(value, float("nan"), count, in_unit, how, reliable=False, reason=reason)
        return Estimate(value, error, count, in_unit, how)

    strength, spread = estimate(signal, "signal", unit), estimate(noise, "noise of one group", unit)
    found = estimate(quotient, "noise / signal", "prompts")
    low, high = noise_limits(products)
    ratio = replace(found, method=f"{found.method}, limits by inverting a test", low=low, high=high)
    if not np.isfinite(high):
        nan = float("nan")
        doubt = (
            f"the signal ({strength.value:.2g} ± {strength.stderr:.2g}) is not resolved from zero, so there "
            f"is no noise scale, at most a lower limit ({low:.3g} prompts); sample more prompts"
        )
        ratio = Estimate(nan, nan, count, "prompts", ratio.method, False, doubt, low=low, high=high)
    elif count < FEWEST:
        ratio = ratio.doubted(f"{count} prompts, expected at least {FEWEST} for limits")

    def part(statistic: Callable[[IntArray], float], of: str) -> Estimate:
        if not unlike:
            return estimate(statistic, of, unit)
        return Estimate(float("nan"), float("nan"), count, unit, of, reliable=False, reason=unlike)

    group = float(sizes.mean())
    total = strength.value + spread.value / count
    return NoiseScale(
        signal=strength,
        noise=spread,
        within_prompts=part(inside, "within-prompt part of the noise"),
        between_prompts=part(lambda keep: noise(keep) - inside(keep), "between-prompt part of the noise"),
        prompts=ratio,
        sequences=replace(
            ratio.scaled(group, unit="sequences"), method=f"{ratio.method}, {group:g} responses a prompt"
        ),
        at_least=low,
        share_of_noise=spread.value / count / total if total > 0 else float("nan"),
    )

"""Batch size and learning rate from the noise scale: noise-to-signal at other batch sizes than this one.

If prompt groups are independent and the loss averages over them, the gradient of m groups has noise tr S/m,
falling like 1/m. That is checked, not assumed: the update batch is cut into disjoint batches of m groups in
the order in which they were sampled, each with the loss's own normalisation over its sequences and tokens,
and the variance between their gradients is compared with tr S/m. Order effects (a curriculum, repeated
prompts) and losses that are no mean over groups (bnpo, dapo, rewards scaled by the batch) show as a ratio
other than 1. Drift of the policy between steps, which the noise scale of a window of training steps contains,
has no part in it: everything here is measured at one checkpoint.

With B = noise scale, the largest step that still pays grows with the batch like 1/(1 + B/m) for SGD
(McCandlish et al. 2018, arXiv:1812.06162, eq. 2.6) and like its square root for Adam where noise dominates
(the lower end of the exponents 0.5 to 1 found there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from stepscope.policy.loss.estimators import with_advantages
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import token_weights as loss_token_weights
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.results.noise import BatchSize, BatchSizes
from stepscope.stats import Estimate, jackknife, leave_out

CHUNKS = 8
"""Parts of the batch that the slope is jackknifed over; its largest batches are as large as one of them."""

STEP = 1e-6
"""Relative step of the derivative by which the error of the noise scale goes on."""

Scale = Callable[[IntArray], float]
"""Groups of a smaller batch to the factor between its gradient and the mean of their shares of the whole."""


def batch_sizes(
    products: FloatArray,
    *,
    noise: Estimate,
    noise_scale: Estimate,
    group_size: float,
    run_prompts: int,
    scale: Scale | None = None,
) -> BatchSizes:
    """Noise-to-signal and admitted learning rates at powers of two and at multiples of the run's batch size.

    Args:
        products: (prompt, prompt) inner products of the groups' gradients, in the order of sampling.
        noise: tr S, variance of one group.
        noise_scale: B, in prompt groups.
        group_size: responses per prompt.
        run_prompts: prompt groups per step of the run.
        scale: normalisation of a smaller batch (:func:`loss_scale`), or None where the loss is a plain mean.
    """
    count = len(products)
    sizes = {2**k for k in range((4 * count).bit_length())} | {count, *(run_prompts * k for k in (1, 2, 4))}
    slope_sizes = [2**k for k in range(max(1, count // CHUNKS).bit_length())]
    return BatchSizes(
        run_prompts=run_prompts,
        slope=_slope(products, slope_sizes, scale),
        rows=tuple(
            _row(products, m, noise, noise_scale, group_size, run_prompts, scale)
            for m in sorted(sizes)
            if m <= 4 * max(count, run_prompts)
        ),
    )


def loss_scale(update: Rollouts, settings: StepSettings, token_weights: Sequence[FloatArray]) -> Scale:
    """How a batch of some of the groups would be weighted by the loss, relative to the mean of their shares.

    Taken along the weights in the whole batch: exact where the loss's normalisation is one number per batch.

    Args:
        update: the update batch.
        settings: the loss.
        token_weights: w_ik in the whole batch.
    """
    index = update.prompt_index

    def scale(groups: IntArray) -> float:
        members = np.flatnonzero(np.isin(index, groups))
        part = update.select(members)
        there = np.concatenate([token_weights[int(i)] for i in members])
        if not there.any():
            return 1.0
        if settings.kl_in_reward == 0.0:
            part = with_advantages(part, settings)
        here = np.concatenate(loss_token_weights(part, settings))
        return float(here @ there / (there @ there)) * len(groups) / update.num_prompts

    return scale


def _row(
    products: FloatArray,
    m: int,
    noise: Estimate,
    noise_scale: Estimate,
    group_size: float,
    run_prompts: int,
    scale: Scale | None,
) -> BatchSize:
    batches = len(products) // m
    found = _noise(products, m, scale, noise) if batches >= 2 else None
    law = noise.value / m

    def estimate(of: Callable[[float], float], method: str) -> Estimate:
        """A monotone function of the noise scale B."""
        ends = sorted(of(end) for end in (noise_scale.low, noise_scale.high))
        B = noise_scale.value
        slope = (of(B * (1 + STEP)) - of(B * (1 - STEP))) / (2 * STEP * B) if B > 0 else float("nan")
        return replace(
            noise_scale,
            value=of(B),
            stderr=abs(slope) * noise_scale.stderr,
            unit="1",
            method=f"{method}, noise scale {noise_scale.method}",
            low=ends[0],
            high=ends[1],
        )

    def admitted(B: float) -> float:
        return m / run_prompts if np.isinf(B) else (1 + B / run_prompts) / (1 + B / m)

    return BatchSize(
        prompts=m,
        sequences=m * group_size,
        batches=batches,
        noise=found,
        over_law=None if found is None else found.scaled(1 / law, unit="1"),
        noise_to_signal=estimate(lambda B: B / m, "noise scale / batch size"),
        lr_sgd=estimate(admitted, "(1 + B/run)/(1 + B/m)"),
        lr_adam=estimate(lambda B: float(np.sqrt(admitted(B))), "square root of (1 + B/run)/(1 + B/m)"),
    )


def _noise(products: FloatArray, m: int, scale: Scale | None, like: Estimate) -> Estimate:
    """Variance between disjoint batches of m groups, jackknifed over them."""
    between = _between(products, m, scale)
    batches = len(between)
    value = _variance(between)
    how = f"variance between {batches} disjoint batches in the order of sampling"
    if batches < 3:
        reason = f"{batches} batches of this size: too few for an error"
        return Estimate(value, float("nan"), batches, like.unit, how, reliable=False, reason=reason)
    _, error = jackknife(leave_out(lambda kept: _variance(between[np.ix_(kept, kept)]), np.arange(batches)))
    return Estimate(value, error, batches, like.unit, f"{how}, jackknife over them")


def _between(products: FloatArray, m: int, scale: Scale | None) -> FloatArray:
    """(batch, batch) inner products of the gradients of disjoint batches of m groups."""
    batches = len(products) // m
    groups = np.arange(batches * m).reshape(batches, m)
    member = np.zeros((len(products), batches))
    for k, chosen in enumerate(groups):
        member[chosen, k] = (1.0 if scale is None else scale(chosen)) / m
    return np.asarray(member.T @ products @ member)


def _variance(between: FloatArray) -> float:
    """Unbiased variance of vectors from their inner products."""
    count = len(between)
    return float((np.trace(between) - between.sum() / count) / (count - 1))


def _slope(products: FloatArray, sizes: Sequence[int], scale: Scale | None) -> Estimate:
    """Least squares of log noise on log m, jackknifed over eighths of the batch."""
    how = f"log noise on log batch size, {', '.join(map(str, sizes))} prompts; jackknife over {CHUNKS} parts"
    nan = float("nan")
    if len(sizes) < 2:
        reason = f"{len(products)} prompts, expected at least {2 * CHUNKS}"
        return Estimate(nan, nan, len(products), "1", how, reliable=False, reason=reason)
    largest = sizes[-1]
    used = CHUNKS * largest
    between = {m: _between(products[:used, :used], m, scale) for m in sizes}

    def slope(without: int | None) -> float:
        logs = []
        for m in sizes:
            chunk = np.arange(used // m) * m // largest
            keep = np.flatnonzero(chunk != without)
            variance = _variance(between[m][np.ix_(keep, keep)])
            logs.append(np.log(variance) if variance > 0 else nan)
        return float(np.polyfit(np.log(sizes), logs, 1)[0]) if np.isfinite(logs).all() else nan

    _, error = jackknife([slope(chunk) for chunk in range(CHUNKS)])
    if not np.isfinite(error):
        reason = "too few groups have a gradient"
        return Estimate(slope(None), nan, CHUNKS, "1", how, reliable=False, reason=reason)
    return Estimate(slope(None), error, CHUNKS, "1", how)

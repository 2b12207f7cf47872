"""Importance weights of responses sampled at params, for the policy at params + lr * direction.

Per decision: rho_{<k} = prod_{j<k} pi'(y_j)/pi(y_j) carries a position that depends on the prefix alone,
rho_{<=k} one that depends on the token too. Weights are kept as differences from one (``expm1``), so that a
change of 1e-12 is as exact as a change of 1. (Precup et al. 2000; Jiang & Li 2016.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepscope.results import BoolArray, FloatArray

MIN_TAIL = 5
"""Fewest tail points to which :func:`pareto_k` fits a shape."""


@dataclass(frozen=True)
class Weights:
    """Importance weights of a batch, minus one. Beyond the end of a response they keep their last value.

    Attributes:
        before: (seq, tok) rho_{<k} - 1.
        through: (seq, tok) rho_{<=k} - 1.
        growth: (seq, tok) rho_{<=k} - rho_{<k}; has mean zero given the prefix; zero on padding.
        whole: (seq,) product over the whole response, minus one.
    """

    before: FloatArray
    through: FloatArray
    growth: FloatArray
    whole: FloatArray


def importance_weights(logprobs: FloatArray, shifted_logprobs: FloatArray) -> Weights:
    """Weights from (seq, tok) log-probs at params and at the shifted parameters, both zero on padding."""
    ratio = shifted_logprobs - logprobs
    through = np.cumsum(ratio, axis=1)
    before = np.concatenate([np.zeros((len(ratio), 1)), through[:, :-1]], axis=1)
    return Weights(
        before=np.expm1(before),
        through=np.expm1(through),
        growth=np.exp(before) * np.expm1(ratio),
        whole=np.expm1(through[:, -1]),
    )


def last_weights(weights: Weights, mask: BoolArray, *, token_dependent: bool) -> FloatArray:
    """(seq,) the largest-variance weight that a quantity uses: at the last position of each response.

    Args:
        weights: of the batch.
        mask: (seq, tok) True on response tokens that the policy wrote.
        token_dependent: whether the quantity depends on the last token itself (reward), not on prefixes only.
    """
    if token_dependent:
        return 1 + weights.whole
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    return np.asarray(1 + weights.before[np.arange(len(mask)), last], dtype=np.float64)


@dataclass(frozen=True)
class WeightCheck:
    """Whether importance weights can be trusted.

    Attributes:
        effective_sample_size: Kish's, out of ``n`` sequences.
        pareto_k: shape of the weights' tail; nan where too few differ.
        n: sequences.
        reason: why not; empty if they can.
    """

    effective_sample_size: float
    pareto_k: float
    n: int
    reason: str


def check_weights(weights: FloatArray, sequence_weights: FloatArray | None = None) -> WeightCheck:
    """Effective sample size and tail of (seq,) weights; unreliable below half of n, or above k = 0.7.

    Where ``sequence_weights`` enumerate all responses nothing is sampled and nothing can be wrong.
    """
    if sequence_weights is not None:
        return WeightCheck(float(len(weights)), float("nan"), len(weights), "")
    size = effective_sample_size(weights)
    tail = pareto_k(weights)
    reasons = []
    if not size >= 0.5 * len(weights):
        reasons.append(f"effective sample size {size:.1f} of {len(weights)}")
    if tail > 0.7:
        reasons.append(f"Pareto k {tail:.2f} above 0.7")
    return WeightCheck(size, tail, len(weights), "; ".join(reasons))


def effective_sample_size(weights: npt.ArrayLike) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 of importance weights; nan when all are zero."""
    w = np.asarray(weights, dtype=np.float64)
    squares = float((w**2).sum())
    return float(w.sum()) ** 2 / squares if squares > 0 else float("nan")


def pareto_k(weights: npt.ArrayLike) -> float:
    """Shape k of the tail of importance weights: above 0.7 their mean cannot be trusted.

    Fits a generalised Pareto distribution to the excesses of the largest ``ceil(min(0.2 n, 3 sqrt(n)))``
    weights over the next smaller one, by Zhang & Stephens (2009), drawn towards 0.5 with the weight of ten
    points as in Pareto smoothed importance sampling (Vehtari et al. 2024). The weights have about 1/k finite
    moments.

    Args:
        weights: (n,) nonnegative weights; their scale does not matter.

    Returns:
        k, or nan when the tail has fewer than five points above the cutoff (too few weights, or all equal).
    """
    w = np.sort(np.asarray(weights, dtype=np.float64))
    size = int(np.ceil(min(0.2 * len(w), 3 * np.sqrt(len(w)))))
    if size < MIN_TAIL or not np.isfinite(w).all():
        return float("nan")
    excess = w[-size:] - w[-size - 1]
    excess = excess[excess > 0]
    if len(excess) < MIN_TAIL:
        return float("nan")
    count = len(excess)
    grid = 30 + int(np.sqrt(count))
    quartile = excess[int(count / 4 + 0.5) - 1]
    b = 1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = b / (3 * quartile) + 1 / excess[-1]
    shape = np.log1p(-b[:, None] * excess).mean(axis=1)
    profile = count * (np.log(-b / shape) - shape - 1)
    posterior = np.exp(profile - profile.max())
    posterior /= posterior.sum()
    k = float(np.log1p(-float(posterior @ b) * excess).mean())
    return (count * k + 10 * 0.5) / (count + 10)

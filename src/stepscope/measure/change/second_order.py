"""Second order of the change, lr^2/2 direction' (Hess F) direction, and the lrs where a line is enough.

The second derivative is that of the importance-weighted estimator of ``measure.quantity.estimators`` itself,

    F'' = E[ sum_k (rho_{<=k} - rho_{<k})'' (R_k - b_k) + 2 l'_k R'_k + f''_k ],
    (rho_{<=k} - rho_{<k})'' = l''_k + l'_k (2 sum_{j<k} l'_j + l'_k)

with primes for derivatives in lr at lr = 0. It is an unbiased estimator of the exact second derivative, on
the same samples as the linear and the true change.
"""

from __future__ import annotations

import numpy as np

from stepscope.measure.quantity.estimators import (
    ProbeValues,
    Sampled,
    length_slope,
    linear,
    per_decision,
    returns,
    value,
)
from stepscope.measure.quantity.values import TokenValues
from stepscope.results import BoolArray, FloatArray

BEND_SHARE = 0.1
"""Second order may reach this share of the linear change before the regime is no longer called linear."""
ROUND_OFF_SHARE = 0.1
"""Round-off may reach this share of the linear change before the change is no longer called measurable."""


def second(probe: ProbeValues, first: TokenValues, other: TokenValues) -> Sampled:
    """d2F/dlr2 at lr = 0, of the importance-weighted estimator itself; unbiased for F.

    Args:
        probe: the probe.
        first: first derivatives of the tokens' values.
        other: second derivatives of the tokens' values.
    """
    moved = (other.prefix + other.token).sum(1)
    if not probe.quantity.on_policy:
        return _over_length(probe, moved)
    ahead_dot = returns(first, probe.mask, 0.0)
    bend = _weight_bend(first, other)
    moved = moved + (bend * probe.ahead + 2 * first.logprobs * ahead_dot).sum(1)
    mean = probe.mean(moved)
    if not probe.quantity.per_token:
        return Sampled(mean, moved - mean)
    slope, length = linear(probe, first), length_slope(probe, first)
    length_bend = probe.mean((bend * probe.length_ahead).sum(1))
    N = probe.mean_length
    ratio = (mean - 2 * slope.value * length.value) / N
    residuals = (
        (moved - mean)
        - value(probe).residuals * length_bend
        - 2 * slope.residuals * length.value
        - 2 * slope.value * length.residuals
        - ratio * (probe.lengths - N)
    ) / N
    return Sampled(ratio, residuals)


def _over_length(probe: ProbeValues, moved: FloatArray) -> Sampled:
    mean = probe.mean(moved)
    if not probe.quantity.per_token:
        return Sampled(mean, moved - mean)
    ratio = mean / probe.mean_length
    return Sampled(ratio, (moved - ratio * probe.lengths) / probe.mean_length)


def _weight_bend(first: TokenValues, other: TokenValues) -> FloatArray:
    """(seq, tok) second derivative of rho_{<=k} - rho_{<k}: l''_k + l'_k (2 sum_{j<k} l'_j + l'_k)."""
    slope = first.logprobs
    before = np.cumsum(slope, axis=1) - slope
    return np.asarray(other.logprobs + slope * (2 * before + slope), dtype=np.float64)


def linear_up_to(slope: float, bend: float) -> float:
    """The lr at which |second order| reaches a tenth of |linear|: 0.2 |F'|/|F''|; inf for a straight line."""
    return 2 * BEND_SHARE * abs(slope) / abs(bend) if bend else float("inf")


def measurable_from(slope: float, round_off: float) -> float:
    """The lr at which the linear change is ten times the round-off floor of the true change; inf if flat."""
    return round_off / (ROUND_OFF_SHARE * abs(slope)) if slope else float("inf")


def round_off_lrs(first: TokenValues, mask: BoolArray, eps: float) -> tuple[float, ...]:
    """Learning rates so small that the true change is known to be linear, and what else is seen is round-off.

    They move the log-probs by about a hundred rounding errors: enough for every rounding on the way through
    the model to be drawn anew, far too little for any curvature.

    Args:
        first: first derivatives along the step.
        mask: (seq, tok) True on response tokens.
        eps: machine epsilon of the model's arithmetic.
    """
    speed = float(np.sqrt((first.logprobs[mask] ** 2).mean()))
    if speed == 0:
        return ()
    unit = 64 * eps / speed
    return (unit, -unit, 1.5 * unit, -1.5 * unit)


def round_off_floor(probe: ProbeValues, first: TokenValues, moved: dict[float, TokenValues]) -> float:
    """Round-off error of the true change, from its distance to the linear one at ``round_off_lrs``.

    Root mean square over the learning rates of the batch's error; at least the value that independent
    errors of the sequences would give.

    Args:
        probe: the quantity on the probe batch.
        first: first derivatives along the step.
        moved: token values by learning rate.
    """
    slope = linear(probe, first)
    count = len(probe.mask)
    share = np.full(count, 1 / count) if probe.sequence_weights is None else probe.sequence_weights
    together, apart = [], []
    for lr, table in moved.items():
        left = per_decision(probe, table).plus(slope, -lr)
        together.append(left.value**2)
        apart.append(float(((share * (left.residuals + left.value)) ** 2).sum()))
    return float(np.sqrt(np.maximum(np.mean(together), np.mean(apart)))) if together else 0.0

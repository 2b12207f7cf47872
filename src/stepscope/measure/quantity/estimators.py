"""Estimators of a quantity's change: algebra on per-token tables, in float64, without a model.

With the importance weights rho of ``measure.quantity.importance_weights`` and any b_k that is a function of
the prefix,

    F(params') - F = E[ sum_k (rho_{<=k} - rho_{<k}) (R'_k - b_k) + sum_k (f'_k - f_k) ]

which is the plain per-decision estimator E[sum_k rho_{<k} f'_k] - E[sum_k f_k] with control variates of known
mean zero. Its first and second derivatives at lr = 0 are the linear and second-order estimators, term by
term, so the three agree on the same samples and not only on average. Per token the same is done for
sum_k (f_k - Fbar), Fbar fixed, and for the length; the ratio's error is the delta method's.

Every estimator gives a value and its residuals (mean zero); standard errors are clustered by prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from stepscope.measure.quantity.base import Quantity
from stepscope.measure.quantity.importance_weights import Weights, importance_weights
from stepscope.measure.quantity.values import TokenValues
from stepscope.results import BoolArray, FloatArray, IntArray
from stepscope.stats import Estimate, clustered_estimate


@dataclass(frozen=True)
class Sampled:
    """A value with its residuals: value + mean of those is the estimator's first-order expansion.

    Attributes:
        value: the estimate.
        residuals: (seq,) first-order effect of each sequence on the value, times the number of sequences.
    """

    value: float
    residuals: FloatArray

    def scaled(self, factor: float) -> Sampled:
        """``factor`` times it."""
        return Sampled(factor * self.value, factor * self.residuals)

    def plus(self, other: Sampled, factor: float = 1.0) -> Sampled:
        """The sum ``self + factor * other``, errors paired sequence by sequence."""
        return Sampled(self.value + factor * other.value, self.residuals + factor * other.residuals)


@dataclass(frozen=True)
class Baseline:
    """b_k, and what it bought.

    Attributes:
        kind: rung of the ladder of :mod:`stepscope.measure.quantity.baselines`.
        values: (seq, tok) b_k.
        stderr: standard error of the linear change, per unit lr, that each rung tried leaves.
        explained: share of the variance of R_k that the chosen rung explains, out of sample.
    """

    kind: str
    values: FloatArray
    stderr: dict[str, float] = field(default_factory=dict)
    explained: float = math.nan


@dataclass(frozen=True)
class ProbeValues:
    """A quantity's values on a probe batch, ready for estimation.

    Attributes:
        quantity: whose normalisation and version the estimators follow.
        values: at the parameters themselves.
        mask: (seq, tok) True on response tokens.
        clusters: (seq,) prompt of each sequence.
        baseline: for R_k centred as the normalisation wants.
        length_baseline: (seq, tok) the same for the number of positions that follow.
        sequence_weights: (seq,) sum to one where the batch enumerates all responses; None for a sample.
    """

    quantity: Quantity
    values: TokenValues
    mask: BoolArray
    clusters: IntArray
    baseline: Baseline
    length_baseline: FloatArray
    sequence_weights: FloatArray | None = None

    def mean(self, values: FloatArray) -> float:
        """Mean over sequences, or the exact expectation where the batch is an enumeration."""
        if self.sequence_weights is None:
            return float(values.mean())
        return float(self.sequence_weights @ values)

    @property
    def lengths(self) -> FloatArray:
        """(seq,) n."""
        return np.asarray(self.mask.sum(1), dtype=np.float64)

    @property
    def totals(self) -> FloatArray:
        """(seq,) sum_k f_k."""
        return np.asarray((self.values.prefix + self.values.token).sum(1), dtype=np.float64)

    @property
    def mean_length(self) -> float:
        """N."""
        return self.mean(self.lengths)

    @property
    def centre(self) -> float:
        """Fbar = F/N per token, 0 per sequence."""
        return self.mean(self.totals) / self.mean_length if self.quantity.per_token else 0.0

    @property
    def offset(self) -> float:
        """What is taken off every f_k: ``centre`` where positions come and go, 0 where they stay."""
        return self.centre if self.quantity.on_policy else 0.0

    @property
    def ahead(self) -> FloatArray:
        """(seq, tok) R_k - b_k, R_k centred as the normalisation wants."""
        return self.ahead_at(self.values)

    def ahead_at(self, values: TokenValues) -> FloatArray:
        """(seq, tok) R_k - b_k with R_k from other values of the same tokens."""
        return returns(values, self.mask, self.offset) - self.baseline.values

    @property
    def length_ahead(self) -> FloatArray:
        """(seq, tok) number of positions that follow, less its baseline."""
        return after(self.mask.astype(np.float64)) - self.length_baseline

    def select(self, indices: IntArray) -> ProbeValues:
        """Some sequences, with repeats if asked; fitted baselines stay."""
        return replace(
            self,
            values=self.values.select(indices),
            mask=self.mask[indices],
            clusters=self.clusters[indices],
            baseline=replace(self.baseline, values=self.baseline.values[indices]),
            length_baseline=self.length_baseline[indices],
            sequence_weights=None if self.sequence_weights is None else self.sequence_weights[indices],
        )

    def estimate(self, sampled: Sampled, *, unit: str, method: str, stderr: float | None = None) -> Estimate:
        """An estimate with its standard error clustered by prompt; exact expectations have error 0.

        With ``stderr`` the error was found by another way than the residuals.
        """
        if self.sequence_weights is not None:
            return Estimate(sampled.value, 0.0, len(self.mask), unit, f"exact expectation, {method}")
        return clustered_estimate(
            sampled.value, sampled.residuals, self.clusters, unit=unit, method=method, stderr=stderr
        )


def after(values: FloatArray) -> FloatArray:
    """(seq, tok) sum over the positions behind each one."""
    return np.asarray(np.cumsum(values[:, ::-1], axis=1)[:, ::-1] - values, dtype=np.float64)


def returns(values: TokenValues, mask: BoolArray, offset: float) -> FloatArray:
    """(seq, tok) R_k = sum_{j>k} (prefix_j - offset) + sum_{j>=k} token_j; zero on padding."""
    ahead = after(values.prefix - offset * mask)
    return np.asarray((ahead + after(values.token) + values.token) * mask, dtype=np.float64)


def value(probe: ProbeValues) -> Sampled:
    """The quantity before the step: F, or F/N with the ratio's residuals."""
    totals = probe.totals
    if not probe.quantity.per_token:
        return _centred(probe, totals)
    return Sampled(probe.centre, (totals - probe.centre * probe.lengths) / probe.mean_length)


def linear(probe: ProbeValues, first: TokenValues) -> Sampled:
    """dF/dlr at lr = 0: E[sum_k f-dot_k + sum_k (R_k - b_k) l-dot_k], a ratio per token."""
    moved = (first.prefix + first.token).sum(1)
    if probe.quantity.on_policy:
        moved = moved + (probe.ahead * first.logprobs).sum(1)
    mean = probe.mean(moved)
    if not probe.quantity.per_token:
        return Sampled(mean, moved - mean)
    ratio = mean / probe.mean_length
    residuals = (moved - ratio * probe.lengths) / probe.mean_length
    length = length_slope(probe, first)
    return Sampled(ratio, residuals - value(probe).residuals * length.value / probe.mean_length)


def length_slope(probe: ProbeValues, first: TokenValues) -> Sampled:
    """dN/dlr; zero where the prefixes stay."""
    if not probe.quantity.on_policy:
        return Sampled(0.0, np.zeros(len(probe.mask)))
    return _centred(probe, (probe.length_ahead * first.logprobs).sum(1))


def per_decision(probe: ProbeValues, moved: TokenValues) -> Sampled:
    """True change by per-decision weights with the probe's baseline as control variate.

    Unbiased for F(params') - F; consistent (bias of order 1/prompts) for the ratio per token.

    Args:
        probe: the probe.
        moved: token values at the shifted parameters.
    """
    total = (moved.prefix - probe.values.prefix + moved.token - probe.values.token).sum(1)
    length = np.zeros(len(total))
    if probe.quantity.on_policy:
        weights = importance_weights(probe.values.logprobs, moved.logprobs)
        total = total + (weights.growth * probe.ahead_at(moved)).sum(1)
        length = (weights.growth * probe.length_ahead).sum(1)
    return _ratio(probe, _centred(probe, total), _centred(probe, length))


def self_normalised(probe: ProbeValues, moved: TokenValues) -> Sampled:
    """True change by per-decision weights divided by their mean over sequences at each position.

    F' = sum_k (sum_i rho_{i,<k} f'_ik) / (sum_i rho_{i,<k}); a finished response keeps its last weight and
    adds nothing. Consistent, bias of order 1/n; bounded where plain weights are not.
    """
    if not probe.quantity.on_policy:
        return per_decision(probe, moved)
    weights = importance_weights(probe.values.logprobs, moved.logprobs)
    mask = probe.mask.astype(np.float64)
    total = _position_means(
        probe, weights.before, moved.prefix - probe.offset * mask, probe.values.prefix - probe.offset * mask
    ).plus(_position_means(probe, weights.through, moved.token, probe.values.token))
    return _ratio(probe, total, _position_means(probe, weights.before, mask, mask))


def _position_means(probe: ProbeValues, excess: FloatArray, now: FloatArray, base: FloatArray) -> Sampled:
    """sum_k of self-normalised mean of ``now`` minus mean of ``base``, from weights minus one."""
    mean = np.array([probe.mean(column) for column in excess.T])
    relative = (excess - mean) / (1 + mean)
    gained = relative * now + (now - base)
    change = np.array([probe.mean(column) for column in gained.T])
    level = np.array([probe.mean(column) for column in base.T]) + change
    return Sampled(float(change.sum()), (gained - relative * level - change).sum(1))


def whole_sequence(probe: ProbeValues, moved: TokenValues) -> Sampled:
    """True change with the whole response's weight on every position, self-normalised.

    The customary estimator; consistent, and the baseline that the others are compared with.
    """
    if not probe.quantity.on_policy:
        return per_decision(probe, moved)
    excess = importance_weights(probe.values.logprobs, moved.logprobs).whole
    now = (moved.prefix + moved.token).sum(1) - probe.offset * probe.lengths
    base = probe.totals - probe.offset * probe.lengths
    mean = probe.mean(excess)
    relative = (excess - mean) / (1 + mean)

    def reweighted(now: FloatArray, base: FloatArray) -> Sampled:
        gained = relative * now + (now - base)
        change = probe.mean(gained)
        return Sampled(change, gained - relative * (probe.mean(base) + change) - change)

    return _ratio(probe, reweighted(now, base), reweighted(probe.lengths, probe.lengths))


def regression(probe: ProbeValues, moved: TokenValues) -> Sampled:
    """Per-decision change with the whole response's weight, whose mean is one, as regression control variate.

    The coefficient is the least-squares one; consistent, bias of order 1/n.
    """
    plain = per_decision(probe, moved)
    if not probe.quantity.on_policy:
        return plain
    control = importance_weights(probe.values.logprobs, moved.logprobs).whole
    excess = control - probe.mean(control)
    spread = probe.mean(excess**2)
    slope = probe.mean(excess * plain.residuals) / spread if spread > 0 else 0.0
    return Sampled(plain.value - slope * probe.mean(control), plain.residuals - slope * excess)


def weights_of(probe: ProbeValues, moved: TokenValues) -> Weights:
    """The importance weights behind an on-policy change."""
    return importance_weights(probe.values.logprobs, moved.logprobs)


def _centred(probe: ProbeValues, values: FloatArray) -> Sampled:
    mean = probe.mean(values)
    return Sampled(mean, values - mean)


def _ratio(probe: ProbeValues, total: Sampled, length: Sampled) -> Sampled:
    """Change of F (per_seq) or F/N from the changes of E[sum (f - Fbar)] and of N, paired by sequence."""
    if not probe.quantity.per_token:
        return total
    N = probe.mean_length
    moved_N = N + length.value
    ratio = total.value / moved_N
    residuals = (total.residuals - ratio * (length.residuals + probe.lengths - N)) / moved_N
    return Sampled(ratio, residuals - value(probe).residuals * length.value / moved_N)


ESTIMATORS = {
    "per_decision": per_decision,
    "self_normalised": self_normalised,
    "whole_sequence": whole_sequence,
    "regression": regression,
}

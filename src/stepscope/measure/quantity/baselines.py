"""Baselines b_k for the visitation term: any function of the prefix leaves the estimator unbiased.

The ladder, from nothing to a critic:

- ``none``: zero. (Entropy-to-go counted from position k itself, with H_k as baseline, is this one.)
- ``current``: the quantity's own prefix value at k, for entropy H_k.
- ``position``: the mean of R at position k over *other* prompts.
- ``ridge``: that plus a ridge regression of the rest on the last hidden state, cross-fitted: the folds are
  made of prompts, so that no sequence's baseline has seen its own return, and the strength is chosen inside
  the training folds.

What a baseline bought is judged by the clustered standard error of the linear change that it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.quantity.estimators import Baseline, ProbeValues, after, linear, returns
from stepscope.measure.quantity.values import TokenValues
from stepscope.results import BoolArray, FloatArray, IntArray

LADDER = ("none", "current", "position", "ridge")
DEFAULT_RUNG = "position"
FEWEST_PROMPTS = 64
"""Prompts from which ``best`` chooses. With fewer its choice biases the change by a tenth of a standard error
or more (16: 0.18, 32: 0.10, at most 0.08 from 64 on) and its intervals cover 91 to 93 %."""
MARGIN = 0.05
"""``best`` leaves the default rung only for one whose standard error is smaller by this share."""
RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


def length_baseline(mask: BoolArray, clusters: IntArray) -> FloatArray:
    """(seq, tok) position mean over other prompts of the number of positions that follow."""
    return position_mean(after(mask.astype(np.float64)), mask, clusters)


def position_mean(targets: FloatArray, mask: BoolArray, clusters: IntArray) -> FloatArray:
    """(seq, tok) mean of the targets at each position over sequences of other prompts; 0 if none."""
    _, group = np.unique(clusters, return_inverse=True)
    num_groups = int(group.max()) + 1
    sums = np.zeros((num_groups, mask.shape[1]))
    counts = np.zeros((num_groups, mask.shape[1]))
    np.add.at(sums, group, targets * mask)
    np.add.at(counts, group, mask)
    other_sums, other_counts = sums.sum(0) - sums, counts.sum(0) - counts
    means = np.divide(other_sums, other_counts, out=np.zeros_like(sums), where=other_counts > 0)
    return np.asarray(means[group] * mask, dtype=np.float64)


def ridge_critic(
    targets: FloatArray,
    features: FloatArray,
    mask: BoolArray,
    clusters: IntArray,
    *,
    num_folds: int = 5,
    strengths: Sequence[float] = RIDGE_STRENGTHS,
    seed: int = 0,
) -> FloatArray:
    """Cross-fitted ridge regression of R_k on features of the prefix.

    Per fold of prompts: position means and regression are fitted on the other folds; a fifth of their prompts
    chooses the strength (relative to the variance of a standardised feature). Positions that no training
    response reaches take the means of the last one reached.

    Args:
        targets: (seq, tok) R_k.
        features: (seq, tok, feature), functions of the prefix.
        mask: (seq, tok) True on response tokens.
        clusters: (seq,) prompt of each sequence.
        num_folds: folds of prompts; fewer where there are fewer prompts.
        strengths: candidates.
        seed: of the split.

    Returns:
        (seq, tok) predictions, zero on padding.
    """
    labels = np.unique(clusters)
    folds = min(num_folds, len(labels))
    order = np.random.default_rng(seed).permutation(labels)
    predicted = np.zeros_like(targets)
    if folds < 2:
        return predicted
    for f in range(folds):
        held_out = np.isin(clusters, order[f::folds])
        training = order[~np.isin(order, order[f::folds])]
        validation = np.isin(clusters, training[::5])
        fit = ~held_out & ~validation
        if len(training) >= 5:
            errors = [
                _squared_error(_Ridge(targets, features, mask, fit, s), targets, features, mask, validation)
                for s in strengths
            ]
            strength = strengths[int(np.argmin(errors))]
        else:
            strength = strengths[-1]
        critic = _Ridge(targets, features, mask, ~held_out, strength)
        predicted[held_out] = critic.predict(features[held_out], mask[held_out])
    return predicted


class _Ridge:
    """Position means, plus a ridge regression of deviations from them on deviations of the features."""

    def __init__(
        self, targets: FloatArray, features: FloatArray, mask: BoolArray, rows: BoolArray, strength: float
    ) -> None:
        here = mask[rows]
        counts = here.sum(0)
        reached = np.maximum.accumulate(
            np.where(counts > 0, np.arange(len(counts)), int((counts > 0).argmax()))
        )
        self.targets = ((targets[rows] * here).sum(0) / np.maximum(counts, 1))[reached]
        self.features = ((features[rows] * here[..., None]).sum(0) / np.maximum(counts, 1)[:, None])[reached]
        x = (features[rows] - self.features)[here]
        spread = x.std(0)
        self.scale = np.where(spread > 1e-12 * (1 + np.abs(self.features).max(0)), spread, np.inf)
        z = x / self.scale
        gram = z.T @ z + strength * len(z) * np.eye(z.shape[1])
        self.coefficients = np.linalg.solve(gram, z.T @ (targets[rows] - self.targets)[here])

    def predict(self, features: FloatArray, mask: BoolArray) -> FloatArray:
        z = (features - self.features) / self.scale
        return np.asarray((self.targets + z @ self.coefficients) * mask, dtype=np.float64)


def _squared_error(
    critic: _Ridge, targets: FloatArray, features: FloatArray, mask: BoolArray, rows: BoolArray
) -> float:
    miss = (critic.predict(features[rows], mask[rows]) - targets[rows])[mask[rows]]
    return float((miss**2).mean()) if miss.size else 0.0


def fit_baseline(
    kind: str, probe: ProbeValues, first: TokenValues, *, features: FloatArray | None = None, seed: int = 0
) -> Baseline:
    """Fit a rung of the ladder, or all of them and keep one.

    ``best`` is the position mean, unless there are 64 prompts or more and another rung leaves a standard
    error smaller by a twentieth: the least of those. With fewer prompts or without the margin the choice
    follows noise and intervals cover less than they should (``tests/measure/test_coverage.py``).

    Args:
        kind: a rung, or ``best``.
        probe: the quantity on the probe batch; its own baseline is not used.
        first: first derivatives along the step, by which the rungs are judged.
        features: (seq, tok, feature) hidden states; needed for ``ridge`` and used by ``best`` if given.
        seed: of the ridge critic's folds.

    Raises:
        MeasurementError: unknown rung, or ``ridge`` without features.
    """
    if kind not in (*LADDER, "best"):
        raise MeasurementError(f"unknown baseline {kind!r}; choose from best, {', '.join(LADDER)}")
    if kind == "ridge" and features is None:
        raise MeasurementError("the ridge baseline needs hidden states; pass features=")
    nothing = np.zeros(probe.mask.shape)
    if not probe.quantity.on_policy:
        return Baseline("none", nothing)
    targets = returns(probe.values, probe.mask, probe.offset)
    if kind == "best" and probe.sequence_weights is None and len(np.unique(probe.clusters)) < FEWEST_PROMPTS:
        kind = DEFAULT_RUNG
    rungs = LADDER if kind == "best" else (kind,)
    fitted: dict[str, FloatArray] = {}
    for rung in rungs:
        if rung == "none":
            fitted[rung] = nothing
        elif rung == "current":
            fitted[rung] = probe.values.prefix * probe.mask
        elif rung == "position":
            fitted[rung] = position_mean(targets, probe.mask, probe.clusters)
        elif features is not None:
            inputs = np.concatenate([features, probe.values.prefix[..., None]], axis=-1)
            fitted[rung] = ridge_critic(targets, inputs, probe.mask, probe.clusters, seed=seed)
    stderr = {
        rung: probe.estimate(
            linear(replace(probe, baseline=Baseline(rung, b)), first), unit="", method=""
        ).stderr
        for rung, b in fitted.items()
    }
    chosen = _choose(stderr) if kind == "best" else kind
    left = (targets - fitted[chosen])[probe.mask]
    spread = float(targets[probe.mask].var())
    explained = 1 - float(left.var()) / spread if spread > 0 else float("nan")
    return Baseline(chosen, fitted[chosen], stderr, explained)


def _choose(stderr: dict[str, float]) -> str:
    """The default rung, or the best of those that beat it by the margin."""
    better = [rung for rung in stderr if stderr[rung] < (1 - MARGIN) * stderr[DEFAULT_RUNG]]
    return min(better, key=lambda rung: stderr[rung]) if better else DEFAULT_RUNG

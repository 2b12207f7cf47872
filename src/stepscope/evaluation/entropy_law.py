"""The entropy law R = -a exp(H) + b over the checkpoints of a run: performance bought with entropy.

Cui et al. 2025 (arXiv:2505.22617, section 2.4) fit it to entropy H (nats per token) and accuracy R during
training; b - a is the ceiling that is left when the entropy is used up, H = 0.

With x = exp(H) the law is a straight line R = b - a x whose points have errors in both variables, correlated
with each other (one set of responses) and between checkpoints (one set of prompts). The fit minimises

    chi^2 = sum_i e_i^2 / s_i^2,   e_i = R_i - b + a x_i,
    s_i^2 = var R_i + a^2 var x_i + 2 a cov(x_i, R_i) + scatter^2

(York et al. 2004). The scatter is an intrinsic scatter of R about the law, by the method of moments
(DerSimonian & Laird 1986, two steps): what chi^2 has beyond its expectation under the full covariance of the
points, in which errors that all checkpoints share do not count as scatter. Errors of everything derived from
the fit are the delta method on all H_i and R_i at once, with their full covariance plus the scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2 as chi2_distribution

from stepscope.errors import MeasurementError
from stepscope.intervals import student
from stepscope.results import FloatArray
from stepscope.results.entropy_law import EntropyLaw, LawPrediction
from stepscope.stats import Estimate, ratio_residuals

FRACTION = 0.15
"""Share of the checkpoints, the first ones, from which the later ones are predicted (Cui et al. 2025)."""

FEWEST = 3
"""Fewest points that a line is fitted to."""

SCAN = 59
"""Angles of the first scan for the best line, three degrees apart."""

FINEST = 1e-9
"""Spacing of the last scan, in radians."""

DOUBTFUL = 0.01
"""Probability of the chi^2 below which the points are said not to follow the law."""


def fit_run(
    steps: Sequence[int],
    entropy: FloatArray,
    tokens: FloatArray,
    solved: FloatArray,
    *,
    fraction: float = FRACTION,
    bootstrap_resamples: int = 0,
    seed: int = 0,
) -> EntropyLaw:
    """Fit the law to a run's checkpoints, evaluated on the same prompts.

    Args:
        steps: (checkpoint,) optimizer steps, in order.
        entropy: (checkpoint, prompt) position entropies summed over the responses to a prompt, nats.
        tokens: (checkpoint, prompt) response tokens.
        solved: (checkpoint, prompt) fraction of the responses that are correct; their mean is pass@1.
        fraction: share of the checkpoints to predict the others from.
        bootstrap_resamples: resamples of the prompts for ``intervals``; 0 for none.
        seed: of the resampling.

    Raises:
        MeasurementError: see :func:`fit_entropy_law`.
    """
    count = entropy.shape[1]
    prompts = np.arange(count)
    H, R = entropy.sum(1) / tokens.sum(1), solved.mean(1)
    residuals = np.stack(
        [ratio_residuals(x, y, prompts) for x, y in zip(entropy, tokens, strict=True)]
        + [ratio_residuals(x, np.ones(count), prompts) for x in solved]
    )
    covariance = count / (count - 1) * residuals @ residuals.T
    # Where no prompt, or every one, is solved the spread among them is no error: one of N is the resolution.
    flat = len(H) + np.flatnonzero(np.ptp(solved, axis=1) == 0)
    covariance[flat, flat] = 1 / count**2
    law = replace(fit_entropy_law(H, R, covariance, steps=steps, fraction=fraction), num_prompts=count)
    if not bootstrap_resamples:
        return law
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), bootstrap_resamples)
    z = np.hstack([drawn @ entropy.T / (drawn @ tokens.T), drawn @ solved.T / count])
    a, b, _ = _fit_lines(z, covariance, law.scatter**2)
    low, high = np.quantile([a, b, b - a], [0.025, 0.975], axis=1).tolist()
    intervals = dict(zip(("a", "b", "ceiling"), zip(low, high, strict=True), strict=True))
    ends = {name: replace(getattr(law, name), low=low, high=high) for name, (low, high) in intervals.items()}
    return replace(law, intervals=intervals, **ends)


def fit_entropy_law(
    entropy: npt.ArrayLike,
    performance: npt.ArrayLike,
    covariance: npt.ArrayLike,
    *,
    steps: Sequence[int] | None = None,
    fraction: float = FRACTION,
) -> EntropyLaw:
    """Fit R = -a exp(H) + b to points with errors in both variables.

    Args:
        entropy: (point,) H, nats per token.
        performance: (point,) R, for example pass@1.
        covariance: (2 point, 2 point) covariance of the errors of all H, then all R; a diagonal one where the
            points are independent.
        steps: (point,) optimizer steps; the points' numbers where there are none.
        fraction: share of the points, the first ones but at least three, to predict the others from.

    Raises:
        MeasurementError: fewer than three points, entropies all equal, or a point without any error.
    """
    H, R, C = (np.asarray(v, dtype=np.float64) for v in (entropy, performance, covariance))
    count = len(H)
    if count < FEWEST or not np.ptp(H) > 0:
        raise MeasurementError(
            f"entropy law: {count} points with {len(np.unique(H))} distinct entropies, expected at least "
            f"{FEWEST} distinct ones; evaluate more checkpoints"
        )
    if not (np.diag(C)[:count] + np.diag(C)[count:] > 0).all():
        raise MeasurementError(
            "entropy law: a point has no error at all; give every point its standard error"
        )
    z = np.concatenate([H, R])
    early = max(FEWEST, int(np.ceil(fraction * count)))
    scatter2, p_value = _scatter(z, C)
    early_z, early_C = _first(z[None], C, early)
    early_scatter2, _ = _scatter(early_z[0], early_C)

    def derived(at: FloatArray) -> FloatArray:
        """(draw, output): a, b, ceiling; where there are late points rmse, final error, predictions."""
        a, b, _ = _fit_lines(at, C, scatter2)
        if early >= count:
            return np.stack([a, b, b - a], axis=1)
        early_a, early_b, _ = _fit_lines(*_first(at, C, early), early_scatter2)
        predicted = early_b[:, None] - early_a[:, None] * np.exp(at[:, early:count])
        errors = predicted - at[:, count + early :]
        rmse = np.sqrt((errors**2).mean(1))
        return np.column_stack([a, b, b - a, rmse, errors[:, -1], predicted])

    total = C + np.diag(np.repeat([0.0, scatter2], count))
    values = derived(z[None])[0]
    jacobian = _jacobian(derived, z, np.sqrt(np.diag(total)))
    spread = jacobian @ total @ jacobian.T
    errors = np.sqrt(np.diag(spread))
    how = f"errors in both variables, delta method over {count} checkpoints"
    reasons = []
    if not abs(values[0]) > student(count) * errors[0]:
        reasons.append(f"a = {values[0]:.2g} ± {errors[0]:.2g} is not resolved from zero")
    if p_value < DOUBTFUL:
        reasons.append(
            f"the points scatter about the law by {np.sqrt(scatter2):.2g}, more than their errors explain "
            f"(p = {p_value:.1g})"
        )
    a, b, ceiling = (
        Estimate(float(v), float(e), count, unit, f"{name}, {how}", not reasons, "; ".join(reasons))
        for name, v, e, unit in zip(
            ("a", "b", "b - a"),
            values,
            errors,
            ("fraction/exp(nats/token)", "fraction", "fraction"),
            strict=False,
        )
    )
    residual = R - values[1] + values[0] * np.exp(H)
    return EntropyLaw(
        a=a,
        b=b,
        ceiling=ceiling,
        covariance=tuple(map(tuple, spread[:2, :2].tolist())),  # type: ignore[arg-type]
        scatter=float(np.sqrt(scatter2)),
        p_value=p_value,
        r2=float(1 - (residual**2).sum() / ((R - R.mean()) ** 2).sum()) if np.ptp(R) > 0 else float("nan"),
        steps=tuple(range(count)) if steps is None else tuple(int(s) for s in steps),
        entropy=tuple(H.tolist()),
        entropy_stderr=tuple(np.sqrt(np.diag(C)[:count]).tolist()),
        performance=tuple(R.tolist()),
        performance_stderr=tuple(np.sqrt(np.diag(C)[count:]).tolist()),
        prediction=_prediction(values, errors, C, early, count, fraction) if early < count else None,
        intervals={},
    )


def _prediction(
    values: FloatArray, errors: FloatArray, C: FloatArray, early: int, count: int, fraction: float
) -> LawPrediction:
    how = f"law of the first {early} of {count} checkpoints against the others, delta method"
    few = early > np.ceil(fraction * count)
    reason = f"{fraction:.0%} of {count} checkpoints are too few for a line: fitted to {early}" if few else ""
    rmse, final = (
        Estimate(float(values[i]), float(errors[i]), count - early, "fraction", how, not few, reason)
        for i in (3, 4)
    )
    return LawPrediction(
        fitted=early,
        rmse=rmse,
        final_error=final,
        noise=float(np.sqrt(np.diag(C)[count + early :].mean())),
        predicted=tuple(values[5:].tolist()),
    )


def _first(z: FloatArray, C: FloatArray, early: int) -> tuple[FloatArray, FloatArray]:
    """The first points of every draw, and their covariance."""
    count = len(C) // 2
    keep = np.r_[:early, count : count + early]
    return z[:, keep], C[np.ix_(keep, keep)]


def _scatter(z: FloatArray, C: FloatArray) -> tuple[float, float]:
    """Square of the intrinsic scatter, and the probability of so large a chi^2 without any.

    With weights W = 1/s^2, design M = (-x, 1) and A = (1-P)' W (1-P), P = M (M'WM)^-1 M'W, chi^2 is
    expected to be tr(A V) + scatter^2 tr A, V the covariance of the R_i + a x_i; without scatter it is
    distributed as a scaled chi^2 of the same mean and variance (Satterthwaite 1946).
    """
    count = len(z) // 2
    x = np.exp(z[:count])
    scatter2, p_value = 0.0, 1.0
    for step in range(2):
        a, _, chi2 = (float(v[0]) for v in _fit_lines(z[None], C, scatter2))
        to_level = np.hstack([np.diag(a * x), np.eye(count)])
        V = to_level @ C @ to_level.T
        W = np.diag(1 / (np.diag(V) + scatter2))
        M = np.column_stack([-x, np.ones(count)])
        left = np.eye(count) - M @ np.linalg.solve(M.T @ W @ M, M.T @ W)
        A = left.T @ W @ left
        expected = float(np.trace(A @ V))
        if step == 0:
            half_variance = float(np.trace(A @ V @ A @ V))
            p_value = float(
                chi2_distribution.sf(chi2 * expected / half_variance, expected**2 / half_variance)
            )
        scatter2 = float(np.maximum(0.0, (chi2 - expected) / float(np.trace(A))))
    return scatter2, p_value


def _fit_lines(z: FloatArray, C: FloatArray, scatter2: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(draw,) a, b and chi^2 for many draws of the same points: a scan over the line's angle, ever finer.

    Args:
        z: (draw, 2 point) all H, then all R.
        C: (2 point, 2 point) their covariance, of which the weights use each point's own part.
        scatter2: square of the intrinsic scatter.
    """
    count = z.shape[1] // 2
    x, R = np.exp(z[:, :count]), z[:, count:]
    variance = np.diag(C)
    var_x, var_R, cov = (
        v[:, None] for v in (x**2 * variance[:count], variance[count:][None], x * np.diag(C, count))
    )
    unit = np.maximum(np.ptp(R, axis=1), 1e-12) / np.ptp(x, axis=1)
    rows = np.arange(len(z))
    centre, offsets = np.zeros(len(z)), np.linspace(-np.pi / 2, np.pi / 2, SCAN + 2)[1:-1]
    while True:
        a = unit[:, None] * np.tan(centre[:, None] + offsets)
        slope = a[:, :, None]
        weights = 1 / (var_R + slope**2 * var_x + 2 * slope * cov + scatter2)
        level = R[:, None] + slope * x[:, None]
        b = (weights * level).sum(2) / weights.sum(2)
        chi2 = (weights * (level - b[:, :, None]) ** 2).sum(2)
        best = chi2.argmin(1)
        spacing = offsets[1] - offsets[0]
        if spacing < FINEST:
            return a[rows, best], b[rows, best], chi2[rows, best]
        centre = centre + offsets[best]
        offsets = np.linspace(-spacing, spacing, 21)


def _jacobian(function: Callable[[FloatArray], FloatArray], z: FloatArray, scale: FloatArray) -> FloatArray:
    """(output, input) central differences over a tenth of a standard error; 0 where there is none."""
    steps = np.diag(0.1 * scale)
    slopes = function(z + steps) - function(z - steps)
    return np.asarray(np.divide(slopes, 0.2 * scale[:, None], where=scale[:, None] > 0, out=0 * slopes).T)

"""Estimates with honest errors; numpy and scipy only.

Responses to one prompt are not independent, so every standard error here is clustered: the independent unit
is the cluster (a prompt), and sequences of one cluster may depend on each other in any way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, model_validator

from stepscope.intervals import FEWEST, FLAT, FloatArray, student, studentised

IntArray = npt.NDArray[np.int64]
T = TypeVar("T")

NOT_FINITE = "not a finite number"
"""Reason of an estimate that nobody expected to be NaN or infinite."""

Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]
"""A number of a record that may be nan, which is null in its file."""


@dataclass(frozen=True, repr=False)
class Estimate:
    """A number with its error and its own verdict on whether it can be trusted.

    Attributes:
        value: the point estimate.
        stderr: its standard error (nan where none exists).
        n: number of independent units behind it (prompts, unless ``method`` says otherwise).
        unit: of value and stderr, for example ``nats/token``.
        method: how it was estimated, in words.
        reliable: False when a diagnostic failed; the number is still given. Never True of a value that is
            not finite, nor of one whose error is infinite or negative.
        reason: why it is not reliable; empty when it is.
        low: lower end of the 95 % interval; by default Student's t for ``n`` independent units.
        high: its upper end.
    """

    value: Number
    stderr: Number
    n: int
    unit: str
    method: str
    reliable: bool = True
    reason: str = ""
    low: float = float("nan")
    high: float = float("nan")

    @model_validator(mode="before")
    @classmethod
    def _ends(cls, data: Any) -> Any:
        """The ends as a file has them, where null is infinite, or nan where no interval is known at all."""
        if not isinstance(data, Mapping):
            return data
        low, high = data.get("low"), data.get("high")
        known = None not in (data.get("value"), data.get("stderr")) and data.get("n") != 1
        end = float("inf") if known or not low is high is None else float("nan")
        return {**data, "low": -end if low is None else low, "high": end if high is None else high}

    def __post_init__(self) -> None:
        """Take the trust from what is not a number, whoever gave it; Student's interval by default."""
        if np.isnan(self.low) and np.isnan(self.high):
            half = student(self.n) * self.stderr if self.stderr > 0 else self.stderr
            object.__setattr__(self, "low", self.value - half)
            object.__setattr__(self, "high", self.value + half)
        if self.reliable and not (np.isfinite(self.value) and not (self.stderr < 0 or np.isinf(self.stderr))):
            object.__setattr__(self, "reliable", False)
            object.__setattr__(self, "reason", self.reason or NOT_FINITE)

    def __repr__(self) -> str:
        """``value +- stderr unit (95 % low to high, n = N)`` and the doubt, if there is one."""
        error = "" if np.isnan(self.stderr) else f" +- {self.stderr:.2g}"
        unit = "" if self.unit in ("", "1") else f" {self.unit}"
        known = not (np.isnan(self.low) or np.isnan(self.high))
        interval = f"95 % {self.low:.4g} to {self.high:.4g}, " if known else ""
        doubt = "" if self.reliable else f"; not reliable: {self.reason}"
        return f"{self.value:.4g}{error}{unit} ({interval}n = {self.n}){doubt}"

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out 0. Says nothing of the diagnostics, nor do they of this."""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float, *, unit: str | None = None) -> Estimate:
        """``factor`` times it, error and interval too."""
        ends = sorted((factor * self.low, factor * self.high))
        return replace(
            self,
            value=factor * self.value,
            stderr=abs(factor) * self.stderr,
            unit=self.unit if unit is None else unit,
            low=ends[0],
            high=ends[1],
        )

    def doubted(self, *reasons: str) -> Estimate:
        """The same number, no longer reliable, with these reasons added to its own; empty ones are none."""
        given = [reason for reason in (self.reason, *reasons) if reason]
        return replace(self, reliable=self.reliable and not any(reasons), reason="; ".join(given))


def exact(value: float, count: int, unit: str, method: str) -> Estimate:
    """A number without a standard error: that of the batch itself, exact for it."""
    return Estimate(value, float("nan"), count, unit, method)


def estimate_from_sums(
    value: float, sums: npt.ArrayLike, *, unit: str, method: str, stderr: float | None = None
) -> Estimate:
    """An estimate from what each prompt adds to its error (delta method).

    ``stderr^2 = G/(G-1) sum_g sums_g^2``; the interval by :func:`stepscope.intervals.studentised`.

    Args:
        value: the point estimate.
        sums: (prompt,) residuals summed over each prompt and divided by the number of sequences; they
            add up to zero.
        unit: of the value.
        method: how the value was obtained; recorded.
        stderr: standard error by another way (jackknife, bootstrap), for the same interval.

    Returns:
        The estimate, flagged where the prompts are too few or too alike for an interval.
    """
    parts = np.asarray(sums, dtype=np.float64)
    count = len(parts)
    if count < 2:
        return _without_error(value, count, unit, method)
    error = float(np.sqrt(count / (count - 1) * (parts**2).sum())) if stderr is None else stderr
    half = float(studentised(parts[:, None])[0]) * error if error > 0 else error
    found = Estimate(value, error, count, unit, method, low=value - half, high=value + half)
    return found.doubted(_why_no_interval(count, error, half, value))


def errors_from_sums(sums: FloatArray) -> FloatArray:
    """(item,) standard errors sqrt(G/(G-1) sum_g sums_g^2) of many values at once; nan where G < 2.

    Args:
        sums: (group, item) what each group adds to the error of each value, as in :func:`estimate_from_sums`.
    """
    count = len(sums)
    if count < 2:
        return np.full(sums.shape[1], np.nan)
    return np.asarray(np.sqrt(count / (count - 1) * (sums**2).sum(0)), dtype=np.float64)


def _why_no_interval(count: int, error: float, half: float, value: float) -> str:
    if not np.isfinite(error):
        return ""  # the estimate itself says so
    if error <= FLAT * abs(value) or not np.isfinite(half):
        return f"the {count} prompts are too much alike for an interval"
    if count < FEWEST:
        return f"{count} prompts, or pools of them, where an interval needs at least {FEWEST}"
    return ""


def _cluster_sums(values: FloatArray, clusters: npt.ArrayLike) -> FloatArray:
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64)


def clustered_mean(values: npt.ArrayLike, clusters: npt.ArrayLike, *, unit: str, method: str) -> Estimate:
    """Mean over sequences with a standard error clustered by prompt.

    ``stderr^2 = G/(G-1) * sum_g (sum_{i in g} (x_i - mean))^2 / N^2`` with G clusters and N sequences
    (Liang & Zeger 1986 with the usual small-sample factor). With clusters of size one this is s/sqrt(N).

    Args:
        values: (seq,) one number per sequence.
        clusters: (seq,) cluster of each sequence, any sortable labels.
        unit: of the values.
        method: how they were obtained; recorded.

    Returns:
        The estimate; ``n`` is the number of clusters. With one cluster the error does not exist: it is nan
        and the estimate is flagged.
    """
    x = np.asarray(values, dtype=np.float64)
    return clustered_ratio(x, np.ones_like(x), clusters, unit=unit, method=method)


def clustered_ratio(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    unit: str,
    method: str,
) -> Estimate:
    """Ratio of sums R = sum x / sum y with a clustered delta-method error.

    ``stderr^2 = G/(G-1) * sum_g (sum_{i in g} (x_i - R y_i))^2 / (sum y)^2``; R estimates E[x]/E[y] with a
    bias of order 1/G.

    Args:
        numerator: (seq,) x, for example the entropy summed over a response.
        denominator: (seq,) y, for example the length of the response.
        clusters: (seq,) cluster of each sequence.
        unit: of the ratio.
        method: how the numbers were obtained; recorded.

    Returns:
        The estimate; ``n`` is the number of clusters.
    """
    x = np.asarray(numerator, dtype=np.float64)
    y = np.asarray(denominator, dtype=np.float64)
    total = float(y.sum())
    ratio = float(x.sum()) / total if total else float("nan")
    sums = _cluster_sums(x - ratio * y, clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        return estimate_from_sums(ratio, sums / total, unit=unit, method=method)


def clustered_estimate(
    value: float,
    residuals: FloatArray,
    clusters: npt.ArrayLike,
    *,
    unit: str,
    method: str,
    stderr: float | None = None,
) -> Estimate:
    """An estimate whose first-order expansion is ``value`` + mean of ``residuals``, clustered by prompt.

    Args:
        value: the point estimate.
        residuals: (seq,) first-order effect of each sequence on the value, times the number of sequences.
        clusters: (seq,) cluster of each sequence.
        unit: of the value.
        method: how it was estimated; recorded.
        stderr: standard error by another way, for the same interval.
    """
    sums = _cluster_sums(residuals - residuals.mean(), clusters) / len(residuals)
    return estimate_from_sums(value, sums, unit=unit, method=method, stderr=stderr)


def clustered_quantile(
    rows: Sequence[FloatArray], clusters: npt.ArrayLike, level: float, *, unit: str, method: str
) -> Estimate:
    """Quantile over all tokens with its error, and its 95 % interval, by Woodruff's method.

    The fraction of tokens at or below the quantile is a clustered ratio with error s and a 95 % interval
    about the level. The quantiles at the ends of that bound the interval; half the distance between those at
    level - s and level + s is the error.

    Args:
        rows: (tok,) values of each sequence.
        clusters: (seq,) cluster of each sequence.
        level: of the quantile, between 0 and 1.
        unit: of the values.
        method: how they were obtained; recorded.
    """
    pooled = np.sort(np.concatenate(list(rows)))
    quantile = float(np.quantile(pooled, level))
    below = [int((v <= quantile).sum()) for v in rows]
    share = clustered_ratio(below, [len(v) for v in rows], clusters, unit="", method="")
    if not np.isfinite(share.stderr):
        return _without_error(quantile, share.n, unit, method)
    half = share.high - share.value
    reaches = np.array([-share.stderr, share.stderr, -half, half])
    below_one, above_one, low, high = np.quantile(pooled, np.clip(level + reaches, 0.0, 1.0)).tolist()
    return Estimate(quantile, (above_one - below_one) / 2, share.n, unit, method, low=low, high=high)


def ratio_residuals(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, clusters: npt.ArrayLike
) -> FloatArray:
    """(cluster,) contributions (x_g - R y_g) / sum y of each cluster to the error of R = sum x / sum y.

    They add up to zero; with G clusters, G/(G-1) times the sum of their products with those of another ratio
    over the same clusters is the covariance of the two (delta method).

    Args:
        numerator: (seq,) x.
        denominator: (seq,) y, with a sum other than zero.
        clusters: (seq,) cluster of each sequence.
    """
    x = _cluster_sums(np.asarray(numerator, dtype=np.float64), clusters)
    y = _cluster_sums(np.asarray(denominator, dtype=np.float64), clusters)
    total = float(y.sum())
    return np.asarray((x - float(x.sum()) / total * y) / total, dtype=np.float64)


def paired_ratio_difference(
    before: tuple[npt.ArrayLike, npt.ArrayLike],
    after: tuple[npt.ArrayLike, npt.ArrayLike],
    clusters: npt.ArrayLike,
    *,
    unit: str,
    method: str,
) -> Estimate:
    """Difference of two ratios of sums over the same clusters, what they have in common cancelled.

    ``stderr^2 = G/(G-1) * sum_g (r_after,g - r_before,g)^2`` with the residuals of :func:`ratio_residuals`.

    Args:
        before: (seq,) numerator and denominator.
        after: (seq,) the same at the later point.
        clusters: (seq,) cluster of each entry, the same for both.
        unit: of the difference.
        method: how the numbers were obtained; recorded.

    Returns:
        After minus before; nan, flagged, where a denominator adds up to zero or there is one cluster.
    """
    count = len(np.unique(np.asarray(clusters)))
    (x0, y0), (x1, y1) = (tuple(np.asarray(v, dtype=np.float64) for v in pair) for pair in (before, after))
    nan = float("nan")
    if not y0.sum() or not y1.sum():
        return Estimate(nan, nan, count, unit, method, reliable=False, reason="nothing to average over")
    value = float(x1.sum() / y1.sum() - x0.sum() / y0.sum())
    change = ratio_residuals(x1, y1, clusters) - ratio_residuals(x0, y0, clusters)
    return estimate_from_sums(value, change, unit=unit, method=method)


def jackknife_ratio(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    unit: str,
    method: str,
) -> Estimate:
    """Ratio of sums with the delete-one-cluster jackknife: bias of order 1/G removed.

    Args:
        numerator: (seq,) x.
        denominator: (seq,) y.
        clusters: (seq,) cluster of each sequence.
        unit: of the ratio.
        method: how the numbers were obtained; recorded.

    Returns:
        The estimate; ``n`` is the number of clusters.
    """
    x = _cluster_sums(np.asarray(numerator, dtype=np.float64), clusters)
    y = _cluster_sums(np.asarray(denominator, dtype=np.float64), clusters)
    count = len(x)
    ratio = float(x.sum() / y.sum()) if y.sum() else float("nan")
    if count < 2:
        return _without_error(ratio, count, unit, method)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (x.sum() - x) / (y.sum() - y)
    value, stderr = jackknife(without, ratio)
    sums = (x - ratio * y) / float(y.sum())
    return estimate_from_sums(value, sums, unit=unit, method=method, stderr=stderr)


def jackknife(without: npt.ArrayLike, whole: float = float("nan")) -> tuple[float, float]:
    """A statistic without its bias of order 1/G, and its standard error.

    With t_g the statistic that lacks part g: ``G t - (G-1) mean_g t_g`` and
    ``stderr^2 = (G-1)/G * sum_g (t_g - mean t)^2`` (Quenouille 1956, Tukey 1958).

    Args:
        without: (part,) t_g, from :func:`leave_out`.
        whole: t, of all parts; the first of the two needs it.

    Returns:
        Both; nan where a t_g is not finite, or there are fewer than two.
    """
    values = np.asarray(without, dtype=np.float64)
    count = len(values)
    if count < 2 or not np.isfinite(values).all():
        return float("nan"), float("nan")
    spread = float(((values - values.mean()) ** 2).sum())
    return count * whole - (count - 1) * float(values.mean()), float(np.sqrt((count - 1) / count * spread))


def leave_out(statistic: Callable[[IntArray], T], clusters: npt.ArrayLike) -> list[T]:
    """The statistic without each cluster in turn, of the indices that are left."""
    labels = np.asarray(clusters)
    return [statistic(np.flatnonzero(labels != label)) for label in np.unique(labels)]


def _without_error(value: float, count: int, unit: str, method: str) -> Estimate:
    reason = f"{count} prompt: a standard error needs at least two"
    return Estimate(value, float("nan"), count, unit, method, reliable=False, reason=reason)


class Bootstrap(NamedTuple):
    """Standard error and 95 % percentile interval of a resampled statistic."""

    stderr: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[IntArray], float],
    clusters: npt.ArrayLike,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """Cluster bootstrap: whole prompts are drawn with replacement.

    Args:
        statistic: maps indices of sequences (with repeats) to the number of interest.
        clusters: (seq,) cluster of each sequence.
        num_resamples: resamples drawn.
        seed: of the resampling.

    Returns:
        Standard deviation of the resampled statistic, and its 2.5 % and 97.5 % quantiles.
    """
    labels = np.asarray(clusters)
    members = [np.flatnonzero(labels == c).astype(np.int64) for c in np.unique(labels)]
    generator = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for r in range(num_resamples):
        chosen = generator.integers(len(members), size=len(members))
        draws[r] = statistic(np.concatenate([members[c] for c in chosen]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Bootstrap(float(draws.std(ddof=1)), float(low), float(high))


def pass_at_k(num_samples: npt.ArrayLike, num_correct: npt.ArrayLike, k: int) -> FloatArray:
    """Unbiased estimate of the chance that at least one of k samples is correct (Chen et al. 2021).

    ``1 - C(n-c, k)/C(n, k)``, per prompt.

    Args:
        num_samples: (prompt,) n, samples drawn.
        num_correct: (prompt,) c, correct ones among them.
        k: samples allowed.

    Returns:
        (prompt,) estimates, of the broadcast shape of the arguments.

    Raises:
        ValueError: fewer than k samples of some prompt, or c outside 0..n.
    """
    n, c = np.broadcast_arrays(
        np.asarray(num_samples, dtype=np.float64), np.asarray(num_correct, dtype=np.float64)
    )
    if (n < k).any() or k < 1:
        raise ValueError(f"pass@{k} needs at least {k} samples of every prompt, got {n.min():.0f}")
    if (c < 0).any() or (c > n).any():
        raise ValueError("the number of correct samples must lie between 0 and the number of samples")
    enough = n - c >= k
    wrong = np.where(enough, n - c, k)
    from scipy.special import gammaln  # slow to import, and settings are read before

    log_ratio = gammaln(wrong + 1) - gammaln(wrong - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    return np.asarray(np.where(enough, 1 - np.exp(log_ratio), 1.0), dtype=np.float64)

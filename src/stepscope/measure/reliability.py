"""How sure a ranking by influence is: what two halves of the probe prompts say of the same tokens.

Influence is a mean over probe prompts, so its ranks are those of signal and noise. Two halves of the prompts
share the signal and not the noise: the correlation r of what they say is the reliability of either, the share
of the spread between items that would be found again. From n to k n prompts it becomes

    r(k n) = k r(n) / (1 + (k - 1) r(n))        Spearman 1910, Brown 1910

which gives the reliability of the whole probe (k = 2) and the prompts a wanted one takes. The law is that of
Pearson's r; for rank correlations it is an approximation, and a little hopeful where a few responses carry
the noise. Halves are all ways to divide a few folds of whole prompts in two; errors are the jackknife's over
folds (Quenouille 1956, Tukey 1958), for a given update batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from scipy.stats import rankdata

from stepscope.measure.influence import Influence
from stepscope.results import FloatArray, IntArray
from stepscope.stats import Estimate

Numbers = TypeVar("Numbers", float, FloatArray)

TARGET = 0.9
"""Reliability that a ranking should have."""

TOP_SHARES = (0.01, 0.1)
"""Shares of the items with the largest |influence| whose membership is compared."""

FEWEST_FOLDS = 4
"""Fewest folds whose jackknife says something."""

_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def spearman_brown(reliability: Numbers, factor: float) -> Numbers:
    """Reliability with ``factor`` times the prompts: k r / (1 + (k - 1) r)."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def prompts_for(reliability: float, prompts: int, target: float = TARGET) -> float:
    """Prompts at which the reliability is ``target``, from that at ``prompts``; nan where it is 0 or less."""
    if not reliability > 0:
        return math.nan
    return prompts * target / (1 - target) * (1 - reliability) / reliability


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of two halves of a probe, and that of two whole probes of its size.

    Attributes:
        halves: correlation between halves.
        whole: the same stepped up to twice the prompts.
        without: (fold,) ``whole`` from all folds but one.
    """

    halves: Estimate
    whole: Estimate
    without: FloatArray


@dataclass(frozen=True)
class Reliability:
    """How far a probe batch determines the order of items by influence.

    Attributes:
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        level: ``token`` or ``sequence``.
        num_items: items with an influence; all others have none whatever the probe.
        num_prompts: probe prompts.
        halves: Spearman correlation between halves of the probe.
        whole: that between two probes of this size.
        needed: probe prompts for a correlation of 0.9.
        curve: (probe prompts, correlation, standard error).
        top: by share, how much of the set of the largest |influence| two halves have in common.
    """

    quantity: str
    through: str
    level: str
    num_items: int
    num_prompts: int
    halves: Estimate
    whole: Estimate
    needed: Estimate
    curve: tuple[tuple[int, float, float], ...]
    top: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return {
            **vars(self),
            **{n: getattr(self, n).to_dict() for n in ("halves", "whole", "needed")},
            "target": TARGET,
            "curve": [
                {"prompts": n, "correlation": r, "stderr": e if math.isfinite(e) else None}
                for n, r, e in self.curve
                if math.isfinite(r)
            ],
            "top": {share: estimate.to_dict() for share, estimate in self.top.items()},
        }


def reliabilities(found: Influence, num_prompts: int) -> tuple[Reliability, Reliability]:
    """How sure the order of a batch's tokens, and that of its sequences, is.

    Args:
        found: influence with its folds; costs no pass.
        num_prompts: prompts of its probe batch.
    """
    tokens = _reliability(found, "token", found.fold_tokens, num_prompts)
    return tokens, _reliability(found, "sequence", found.fold_sequences, num_prompts)


def _reliability(found: Influence, level: str, values: FloatArray, prompts: int) -> Reliability:
    moved = values[:, (values != 0).any(0)]
    shares = found.folds.shares
    agreement = split_half(moved, shares, what=f"influences of the {level}s")
    whole = agreement.whole
    count = len(shares)
    needed = prompts_for(whole.value, prompts)
    reason = whole.reason
    if whole.value <= 0:
        reason = "the halves of the probe do not agree, so there is no signal to step up"
    elif not reason and not (agreement.without > 0).all():
        reason = "the halves of the probe do not agree without one of the folds"
    away = np.array([prompts_for(r, prompts) for r in agreement.without])
    error = needed * _jackknife_error(np.log(away))
    curve = []
    for multiple in _MULTIPLES:
        error_there = _jackknife_error(spearman_brown(agreement.without, multiple))
        curve.append((round(multiple * prompts), spearman_brown(whole.value, multiple), error_there))
    return Reliability(
        quantity=found.quantity,
        through=found.through,
        level=level,
        num_items=moved.shape[1],
        num_prompts=prompts,
        halves=agreement.halves,
        whole=whole,
        needed=Estimate(
            needed,
            error,
            count,
            "probe prompts",
            f"for a rank correlation of {TARGET:g} between probes, Spearman-Brown from {prompts} prompts, "
            f"jackknife over {count} folds",
            reliable=not reason,
            reason=reason,
        ),
        curve=tuple(curve),
        top={f"{share:g}": _common(moved, shares, share, level) for share in TOP_SHARES},
    )


def split_half(
    values: FloatArray,
    shares: FloatArray,
    other: FloatArray | None = None,
    *,
    rank: bool = True,
    what: str = "values",
) -> SplitHalf:
    """Correlation between halves of the probe, the mean over all ways to halve its folds.

    Args:
        values: (fold, item) from each fold alone.
        shares: (fold,) weight of each fold.
        other: (fold, item) compared with ``values`` from the other half; ``values`` themselves by default.
        rank: Spearman's correlation instead of Pearson's.
        what: is compared, in words.
    """
    count = len(shares)
    without = np.array([_halved(values, shares, other, rank, k) for k in range(count)])
    kept = count / max(1, count - 1)
    half = _halved(values, shares, other, rank)
    name = "Spearman" if rank else "Pearson"
    how = f"{name} correlation of {what} from two halves of the probe prompts, mean over all halves"
    over = f"jackknife over {count} folds"
    reason = _why_unsure(count, values.shape[1])

    def estimate(factor: float, words: str) -> Estimate:
        error = _jackknife_error(spearman_brown(without, factor * kept))
        method = f"{how}{words}, {over}"
        return Estimate(spearman_brown(half, factor), error, count, "correlation", method, not reason, reason)

    return SplitHalf(
        halves=estimate(1.0, ""),
        whole=estimate(2.0, ", stepped up to the whole probe (Spearman-Brown)"),
        without=spearman_brown(without, 2.0 * kept),
    )


def implied_gain(
    values: FloatArray,
    prior: FloatArray,
    shares: FloatArray,
    estimator: Callable[[FloatArray, FloatArray, FloatArray], FloatArray],
) -> Estimate:
    """Factor by which the probe prompts that a ranking takes fall with another estimator of the same.

    Held against the plain values of the other half, which are unbiased, the plain values of a half reach r,
    the other estimator r'. Its reliability is then r'^2 / r, bias counted as error, and with q(r) =
    r / (1 - r), which grows with the prompts, the factor is q(r'^2 / r) / q(r).

    Args:
        values: (fold, item) plain values from each fold alone.
        prior: (fold, item) what the estimator takes beside them.
        shares: (fold,) weight of each fold.
        estimator: (item,) from values, prior and shares of the folds of a half.
    """
    count = len(shares)
    moved = (values != 0).any(0)
    values, prior = values[:, moved], prior[:, moved]

    def gain(kept: IntArray) -> float:
        plain, better = [], []
        for half in halvings(len(kept)):
            one = kept[half]
            two = np.setdiff1d(kept, one)
            for mine, yours in ((one, two), (two, one)):
                weights, others = (shares[h] / shares[h].sum() for h in (mine, yours))
                truth = others @ values[yours]
                plain.append(_correlation(weights @ values[mine], truth, True))
                better.append(_correlation(estimator(values[mine], prior[mine], weights), truth, True))
        r, other = float(np.mean(plain)), float(np.mean(better))
        if not (0 < r < 1 and 0 < other * other / r < 1):
            return math.nan
        return other**2 / r / (1 - other**2 / r) / (r / (1 - r))

    found = gain(np.arange(count))
    without = np.array([gain(np.delete(np.arange(count), k)) for k in range(count)])
    reason = _why_unsure(count, values.shape[1])
    if not reason and not (math.isfinite(found) and np.isfinite(without).all()):
        reason = "the halves of the probe agree too little, or too well, for a ratio"
    return Estimate(
        found,
        found * _jackknife_error(np.log(without)),
        count,
        "times fewer probe prompts",
        "against the plain influence of the other half of the probe, rank correlation, Spearman-Brown, "
        f"jackknife over {count} folds",
        not reason,
        reason,
    )


def halvings(count: int) -> list[IntArray]:
    """All ways to choose half of ``count`` folds, the smaller half where the number is odd.

    An even number leaves each way out that is the complement of one before.
    """
    chosen = [np.array(half) for half in combinations(range(count), count // 2)]
    return chosen[: len(chosen) // 2] if count % 2 == 0 else chosen


def _common(values: FloatArray, shares: FloatArray, share: float, level: str) -> Estimate:
    """Overlap of the sets of the largest |influence| by two halves, the mean over all ways to halve."""
    count, items = values.shape
    size = max(1, round(share * items))

    def overlap(kept: IntArray) -> float:
        found = []
        for one, other in _halves(values[kept], shares[kept]):
            sets = [np.argpartition(-np.abs(v), size - 1)[:size] for v in (one, other)]
            found.append(len(np.intersect1d(*sets)) / size)
        return float(np.mean(found)) if found else math.nan

    reason = _why_unsure(count, items)
    if reason:
        return Estimate(math.nan, math.nan, count, "share of the set", "", False, reason)
    return Estimate(
        overlap(np.arange(count)),
        _jackknife_error(np.array([overlap(np.delete(np.arange(count), k)) for k in range(count)])),
        count,
        "share of the set",
        f"{level}s that both halves of the probe prompts put among the {size} with the largest |influence| "
        f"(chance: {size / items:.2g}), mean over all halves, jackknife over {count} folds",
    )


def _halved(
    values: FloatArray, shares: FloatArray, other: FloatArray | None, rank: bool, without: int | None = None
) -> float:
    """Mean correlation of one half of the folds with the other, over all ways to halve them."""
    kept = np.delete(np.arange(len(shares)), [] if without is None else without)
    first = list(_halves(values[kept], shares[kept]))
    pairs = first
    if other is not None:
        second = list(_halves(other[kept], shares[kept]))
        pairs = [(a, d) for (a, _), (_, d) in zip(first, second, strict=True)]
        pairs += [(b, c) for (_, b), (c, _) in zip(first, second, strict=True)]
    return float(np.mean([_correlation(a, b, rank) for a, b in pairs])) if pairs else math.nan


def _halves(values: FloatArray, shares: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
    """(item,) values from either half of the folds, for all ways to halve them."""
    for half in halvings(len(shares)) if len(shares) > 1 else []:
        members = np.isin(np.arange(len(shares)), half)
        first, second = (shares * m / (shares * m).sum() for m in (members, ~members))
        yield first @ values, second @ values


def _correlation(first: FloatArray, second: FloatArray, rank: bool) -> float:
    if not len(first):
        return math.nan
    x, y = (rankdata(v) if rank else v for v in (first, second))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan


def _jackknife_error(without: FloatArray) -> float:
    """Standard error from the estimates that lack one fold each: (G-1)/G sum (x_g - mean)^2."""
    count = len(without)
    if count < FEWEST_FOLDS - 1:
        return math.nan
    return float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))


def _why_unsure(count: int, items: int) -> str:
    if count < FEWEST_FOLDS:
        return f"{count} folds of probe prompts: halves need {FEWEST_FOLDS} or more to be told apart"
    return f"{items} items: a correlation needs at least three" if items < 3 else ""

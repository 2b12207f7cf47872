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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from stepscope.measure.influence.shares import Influence
from stepscope.measure.ties import without_round_off
from stepscope.results import FloatArray, IntArray
from stepscope.results.influence import CurvePoint, Reliability
from stepscope.stats import Estimate, jackknife, leave_out

TARGET = 0.9
"""Reliability that a ranking should have."""

TOP_SHARES = (0.01, 0.1)
"""Shares of the items with the largest |influence| whose membership is compared."""

FEWEST_FOLDS = 4
"""Fewest folds whose jackknife says something."""

_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def spearman_brown(reliability: float, factor: float) -> float:
    """Reliability with ``factor`` times the prompts: k r / (1 + (k - 1) r).

    The law is about a signal; a correlation below 0 shows none, and stays as it is.
    """
    return factor * reliability / (1 + (factor - 1) * reliability) if reliability > 0 else reliability


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
    error = _jackknife_error(_log([prompts_for(r, prompts) for r in agreement.without]))
    reason = whole.reason or _too_vague(error)
    curve = [
        CurvePoint(
            round(multiple * prompts),
            spearman_brown(whole.value, multiple),
            _jackknife_error([spearman_brown(r, multiple) for r in agreement.without]),
        )
        for multiple in (_MULTIPLES if math.isfinite(whole.value) else ())
    ]
    return Reliability(
        quantity=found.quantity,
        through=found.through,
        level=level,
        num_items=moved.shape[1],
        num_prompts=prompts,
        halves=agreement.halves,
        whole=whole,
        target=TARGET,
        needed=Estimate(
            needed,
            needed * error,
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
    without = [_halved(values, shares, other, rank, k) for k in range(count)]
    kept = count / max(1, count - 1)
    half = _halved(values, shares, other, rank)
    name = "Spearman" if rank else "Pearson"
    how = f"{name} correlation of {what} from two halves of the probe prompts, mean over all halves"
    over = f"jackknife over {count} folds"
    reason = _why_unsure(count, values.shape[1])
    if not reason and not half > 0:
        reason = "the halves of the probe do not agree: no signal stands out of its noise"

    def estimate(factor: float, words: str) -> Estimate:
        error = _jackknife_error([spearman_brown(r, factor * kept) for r in without])
        method = f"{how}{words}, {over}"
        return Estimate(spearman_brown(half, factor), error, count, "correlation", method, not reason, reason)

    return SplitHalf(
        halves=estimate(1.0, ""),
        whole=estimate(2.0, ", stepped up to the whole probe (Spearman-Brown)"),
        without=np.array([spearman_brown(r, 2 * kept) for r in without]),
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
        first, second = _halves(values[kept], shares[kept])
        better = []
        for half in halvings(len(kept)):
            for own in (kept[half], np.delete(kept, half)):
                better.append(estimator(values[own], prior[own], shares[own] / shares[own].sum()))
        plain = _correlations(first, second, True)
        held = [_correlations(np.stack(better[i::2]), t, True) for i, t in enumerate((second, first))]
        r, other = float(plain.mean()), float(np.mean(held))
        if not (0 < r < 1 and 0 < other * other / r < 1):
            return math.nan
        better_one = other**2 / r
        return better_one / (1 - better_one) / (r / (1 - r))

    reason = _why_unsure(count, values.shape[1])
    found = gain(np.arange(count)) if not reason else math.nan
    error = math.nan if reason else _jackknife_error(_log(leave_out(gain, np.arange(count))))
    if not reason and not (math.isfinite(found) and math.isfinite(error)):
        reason = "the halves of the probe agree too little, or too well, for a ratio"
    reason = reason or _too_vague(error)
    return Estimate(
        found,
        found * error,
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
    size: int = max(1, round(share * items))

    def overlap(kept: IntArray) -> float:
        chosen = []
        for half in _halves(values[kept], shares[kept]):
            chosen.append(np.zeros(half.shape, dtype=bool))
            best = np.argpartition(-np.abs(half), size - 1, axis=1)[:, :size]
            np.put_along_axis(chosen[-1], best, True, axis=1)
        return float(np.mean(np.sum(chosen[0] & chosen[1], axis=1))) / size

    reason = _why_unsure(count, items)
    if reason:
        return Estimate(math.nan, math.nan, count, "share of the set", "", False, reason)
    return Estimate(
        overlap(np.arange(count)),
        _jackknife_error(leave_out(overlap, np.arange(count))),
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
    if len(kept) < 2:
        return math.nan
    first, second = _halves(values[kept], shares[kept])
    if other is None:
        return float(_correlations(first, second, rank).mean())
    one, two = _halves(other[kept], shares[kept])
    return float((_correlations(first, two, rank) + _correlations(second, one, rank)).mean() / 2)


def _halves(values: FloatArray, shares: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(way, item) values from either half of the folds, for all ways to halve them."""
    members = np.stack([np.isin(np.arange(len(shares)), half) for half in halvings(len(shares))])
    first, second = (shares * own for own in (members, ~members))
    return first @ values / first.sum(1)[:, None], second @ values / second.sum(1)[:, None]


def _correlations(first: FloatArray, second: FloatArray, rank: bool) -> FloatArray:
    """(way,) correlation of the items in each row; nan where a row is the same for all."""
    if not first.shape[1]:
        return np.full(len(first), np.nan)
    x, y = (rankdata(without_round_off(v), axis=1) if rank else v for v in (first, second))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found = np.full(len(size), np.nan)
    np.divide((x * y).sum(1), size, out=found, where=size > 0)
    return found


def _jackknife_error(without: Sequence[float]) -> float:
    """Standard error from the estimates that lack one fold each; nan with too few."""
    return jackknife(without)[1] if len(without) >= FEWEST_FOLDS - 1 else math.nan


def _log(values: Sequence[float]) -> list[float]:
    return [math.log(v) if v > 0 else math.nan for v in values]


def _too_vague(log_error: float) -> str:
    """Why a ratio with this error of its logarithm is no figure; "" where it is known to a factor of two."""
    if not math.isfinite(log_error):
        return "the folds of the probe do not tell its error"
    return "" if log_error < math.log(2) else f"one standard error is a factor of {math.exp(log_error):.2g}"


def _why_unsure(count: int, items: int) -> str:
    if count < FEWEST_FOLDS:
        return f"{count} folds of probe prompts: halves need {FEWEST_FOLDS} or more to be told apart"
    return f"{items} items: a correlation needs at least three" if items < 3 else ""

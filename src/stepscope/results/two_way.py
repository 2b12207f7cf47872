"""Errors of sums over two kinds of units at once: parts of the probe, and prompts of the training.

Entry x_fp is what fold f of the probe says of all tokens of a class in answers to training prompt p, and the
figure is X = sum_p sum_f s_f x_fp with s_f the fold's share of the probe. Tokens share the probe, so their
errors are not independent: the error of X comes from the folds' own sums X_f,

    V_probe = F/(F-1) sum_f s_f^2 (X_f - X)^2

With the training's prompts as a sample too, B_p = sum_f s_f x_fp, another V_train = P/(P-1) sum_p (B_p -
X/P)^2. What folds and prompts do together is in both, and is taken off once (the analysis of variance of two
crossed random factors, Searle, Casella & McCulloch 1992; Cameron, Gelbach & Miller 2011 take off main
effects with it, which is too much for few folds):

    V = V_probe + V_train - V_both
    V_both = F/(F-1) P/(P-1) sum_fp s_f^2 (x_fp - B_p - (X_f - X)/P)^2

A share S = X/T of a total has the same error as the sum of (x_fp - S t_fp)/T (delta method).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepscope.intervals import FEWEST, FLAT, student
from stepscope.results.records import FloatArray, IntArray
from stepscope.stats import Estimate

PROBE = "clustered by probe prompts"
BOTH = "clustered by probe prompts and by training prompts (two-way)"


@dataclass(frozen=True)
class Sums:
    """A figure of every class with its two errors, and Student's t behind the intervals.

    Folds are pools of many prompts, so that their sums are close to normal; the degrees of freedom over both
    kinds of units are Satterthwaite's (1946).

    Attributes:
        values: (class,) the figures.
        folds: number of folds.
        probe: (class,) standard error over the folds of the probe; nan with one fold.
        both: (class,) the same over folds and training prompts; nan with one of either.
        freedom: (class,) degrees of freedom of ``both``.
    """

    values: FloatArray
    folds: int
    probe: FloatArray
    both: FloatArray
    freedom: FloatArray

    def over_probe(self, index: int, unit: str = "", method: str = "") -> Estimate:
        """Of one class, for the batches as they were."""
        error = float(self.probe[index])
        return self._estimate(index, error, self.folds, unit, f"{method}, {PROBE}")

    def over_both(self, index: int, unit: str = "", method: str = "") -> Estimate:
        """Of one class, with the training's prompts as a sample, too."""
        error, count = float(self.both[index]), 1 + float(self.freedom[index])
        return self._estimate(index, error, count, unit, f"{method}, {BOTH}")

    def _estimate(self, index: int, error: float, count: float, unit: str, method: str) -> Estimate:
        value = float(self.values[index])
        reason = ""
        if self.folds < FEWEST:
            reason = f"{self.folds} folds of the probe, where an interval needs at least {FEWEST}"
        elif value and not error > FLAT * abs(value):
            reason = f"the {self.folds} folds of the probe are too much alike for an interval"
        half = student(count) * error
        return Estimate(
            value, error, self.folds, unit, method, not reason, reason, value - half, value + half
        )


def class_sums(
    entries: FloatArray, shares: FloatArray, classes: IntArray, prompts: IntArray, count: int
) -> tuple[Sums, Sums]:
    """Sums of entries by class, and their shares of the sum of all.

    Args:
        entries: (fold, tok) what each fold says of each token.
        shares: (fold,) of the probe sequences.
        classes: (tok,) from 0.
        prompts: (tok,) training prompt, from 0.
        count: of classes.

    Returns:
        The sums, and the shares; (class,) each.
    """
    _num_folds, num_prompts = len(shares), int(prompts.max()) + 1
    pairs, place = np.unique(classes * num_prompts + prompts, return_inverse=True)
    own, asked = pairs // num_prompts, pairs % num_prompts
    cells = _by(place, entries, len(pairs))
    whole = _by(asked, cells, num_prompts)
    by_class = _by(own, cells, count)
    values, total = shares @ by_class, float(shares @ whole.sum(1))
    crossed = _Crossed.of(cells, own, count, shares, whole[:, asked])
    sums = _errors(crossed, values, by_class - values, values, shares, num_prompts)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.divide(values, total, out=np.full(count, np.nan), where=total != 0)
        away = (by_class - share * whole.sum(1)[:, None]) / total
        together = _Crossed.of(whole, np.zeros(num_prompts, dtype=np.int64), 1, shares)
        linear = crossed.relative(share, total, together)
        return sums, _errors(linear, share, away, np.zeros(count), shares, num_prompts)


@dataclass(frozen=True)
class _Crossed:
    """(class,) and (fold, class) sums of squares over prompts, of B_p and of x_fp - B_p.

    Attributes:
        means: (class,) sum_p B_p^2.
        rest: (fold, class) sum_p (x_fp - B_p)^2.
        means_with: the same products with those of all classes together.
        rest_with: likewise.
    """

    means: FloatArray
    rest: FloatArray
    means_with: FloatArray | None = None
    rest_with: FloatArray | None = None

    @classmethod
    def of(
        cls,
        cells: FloatArray,
        own: IntArray,
        count: int,
        shares: FloatArray,
        other: FloatArray | None = None,
    ) -> _Crossed:
        """From (fold, cell) sums, and for each cell those of its prompt over all classes."""
        mean = shares @ cells
        rest = cells - mean
        squares = (_by(own, mean[None] ** 2, count)[0], _by(own, rest**2, count))
        if other is None:
            return cls(*squares)
        mean_too = shares @ other
        with_mean = _by(own, (mean * mean_too)[None], count)[0]
        return cls(*squares, with_mean, _by(own, rest * (other - mean_too), count))

    def relative(self, share: FloatArray, total: float, whole: _Crossed) -> _Crossed:
        """Of (x - S t)/T."""
        assert self.means_with is not None
        assert self.rest_with is not None
        means = self.means - 2 * share * self.means_with + share**2 * whole.means
        rest = self.rest - 2 * share * self.rest_with + share**2 * whole.rest
        return _Crossed(means / total**2, rest / total**2)


def _errors(
    crossed: _Crossed,
    values: FloatArray,
    away: FloatArray,
    centre: FloatArray,
    shares: FloatArray,
    prompts: int,
) -> Sums:
    """Errors of figures; that over both is never below that over the folds alone.

    Args:
        crossed: sums of squares over prompts of what is added up.
        values: (class,) the figures.
        away: (fold, class) what each fold gives less the figure.
        centre: (class,) sum over the prompts of what is added up.
        shares: (fold,) of the probe sequences.
        prompts: number of training prompts.
    """
    folds = len(shares)
    nothing = np.full(len(values), np.nan)
    if folds < 2:
        return Sums(values, folds, nothing, nothing, nothing)
    few = folds / (folds - 1)
    probe = few * (shares**2) @ away**2
    if prompts < 2:
        return Sums(values, folds, np.sqrt(probe), nothing, nothing)
    many = prompts / (prompts - 1)
    train = many * (crossed.means - centre**2 / prompts)
    together = few * many * (shares**2) @ (crossed.rest - away**2 / prompts)
    summed = probe + train - together
    free = probe**2 / (folds - 1) + train**2 / (prompts - 1) + together**2 / ((folds - 1) * (prompts - 1))
    less = summed <= probe
    freedom = np.full(len(values), folds - 1.0)
    np.divide(summed**2, free, out=freedom, where=~less & (free > 0))
    return Sums(values, folds, np.sqrt(probe), np.sqrt(np.where(less, probe, summed)), freedom)


def _by(group: IntArray, rows: FloatArray, count: int) -> FloatArray:
    """(row, group) sums of (row, item) values."""
    return np.stack([np.bincount(group, weights=row, minlength=count) for row in rows]).astype(np.float64)

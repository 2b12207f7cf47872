"""Batch size and learning rate, predicted from the second-order kernel.

A batch of B independent prompt groups makes the step lr (r + P mean_b g_b), g_b the gradients of the groups
with mean G and covariance S, and r what does not answer to the batch (momentum, decay). With P and the clip
coefficient as they are in the measured step, to second order in lr,

    E[Delta Q] = lr q'u + lr^2/2 (u'H u + tr(P H P S)/B),      u = r + P G, q = grad Q, H = Hess Q

(McCandlish et al. 2018, arXiv:1812.06162, with a preconditioner; there Q = -loss, P = 1, r = 0). It has its
extremum at lr = -q'u/(u'Hu + tr(P H P S)/B), where it is q'u lr/2, if the curvature is against the slope;
the batch at which noise and curvature are equal is tr(P H P S)/u'Hu. For the log-prob of given text
-H = E[grad S grad S'] - E[(Hess pi)/pi] (RL studies 2.2), so that both terms are those of K1 squared less
those of K2, which are given apart.

Everything follows from w_b = P g_b by way of the kernel between prompts m(b, c) = w_b' H w_c: over pairs of
different prompts its mean is G'P H P G, without bias, since the groups are independent of one another and of
the probe; over the diagonal it is tr(P H P S) more (U statistics with prompts as units).

Errors: jackknife over update prompts and over folds of the probe, added (``measure.criteria.two_way``).
Quotients have Fieller's limits: all values x for which numerator - x denominator is compatible with 0. If
the denominator is, there is no number, and at most a limit on one side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from stepscope.errors import BatchError
from stepscope.intervals import FEWEST, student
from stepscope.measure.criteria.two_way import Way, two_way
from stepscope.measure.curvature.pairs import Folded, PairKernel
from stepscope.results import FloatArray, IntArray
from stepscope.results.best_step import BestRow, BestStep, StepTerms
from stepscope.stats import Estimate, leave_out

SLOPE, CURVATURE, NOISE, PART_SLOPE, CROSS, PARTS = range(6)
"""Places of the terms in a row of numbers: q'PG, G'PHPG, tr(PHPS), q'r, r'HPG, r'Hr."""

Of = Callable[[FloatArray], FloatArray]
"""A function of (..., term) numbers."""

NAN = float("nan")


@dataclass(frozen=True)
class Terms:
    """The six terms, and the same without each update prompt and without each fold of the probe.

    Attributes:
        value: (term,).
        prompts: (prompt, term) without each.
        folds: (fold, term) without each.
    """

    value: FloatArray
    prompts: FloatArray
    folds: FloatArray

    def estimate(self, of: Of, *, unit: str) -> Estimate:
        """A smooth function of the terms with its error over both samples."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return two_way(
                float(of(self.value)),
                (
                    Way("update prompts", len(self.prompts), of(self.prompts)),
                    Way("folds of probe prompts", len(self.folds), of(self.folds)),
                ),
                unit=unit,
                scale="difference",
            )

    def quotient(self, top: Of, bottom: Of, *, unit: str) -> Estimate:
        """top/bottom with Fieller's limits; no number where the denominator is compatible with zero."""
        a, b = float(top(self.value)), float(bottom(self.value))
        spread = _Spread(self, top, bottom)
        found = self.estimate(lambda terms: top(terms) / bottom(terms), unit=unit)
        reach = spread.reach(a / b if b else 0.0)
        method = f"{found.method}, Fieller's limits"
        low, high, resolved = fieller(a, b, spread.covariance(), reach)
        if len(self.prompts) < FEWEST or len(self.folds) < FEWEST:
            return replace(found, method=method, low=low, high=high)
        if not resolved:
            error = float(np.sqrt(spread.covariance()[1, 1]))
            why = f"what it is divided by is {b:.2g} ± {error:.2g}, not resolved from zero"
            if np.isinf(low) and np.isinf(high):  # nothing is known of it
                low = high = NAN
            return Estimate(NAN, NAN, found.n, unit, method, False, why, low=low, high=high)
        return replace(found, method=method, low=low, high=high)


@dataclass(frozen=True)
class _Spread:
    """Errors of two functions of the terms together."""

    terms: Terms
    top: Of
    bottom: Of

    @cached_property
    def _ways(self) -> list[tuple[FloatArray, int]]:
        found = []
        for without in (self.terms.prompts, self.terms.folds):
            both = np.stack([self.top(without), self.bottom(without)])
            count = both.shape[1]
            apart = both - both.mean(1, keepdims=True)
            found.append(((count - 1) / count * apart @ apart.T, count - 1))
        return found

    def covariance(self) -> FloatArray:
        """(2, 2), of both samples."""
        return np.asarray(sum(part for part, _ in self._ways))

    def reach(self, x: float) -> float:
        """Standard errors to either side of top - x bottom (Satterthwaite)."""
        direction = np.array([1.0, -x])
        parts = np.array([direction @ part @ direction for part, _ in self._ways])
        freedom = np.array([max(1, free) for _, free in self._ways])
        scale = (parts**2 / freedom).sum()
        return student(1 + float(parts.sum() ** 2 / scale)) if scale > 0 else student(1 + freedom.min())


def fieller(a: float, b: float, covariance: FloatArray, reach: float) -> tuple[float, float, bool]:
    """Limits of a/b: the x with (a - x b)^2 <= reach^2 var(a - x b).

    Args:
        a: numerator.
        b: denominator.
        covariance: (2, 2) of the two.
        reach: standard errors to either side.

    Returns:
        Lower and upper limit, and whether the denominator is resolved. If it is not but the numerator is, the
        values compatible are two half lines, of which that on the side of a/b is given; else all are.
    """
    square = reach**2
    lead = b**2 - square * covariance[1, 1]
    middle = a * b - square * covariance[0, 1]
    last = a**2 - square * covariance[0, 0]
    inside = middle**2 - lead * last
    if not np.isfinite(inside):
        return -np.inf, np.inf, False
    if lead > 0:
        root = float(np.sqrt(max(inside, 0.0)))
        return float((middle - root) / lead), float((middle + root) / lead), True
    if lead == 0 or inside <= 0 or last <= 0:
        return -np.inf, np.inf, False
    ends = sorted(((middle - np.sqrt(inside)) / lead, (middle + np.sqrt(inside)) / lead))
    return (float(ends[1]), np.inf, False) if a * b > 0 else (-np.inf, float(ends[0]), False)


def best_step(kernel: PairKernel, *, lr: float, run_prompts: int) -> BestStep:
    """The best learning rate at every batch size, and the batch beyond which nothing is to be won.

    Args:
        kernel: of the quantity.
        lr: the step's own learning rate.
        run_prompts: prompt groups per step of the run.

    Raises:
        BatchError: the update batch has one prompt, which tells nothing of noise.
    """
    if int(kernel.prompts.max()) < 1:
        raise BatchError(
            "best step: the update batch has 1 prompt, expected at least 2; the unit is the prompt group, so "
            "sample more prompts"
        )
    terms = _terms(kernel, kernel.whole)
    count = len(terms.prompts)
    sizes = sorted({2**k for k in range(2, 11)} | {count, run_prompts})
    slope_unit, unit = f"{kernel.unit}/lr", f"{kernel.unit}/lr^2"
    kinds: dict[str, Estimate] = {}
    if kernel.fisher is not None:
        for name, of in (("fisher", kernel.fisher), ("rest", kernel.whole.less(kernel.fisher))):
            own = _terms(kernel, of)
            kinds[f"{name}_curvature"] = own.estimate(_curvature, unit=unit)
            kinds[f"{name}_noise"] = own.estimate(_noise, unit=unit)
    alone, together = (_slope, _curvature), (_slope_of_all, _curvature_of_all)
    return BestStep(
        quantity=kernel.quantity,
        unit=kernel.unit,
        lr=lr,
        prompts=count,
        run_prompts=run_prompts,
        batch=_step_terms(terms, *alone, slope_unit, unit),
        whole=_step_terms(terms, *together, slope_unit, unit),
        of_parts={
            "slope": terms.estimate(lambda t: t[..., PART_SLOPE], unit=slope_unit),
            "cross": terms.estimate(lambda t: 2 * t[..., CROSS], unit=unit),
            "curvature": terms.estimate(lambda t: t[..., PARTS], unit=unit),
        }
        if kernel.parts
        else {},
        kinds=kinds,
        rows=tuple(
            BestRow(B, *_best(terms, *alone, B, kernel.unit), *_best(terms, *together, B, kernel.unit))
            for B in sizes
        ),
    )


def _slope(t: FloatArray) -> FloatArray:
    return np.asarray(t[..., SLOPE])


def _curvature(t: FloatArray) -> FloatArray:
    return np.asarray(t[..., CURVATURE])


def _noise(t: FloatArray) -> FloatArray:
    return np.asarray(t[..., NOISE])


def _slope_of_all(t: FloatArray) -> FloatArray:
    return np.asarray(t[..., SLOPE] + t[..., PART_SLOPE])


def _curvature_of_all(t: FloatArray) -> FloatArray:
    return np.asarray(t[..., CURVATURE] + 2 * t[..., CROSS] + t[..., PARTS])


def _step_terms(terms: Terms, slope: Of, curvature: Of, slope_unit: str, unit: str) -> StepTerms:
    return StepTerms(
        slope=terms.estimate(slope, unit=slope_unit),
        curvature=terms.estimate(curvature, unit=unit),
        noise=terms.estimate(_noise, unit=unit),
        noise_batch=terms.quotient(_noise, curvature, unit="prompts"),
        lr_limit=_best_lr(terms, slope, curvature),
    )


def _best_lr(terms: Terms, slope: Of, bend: Of) -> Estimate:
    """-slope/bend where second order is against first, both resolved."""
    found = terms.quotient(slope, lambda t: -bend(t), unit="lr")
    first, second = terms.estimate(slope, unit=""), terms.estimate(bend, unit="")
    why = ""
    if not first.resolved:
        why = f"the slope is {first.value:.2g} ± {first.stderr:.2g}, not resolved from zero"
    elif not second.resolved:
        why = f"second order is {second.value:.2g} ± {second.stderr:.2g}, not resolved from zero"
    elif first.value * second.value > 0:
        why = "second order goes the way of the first, so that no learning rate is best to second order"
    if not why:
        return found
    low, high = (found.low, found.high) if found.value != found.value else (NAN, NAN)
    if not low > 0:  # a learning rate below zero is none
        low = high = NAN
    return Estimate(NAN, NAN, found.n, "lr", found.method, False, why, low=low, high=high)


def _best(terms: Terms, slope: Of, curvature: Of, B: int, unit: str) -> tuple[Estimate, Estimate]:
    """The best learning rate of a batch size, and the change it makes."""

    def bend(t: FloatArray) -> FloatArray:
        return np.asarray(curvature(t) + t[..., NOISE] / B)

    lr = _best_lr(terms, slope, bend)
    gain = terms.estimate(lambda t: -(slope(t) ** 2) / (2 * bend(t)), unit=unit)
    if not lr.reliable:
        return lr, Estimate(NAN, NAN, gain.n, unit, gain.method, False, lr.reason)
    return lr, gain


def _terms(kernel: PairKernel, of: Folded) -> Terms:
    """The terms from a kernel, or a part of one, whose rows are prompts and other parts of the step."""
    rows, count = kernel.rows, len(kernel.prompts)
    members = rows.weights[rows.prompts, :count]
    number = len(members)
    folds = len(of.sums)

    def without_folds(value: FloatArray, sums: FloatArray) -> FloatArray:
        """The estimate, and behind it those without each fold."""
        left = value - folds / (folds - 1) * sums if folds > 1 else np.full((1, *value.shape), NAN)
        return np.concatenate([value[None], left])

    every = without_folds(of.value, of.sums)
    slopes = without_folds(kernel.slopes, kernel.slope_sums)
    between = number**2 * every[:, rows.prompts, :count] @ members.T
    first = number * slopes[:, :count] @ members.T
    cross = number * every[:, rows.parts, :count].sum(1) @ members.T
    parts = every[:, rows.parts, count:].sum((1, 2))
    of_parts = slopes[:, count:].sum(1)

    def numbers(kept: IntArray) -> FloatArray:
        """(1 + fold, term) of some of the prompts."""
        some, m = between[:, kept[:, None], kept], len(kept)
        trace = np.trace(some, axis1=1, axis2=2)
        curvature = (some.sum((1, 2)) - trace) / (m * (m - 1)) if m > 1 else np.full(len(some), NAN)
        return np.stack(
            [
                first[:, kept].mean(1),
                curvature,
                trace / m - curvature,
                of_parts,
                cross[:, kept].mean(1),
                parts,
            ],
            axis=1,
        )

    whole = numbers(np.arange(number))
    left = np.array([n[0] for n in leave_out(numbers, np.arange(number))])
    return Terms(whole[0], left, whole[1:])


def doubted(made: BestStep, *reasons: str) -> BestStep:
    """The prediction with reasons not to trust it."""

    def all_of(values: Mapping[str, Estimate]) -> dict[str, Estimate]:
        return {name: value.doubted(*reasons) for name, value in values.items()}

    return replace(
        made,
        batch=StepTerms(**all_of(vars(made.batch))),
        whole=StepTerms(**all_of(vars(made.whole))),
        of_parts=all_of(made.of_parts),
        kinds=all_of(made.kinds),
        rows=tuple(
            BestRow(row.prompts, **all_of({n: v for n, v in vars(row).items() if n != "prompts"}))
            for row in made.rows
        ),
    )

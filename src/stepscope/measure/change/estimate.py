"""The records of a measured change, and how they come out of the tables of a probe batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from stepscope.loglog import loglog_fit
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.change.second_order import linear_up_to, measurable_from, round_off_floor, second
from stepscope.measure.change.uncertainty import Evidence, Statistic, estimate
from stepscope.measure.quantity.estimators import ESTIMATORS, ProbeValues, Sampled, linear, value
from stepscope.measure.quantity.importance_weights import (
    WeightCheck,
    check_weights,
    importance_weights,
    last_weights,
)
from stepscope.measure.quantity.values import TokenValues
from stepscope.results.change import Change, ChangePoint, Taken
from stepscope.stats import Estimate

AS_TAKEN = math.inf
"""Stands among the learning rates for the parameters as a training in a half type leaves them."""


UNRESOLVED = "the change without rounding is within four standard errors of zero"
"""Why a ratio to it says nothing."""


def doubted(change: Change, reason: str, *, true: bool) -> Change:
    """The series with a reason not to trust its derivatives, and its true changes along the line where asked.

    The change by the step as taken does not depend on the line.
    """

    def flag(estimate: Estimate | None) -> Estimate | None:
        return None if estimate is None else estimate.doubted(reason)

    points = tuple(
        replace(
            point,
            true=point.true.doubted(reason) if true else point.true,
            linear=point.linear.doubted(reason),
            second_order=flag(point.second_order),
            excess=point.excess.doubted(reason),
            odd=flag(point.odd) if true else point.odd,
        )
        for point in change.points
    )
    return replace(
        change, points=points, slope=change.slope.doubted(reason), curvature=flag(change.curvature)
    )


def make_change(
    probe: ProbeValues,
    slopes: Sequence[TokenValues],
    moved: Mapping[float, TokenValues],
    *,
    own_lr: float,
    lrs: Sequence[float],
    tiny: Sequence[float],
    options: ChangeOptions = ChangeOptions(),
    taken_words: str = "",
) -> Change:
    """Estimate the change of one quantity from token values; no model is needed.

    Args:
        probe: values at the parameters, with the baseline in use.
        slopes: first, or first and second, derivatives along the step.
        moved: values at shifted parameters by learning rate; where -lr is there too the odd part is given,
            and where ``AS_TAKEN`` is there the change by the rounded step.
        own_lr: the step's own learning rate.
        lrs: learning rates of the points, increasing.
        tiny: learning rates from which the round-off floor is read.
        options: estimator and errors.
        taken_words: how the rounded step came about.
    """
    quantity, baseline = probe.quantity, probe.baseline
    per_token = "per token" if quantity.per_token else "per sequence"
    words = f"{per_token}, {'on policy' if quantity.on_policy else 'fixed prefixes'}"
    evidence = Evidence(probe, tuple(slopes), moved)
    floor = round_off_floor(probe, slopes[0], {lr: moved[lr] for lr in tiny})

    def estimated(statistic: Statistic, method: str, unit: str = quantity.unit) -> Estimate:
        return estimate(evidence, statistic, errors=options.errors, unit=unit, method=method)

    def before(e: Evidence) -> Sampled:
        return value(e.probe)

    def slope(e: Evidence, lr: float = 1.0) -> Sampled:
        return linear(e.probe, e.slopes[0]).scaled(lr)

    def bend(e: Evidence, factor: float = 1.0) -> Sampled:
        return second(e.probe, e.slopes[0], e.slopes[1]).scaled(factor)

    def true(e: Evidence, lr: float) -> Sampled:
        return ESTIMATORS[options.estimator](e.probe, e.moved[lr])

    def excess(e: Evidence, lr: float) -> Sampled:
        return true(e, lr).plus(slope(e), -lr)

    def odd(e: Evidence, lr: float) -> Sampled:
        return true(e, lr).plus(true(e, -lr), -1.0).scaled(0.5)

    def rounding_effect(e: Evidence, lr: float) -> Sampled:
        return true(e, AS_TAKEN).plus(true(e, lr), -1.0)

    def kept(e: Evidence, lr: float) -> Sampled:
        whole, left = true(e, lr), true(e, AS_TAKEN)
        ratio = left.value / whole.value
        return Sampled(ratio, (left.residuals - ratio * whole.residuals) / whole.value)

    along = f"forward-mode derivative, {words}, baseline {baseline.kind}"
    weighted = f"{options.estimator} importance weights, {words}, baseline {baseline.kind}"
    curved = len(slopes) > 1
    doubt = slopes[1].doubt if curved else ""
    points = []
    for lr in lrs:
        check = _check(probe, moved[lr])
        bent = bend(evidence, lr**2 / 2).value if curved and not doubt else 0.0
        expected = slope(evidence, lr).value + bent
        apart = estimated(partial(excess, lr=lr), f"paired difference, {weighted}")
        points.append(
            ChangePoint(
                lr=lr,
                true=_flagged(estimated(partial(true, lr=lr), weighted), check, floor, expected),
                linear=estimated(partial(slope, lr=lr), along),
                second_order=estimated(partial(bend, factor=lr**2 / 2), f"second {along}").doubted(doubt)
                if curved
                else None,
                excess=_flagged(apart, check, floor),
                odd=estimated(partial(odd, lr=lr), f"odd part of {weighted}") if -lr in moved else None,
                effective_sample_size=check.effective_sample_size,
                pareto_k=check.pareto_k,
            )
        )
    taken = None
    if AS_TAKEN in moved:
        check = _check(probe, moved[AS_TAKEN])
        how = f"{weighted}, {taken_words}"
        without = next(point.true for point in points if np.isclose(point.lr, own_lr, rtol=1e-9, atol=0))
        gap = estimated(partial(rounding_effect, lr=own_lr), f"paired difference, {how}")
        share = None
        if without.value:
            resolved = abs(without.value) > 4 * without.stderr
            share = estimated(partial(kept, lr=own_lr), f"paired ratio, {how}", "1").doubted(
                check.reason, "" if resolved else UNRESOLVED
            )
        taken = Taken(
            true=_flagged(estimated(partial(true, lr=AS_TAKEN), how), check, floor),
            unrounded=without,
            difference=_flagged(gap, check, floor),
            ratio=share,
            effective_sample_size=check.effective_sample_size,
            pareto_k=check.pareto_k,
        )
    along_slope = estimated(slope, along, f"{quantity.unit}/lr")
    curvature = estimated(bend, f"second {along}", f"{quantity.unit}/lr^2").doubted(doubt) if curved else None
    end = linear_up_to(along_slope.value, curvature.value) if curvature and not doubt else None
    regime = float("inf") if end is None else max(end, own_lr * (1 + 1e-9))
    trusted = [p for p in points if p.true.reliable and p.lr <= regime]
    return Change(
        quantity=quantity.name,
        normalisation=quantity.normalisation,
        version=quantity.version,
        lr=own_lr,
        points=tuple(points),
        fit=loglog_fit([p.lr for p in trusted], [p.true.value for p in trusted])
        if len(trusted) > 1
        else None,
        value=estimated(before, words),
        slope=along_slope,
        curvature=curvature,
        baseline=baseline.kind,
        baseline_stderr=baseline.stderr,
        baseline_explained=baseline.explained,
        estimator=options.estimator,
        round_off=floor,
        measurable_from=measurable_from(along_slope.value, floor),
        linear_up_to=end,
        taken=taken,
    )


def _check(probe: ProbeValues, moved: TokenValues) -> WeightCheck:
    """Trust in the weights; with fixed prefixes there are none, and all sequences count fully."""
    if not probe.quantity.on_policy:
        return WeightCheck(float(len(probe.mask)), float("nan"), len(probe.mask), "")
    weights = importance_weights(probe.values.logprobs, moved.logprobs)
    token_dependent = bool((moved.token != 0).any())
    return check_weights(
        last_weights(weights, probe.mask, token_dependent=token_dependent), probe.sequence_weights
    )


def _flagged(estimate: Estimate, check: WeightCheck, floor: float, expected: float | None = None) -> Estimate:
    """The estimate with the verdict of its weights and of the round-off floor added to its own.

    Round-off can lift a value over its floor by chance, so that a value below ten floors must also be
    ``expected`` (from the derivatives, which have no such floor) above three.
    """
    reasons = [r for r in (estimate.reason, check.reason) if r]
    size = abs(estimate.value)
    if expected is not None and size < 10 * floor:
        size = float(np.minimum(size, abs(expected)))
    if not size >= 3 * floor:
        reasons.append(f"below three times the round-off floor of {floor:.1e}")
    return replace(estimate, reliable=not reasons, reason="; ".join(reasons))

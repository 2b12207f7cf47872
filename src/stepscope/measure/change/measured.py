"""What a step does to a quantity: linear, second-order and true change over a grid of learning rates.

All changes are estimated from one set of passes over the probe batch: values at the parameters, derivatives
along the direction, values at ``params + lr * direction`` for every lr, with the estimators of
``measure.quantity.estimators``. Errors are conditional on the update batch (the direction is given) and
clustered by probe prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from stepscope.errors import MeasurementError
from stepscope.measure.change.estimate import AS_TAKEN, doubted, make_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.change.second_order import round_off_lrs
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.baselines import fit_baseline
from stepscope.measure.quantity.estimators import linear
from stepscope.measure.quantity.probe import baseline_features, probe_values
from stepscope.measure.quantity.values import derivatives, response_mask, values_at
from stepscope.measure.step.rounding import RoundedStep
from stepscope.policy.check.derivatives import derivative_errors
from stepscope.policy.passes import Budget, longest, track
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.results import Rollouts
from stepscope.results.change import Change, ChangePoint
from stepscope.stats import Estimate

DECADES = (-3, -2, -1, 0, 1, 2)
"""The default grid, in powers of ten of the step's own learning rate."""


class StepLike(Protocol):
    """What is needed of a step: where it points, and the learning rate of the run."""

    @property
    def direction(self) -> ParameterVector: ...  # noqa: D102
    @property
    def lr(self) -> float: ...  # noqa: D102


def measure_change(
    policy: Policy,
    step: StepLike,
    probe: Rollouts,
    *,
    quantity: str | Quantity = "entropy",
    lrs: Sequence[float] | None = None,
    options: ChangeOptions = ChangeOptions(),
    taken: RoundedStep | None = None,
    budget: Budget = Budget(),
) -> Change:
    """The change of one quantity, as :func:`measure_changes` measures it, which documents the arguments."""
    return measure_changes(
        policy, step, probe, quantities=(quantity,), lrs=lrs, options=options, taken=taken, budget=budget
    )[0]


def measure_changes(
    policy: Policy,
    step: StepLike,
    probe: Rollouts,
    *,
    quantities: Sequence[str | Quantity] = ("entropy",),
    lrs: Sequence[float] | None = None,
    options: ChangeOptions = ChangeOptions(),
    taken: RoundedStep | None = None,
    budget: Budget = Budget(),
) -> tuple[Change, ...]:
    """The change of several quantities along one step.

    Costs one forward-mode pass over the probe batch (nested where second order is wanted), one forward pass
    per learning rate and for the step as taken, and six more for the baseline's features, the unmoved values
    and the round-off floor, however many quantities are asked for.

    Args:
        policy: where the step starts; restored bitwise.
        step: anything with ``direction`` and ``lr``.
        probe: samples of the policy that are not in the update batch.
        quantities: names, or quantities; those that differ in normalisation and version alone share values.
        lrs: learning rates; the step's own is always added. None takes six decades around it.
        options: estimators, errors and orders.
        taken: the step as a training in a half type takes it; its change is measured beside the line's, at
            the step's own learning rate.
        budget: what may be used at a time.

    Returns:
        A change for each quantity.

    Raises:
        MeasurementError: nothing to measure, or no usable learning rate.
    """
    if not quantities:
        raise MeasurementError("nothing to measure; name a quantity (entropy)")
    grid = lr_grid(step.lr, lrs)
    wanted = [make_quantity(q, probe, policy=policy) for q in quantities]
    distinct = list({q.values_key: q for q in wanted}.values())
    index = {q.values_key: i for i, q in enumerate(distinct)}
    values = values_at(policy, probe, distinct, budget=budget)
    order = 2 if options.second_order else 1
    slopes = derivatives(policy, probe, distinct, step.direction, order=order, budget=budget)
    features = baseline_features(policy, probe, wanted, options.baseline, budget=budget)
    few = longest(policy, probe, min(4, budget.max_sequences))
    doubt = derivative_errors(
        policy, few, step.direction, temperature=probe.temperature, reverse=False
    ).slope_doubt
    tiny = round_off_lrs(slopes[0], response_mask(probe), torch.finfo(policy.dtype).eps)
    stops = [*tiny, *grid, *([-lr for lr in grid] if options.antithetic else [])]
    moved = {
        lr: values_at(policy, probe, distinct, step.direction, lr, budget=budget)
        for lr in track(stops, "true change", budget)
    }
    taken_words = ""
    if taken is not None:
        with placed(policy.parameters, taken.parameters):
            moved[AS_TAKEN] = values_at(policy, probe, distinct, budget=budget)
        forward = str(policy.dtype).removeprefix("torch.")
        taken_words = f"at the weights that AdamW leaves in {taken.kept_in}, forward pass in {forward}"
    found = []
    for quantity in wanted:
        place = index[quantity.values_key]
        at = probe_values(quantity, values.quantity(place), probe, options.sequence_weights)
        own = [s.quantity(place) for s in slopes]
        change = make_change(
            replace(at, baseline=fit_baseline(options.baseline, at, own[0], features=features)),
            own,
            {lr: v.quantity(place) for lr, v in moved.items()},
            own_lr=step.lr if taken is None else taken.lr,
            lrs=grid,
            tiny=tiny,
            options=options,
            taken_words=taken_words,
        )
        found.append(doubted(change, doubt, true=False))
    return tuple(found)


def measure_slope(
    policy: Policy,
    step: StepLike,
    probe: Rollouts,
    *,
    quantity: str | Quantity = "entropy",
    baseline: str = "best",
    budget: Budget = Budget(),
) -> Estimate:
    """Grad F . direction alone, without any shifted parameters: cheap enough for a much larger batch.

    See :func:`with_linear_control` for what the larger batch buys; arguments as in :func:`measure_changes`.

    Raises:
        MeasurementError: an unknown name.
    """
    chosen = make_quantity(quantity, probe, policy=policy)
    (first,) = derivatives(policy, probe, [chosen], step.direction, budget=budget)
    slopes = first.quantity(0)
    at = probe_values(chosen, values_at(policy, probe, [chosen], budget=budget).quantity(0), probe)
    features = baseline_features(policy, probe, [chosen], baseline, budget=budget)
    at = replace(at, baseline=fit_baseline(baseline, at, slopes, features=features))
    method = f"forward-mode derivative, baseline {at.baseline.kind}"
    return at.estimate(linear(at, slopes), unit=f"{chosen.unit}/lr", method=method)


def with_linear_control(point: ChangePoint, slope: Estimate) -> Estimate:
    """The true change with the linear change as control variate: paired difference + linear change elsewhere.

    In the linear regime true and linear change have nearly the same error on the same samples, so their
    paired difference has almost none, and the linear change may come from a larger batch. Unbiased (to the
    order of the ratio's bias) provided that the two batches are independent samples.

    Args:
        point: measured on the probe batch.
        slope: of the same series, from :func:`measure_slope` on a batch that shares no samples with it.
    """
    return Estimate(
        value=point.excess.value + point.lr * slope.value,
        stderr=float(np.hypot(point.excess.stderr, point.lr * slope.stderr)),
        n=min(point.excess.n, slope.n),
        unit=point.true.unit,
        method=f"linear change of {slope.n} prompts + {point.excess.method}",
        reliable=point.true.reliable and slope.reliable,
        reason=point.true.reason or slope.reason,
    )


def lr_grid(own: float, lrs: Sequence[float] | None) -> tuple[float, ...]:
    """The learning rates of a measurement, increasing, the step's own among them.

    Raises:
        MeasurementError: a learning rate is not positive, or there is none.
    """
    if lrs is None:
        chosen = {own * 10.0**power for power in DECADES} if own > 0 else set()
    else:
        chosen = {float(lr) for lr in lrs}
        if any(not lr > 0 for lr in chosen):
            raise MeasurementError(f"learning rates must be positive, got {sorted(chosen)}")
        if own > 0 and not any(np.isclose(own, lr, rtol=1e-9, atol=0) for lr in chosen):
            chosen.add(own)
    if not chosen:
        raise MeasurementError(
            "the checkpoint's own learning rate is 0 (the end of its schedule); give the learning rates (lrs)"
        )
    return tuple(sorted(chosen))

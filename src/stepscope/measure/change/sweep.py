"""What a step does to a quantity: linear, second-order and true change over a sweep of learning rates.

All series are made from one set of passes over the probe batch: values at the parameters, derivatives along
the direction, values at ``params + lr * direction`` for every lr. The estimators are in
``measure.quantity.estimators``.
Errors are conditional on the update batch (the direction is given) and clustered by probe prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from stepscope.errors import MeasurementError
from stepscope.measure.change.second_order import round_off_lrs
from stepscope.measure.change.series import AS_TAKEN, doubted, make_change
from stepscope.measure.change.uncertainty import ERRORS
from stepscope.measure.quantity.baselines import LADDER, fit_baseline, length_baseline
from stepscope.measure.quantity.estimators import ESTIMATORS, Probe, linear
from stepscope.measure.quantity.quantities import Quantity, make_quantity, unit_of, why_trivial
from stepscope.measure.quantity.values import TokenTable, derivatives, hidden_states, response_mask, values_at
from stepscope.measure.step.rounding import RoundedStep
from stepscope.policy.derivative_check import derivative_errors
from stepscope.policy.passes import Budget, longest, track
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.results import FloatArray, Rollouts
from stepscope.results.change import Change, ChangePoint
from stepscope.stats import Estimate

__all__ = [
    "Line",
    "measure_change",
    "measure_changes",
    "measure_slope",
    "probe_of",
    "sweep_of",
    "with_linear_control",
]

DECADES = (-3, -2, -1, 0, 1, 2)
"""The default sweep, in powers of ten of the step's own learning rate."""


class Line(Protocol):
    """What is needed of a step: where it points, and the learning rate of the run."""

    @property
    def direction(self) -> ParameterVector: ...  # noqa: D102
    @property
    def lr(self) -> float: ...  # noqa: D102


def measure_change(
    policy: Policy,
    step: Line,
    probe: Rollouts,
    *,
    quantity: str | Quantity = "entropy",
    lrs: Sequence[float] | None = None,
    normalisation: str = "per_token",
    version: str = "on_policy",
    baseline: str = "best",
    estimator: str = "per_decision",
    errors: str = "delta",
    second_order: bool = False,
    antithetic: bool = False,
    reference: nn.Module | None = None,
    sequence_weights: FloatArray | None = None,
    taken: RoundedStep | None = None,
    budget: Budget = Budget(),
) -> Change:
    """One series of :func:`measure_changes`, which documents the arguments."""
    return measure_changes(
        policy,
        step,
        probe,
        quantities=(quantity,),
        lrs=lrs,
        normalisations=(normalisation,),
        versions=(version,),
        baseline=baseline,
        estimator=estimator,
        errors=errors,
        second_order=second_order,
        antithetic=antithetic,
        reference=reference,
        sequence_weights=sequence_weights,
        taken=taken,
        budget=budget,
    )[0]


def measure_changes(
    policy: Policy,
    step: Line,
    probe: Rollouts,
    *,
    quantities: Sequence[str | Quantity] = ("entropy",),
    lrs: Sequence[float] | None = None,
    normalisations: Sequence[str] = ("per_token",),
    versions: Sequence[str] = ("on_policy",),
    baseline: str = "best",
    estimator: str = "per_decision",
    errors: str = "delta",
    second_order: bool = False,
    antithetic: bool = False,
    reference: nn.Module | None = None,
    sequence_weights: FloatArray | None = None,
    taken: RoundedStep | None = None,
    budget: Budget = Budget(),
) -> tuple[Change, ...]:
    """The change of several quantities along one step, in several normalisations and versions.

    Costs one forward-mode pass over the probe batch (nested where second order is wanted), one forward pass
    per learning rate and for the step as taken, and six more for the baseline's features, the unmoved values
    and the round-off floor, however many series are asked for.

    Args:
        policy: where the step starts; restored bitwise.
        step: anything with ``direction`` and ``lr``.
        probe: samples of the policy that are not in the update batch.
        quantities: names, or quantities bound to ``probe``.
        lrs: learning rates; the step's own is always added. None takes six decades around it.
        normalisations: ``per_token``, ``per_seq``.
        versions: ``on_policy``, ``fixed_prefix``.
        baseline: ``best`` or a rung of the ladder: ``none``, ``current``, ``position``, ``ridge``.
        estimator: of the true change: ``per_decision``, ``self_normalised``, ``whole_sequence``,
            ``regression``.
        errors: standard errors by ``delta`` method, ``jackknife`` or ``bootstrap``; see
            ``measure.change.uncertainty``.
        second_order: whether to compute the second derivative.
        antithetic: whether to also evaluate at -lr, for the odd part of the true change.
        reference: reference model of ``kl``.
        sequence_weights: (seq,) probabilities, where the probe enumerates all responses; errors are then 0.
        taken: the step as a training in a half type takes it; its change is measured beside the line's, at
            the step's own learning rate.
        budget: what may be used at a time.

    Returns:
        One series per quantity, normalisation and version, in that nesting; combinations that are constant by
        definition are left out if anything else remains.

    Raises:
        MeasurementError: nothing to measure, unknown estimator, baseline or errors, or no usable
            learning rate.
    """
    if estimator not in ESTIMATORS:
        raise MeasurementError(f"unknown estimator {estimator!r}; choose from {', '.join(ESTIMATORS)}")
    if baseline not in (*LADDER, "best"):
        raise MeasurementError(f"unknown baseline {baseline!r}; choose from best, {', '.join(LADDER)}")
    if errors not in ERRORS:
        raise MeasurementError(f"unknown kind of errors {errors!r}; choose from {', '.join(ERRORS)}")
    sweep = sweep_of(step.lr, lrs)
    bound = [
        make_quantity(q, probe, policy=policy, reference=reference, budget=budget)
        if isinstance(q, str)
        else q
        for q in quantities
    ]
    wanted = _combinations(bound, normalisations, versions)
    order = 2 if second_order else 1
    table = values_at(policy, probe, bound, budget=budget)
    slopes = derivatives(policy, probe, bound, step.direction, order=order, budget=budget)
    mask = response_mask(probe)
    features = None
    if baseline in ("best", "ridge") and any(version == "on_policy" for _, _, version in wanted):
        features = hidden_states(policy, probe, budget=budget)
    few = longest(policy, probe, min(4, budget.max_sequences))
    doubt = derivative_errors(
        policy, few, step.direction, temperature=probe.temperature, reverse=False
    ).slope_doubt
    tiny = round_off_lrs(slopes[0], mask, torch.finfo(policy.dtype).eps)
    stops = [*tiny, *sweep, *([-lr for lr in sweep] if antithetic else [])]
    moved = {
        lr: values_at(policy, probe, bound, step.direction, lr, budget=budget)
        for lr in track(stops, "true change", budget)
    }
    taken_words = ""
    if taken is not None:
        with placed(policy.parameters, taken.parameters):
            moved[AS_TAKEN] = values_at(policy, probe, bound, budget=budget)
        forward = str(policy.dtype).removeprefix("torch.")
        taken_words = f"at the weights that AdamW leaves in {taken.kept_in}, forward pass in {forward}"
    found = []
    for index, normalisation, version in wanted:
        at = probe_of(table.quantity(index), probe, normalisation, version, sequence_weights)
        local = [s.quantity(index) for s in slopes]
        change = make_change(
            bound[index],
            at,
            local,
            {lr: t.quantity(index) for lr, t in moved.items()},
            own_lr=step.lr if taken is None else taken.lr,
            sweep=sweep,
            tiny=tiny,
            baseline=fit_baseline(baseline, at, local[0], features=features),
            estimator=estimator,
            errors=errors,
            taken_words=taken_words,
        )
        found.append(doubted(change, doubt, true=False))
    return tuple(found)


def measure_slope(
    policy: Policy,
    step: Line,
    probe: Rollouts,
    *,
    quantity: str | Quantity = "entropy",
    normalisation: str = "per_token",
    version: str = "on_policy",
    baseline: str = "best",
    reference: nn.Module | None = None,
    budget: Budget = Budget(),
) -> Estimate:
    """Grad F . direction alone, without any shifted parameters: cheap enough for a much larger batch.

    See :func:`with_linear_control` for what the larger batch buys; arguments as in :func:`measure_changes`.

    Raises:
        MeasurementError: the combination is constant by definition, or an unknown name.
    """
    bound = (
        make_quantity(quantity, probe, policy=policy, reference=reference, budget=budget)
        if isinstance(quantity, str)
        else quantity
    )
    trivial = why_trivial(bound, normalisation, version)
    if trivial:
        raise MeasurementError(trivial)
    table = values_at(policy, probe, [bound], budget=budget).quantity(0)
    (first,) = derivatives(policy, probe, [bound], step.direction, budget=budget)
    features = None
    if baseline in ("best", "ridge") and version == "on_policy":
        features = hidden_states(policy, probe, budget=budget)
    at = probe_of(table, probe, normalisation, version)
    fitted = fit_baseline(baseline, at, first.quantity(0), features=features)
    found = linear(at.with_baseline(fitted.values), first.quantity(0))
    unit = f"{unit_of(bound, normalisation)}/lr"
    return at.estimate(found, unit=unit, method=f"forward-mode derivative, baseline {fitted.kind}")


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


def probe_of(
    table: TokenTable,
    rollouts: Rollouts,
    normalisation: str,
    version: str,
    sequence_weights: FloatArray | None = None,
) -> Probe:
    """A quantity's table as a probe, with no baseline yet."""
    mask = response_mask(rollouts)
    return Probe(
        table=table,
        mask=mask,
        clusters=rollouts.prompt_index,
        per_token=normalisation == "per_token",
        on_policy=version == "on_policy",
        baseline=np.zeros(mask.shape),
        length_baseline=length_baseline(mask, rollouts.prompt_index),
        sequence_weights=sequence_weights,
    )


def sweep_of(own: float, lrs: Sequence[float] | None) -> tuple[float, ...]:
    """The learning rates of a sweep, increasing, the step's own among them.

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


def _combinations(
    bound: Sequence[Quantity], normalisations: Sequence[str], versions: Sequence[str]
) -> list[tuple[int, str, str]]:
    every = [(i, n, v) for i in range(len(bound)) for n in normalisations for v in versions]
    if not every:
        raise MeasurementError("nothing to measure; name a quantity (entropy), normalisation and version")
    trivial = [why_trivial(bound[i], n, v) for i, n, v in every]
    if all(trivial):
        raise MeasurementError(trivial[0])
    return [combination for combination, reason in zip(every, trivial, strict=True) if not reason]

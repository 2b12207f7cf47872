"""The change that a step under way makes to a quantity: predicted before it, realised after it.

``measure.change`` moves the parameters along a direction and puts them back. Here the optimizer itself moves
them: the tables of a probe batch are taken before its step, one more after it, and the estimators are the
same (``measure.quantity.estimators``). The prediction is split into the parts of the direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stepscope.measure.change.second_order import round_off_lrs
from stepscope.measure.change.series import make_change
from stepscope.measure.change.sweep import probe_of
from stepscope.measure.quantity.baselines import Baseline, fit_baseline
from stepscope.measure.quantity.estimators import Probe, linear
from stepscope.measure.quantity.quantities import Quantity, make_quantity, unit_of
from stepscope.measure.quantity.values import TokenTable, derivatives, values_at
from stepscope.policy import vectors
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Rollouts
from stepscope.results.change import Change
from stepscope.stats import Estimate

BASELINE = "position"
"""Rung of the baseline ladder: needs no further pass over the probe batch."""


@dataclass(frozen=True)
class Prediction:
    """What a step is about to do to a quantity, and what is needed to compare it with what it did.

    Attributes:
        quantity: bound to ``rollouts``.
        rollouts: the probe batch, sampled before the step.
        lr: learning rate of the step.
        parts: name to linear change by that part of the direction; with its error, clustered by prompt.
        probe: values before the step.
        slope: derivative of every token's values along the whole direction.
        baseline: the fitted baseline.
        tiny: values at learning rates so small that what they show beside the line is round-off.
    """

    quantity: Quantity
    rollouts: Rollouts
    lr: float
    parts: Mapping[str, Estimate]
    probe: Probe
    slope: TokenTable
    baseline: Baseline
    tiny: Mapping[float, TokenTable]


def predict_change(
    policy: Policy,
    parts: Mapping[str, ParameterVector],
    rollouts: Rollouts,
    *,
    lr: float,
    quantity: str = "entropy",
    normalisation: str = "per_token",
    version: str = "on_policy",
    budget: Budget = Budget(),
) -> Prediction:
    """The linear change that each part of a step will make; call it before the parameters move.

    Costs one forward-mode pass for every part that is not zero, and three forward passes.

    Args:
        policy: where the step starts; restored bitwise.
        parts: name to part of the direction; the step moves the parameters by lr times their sum.
        rollouts: the probe batch, samples of the policy that are not in the update batch.
        lr: learning rate of the step.
        quantity: its name.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        budget: what may be used at a time.
    """
    bound = make_quantity(quantity, rollouts, policy=policy, budget=budget)
    table = values_at(policy, rollouts, [bound], budget=budget).quantity(0)
    at = probe_of(table, rollouts, normalisation, version)
    slopes = {
        name: derivatives(policy, rollouts, [bound], part, budget=budget)[0].quantity(0)
        for name, part in parts.items()
        if vectors.norm(part) > 0
    }
    slope = TokenTable(
        *(
            sum((getattr(s, field) for s in slopes.values()), start=0.0 * getattr(table, field))
            for field in ("logprobs", "prefix", "token")
        )
    )
    baseline = fit_baseline(BASELINE, at, slope)
    at = at.with_baseline(baseline.values)
    unit = unit_of(bound, normalisation)
    nothing = Estimate(0.0, 0.0, rollouts.num_prompts, unit, "this part of the step is zero")
    direction = vectors.add(*parts.values())
    stops = round_off_lrs(slope, at.mask, torch.finfo(policy.dtype).eps)[:2]
    return Prediction(
        quantity=bound,
        rollouts=rollouts,
        lr=lr,
        parts={
            name: at.estimate(
                linear(at, slopes[name]).scaled(lr), unit=unit, method=f"forward-mode derivative, {BASELINE}"
            )
            if name in slopes
            else nothing
            for name in parts
        },
        probe=at,
        slope=slope,
        baseline=baseline,
        tiny={
            t: values_at(policy, rollouts, [bound], direction, t, budget=budget).quantity(0) for t in stops
        },
    )


def realised_change(policy: Policy, prediction: Prediction, *, budget: Budget = Budget()) -> Change:
    """The change that the step made, on the samples it was predicted on; call it after the parameters moved.

    Args:
        policy: where the step ended.
        prediction: from before the step.
        budget: what may be used at a time.

    Returns:
        A series of one point: ``true`` is the realised change, ``linear`` the predicted one, ``excess`` their
        difference with the error of the paired difference.
    """
    after = values_at(policy, prediction.rollouts, [prediction.quantity], budget=budget)
    return make_change(
        prediction.quantity,
        prediction.probe,
        [prediction.slope],
        {**prediction.tiny, prediction.lr: after.quantity(0)},
        own_lr=prediction.lr,
        sweep=(prediction.lr,),
        tiny=tuple(prediction.tiny),
        baseline=prediction.baseline,
        estimator="per_decision",
    )

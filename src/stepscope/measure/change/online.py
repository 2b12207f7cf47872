"""The change that a step under way makes to a quantity: predicted before it, realised after it.

``measure_change`` moves the parameters along a direction and puts them back. Here the optimizer itself moves
them: the tables of a probe batch are taken before its step, one more after it, and the estimators are the
same (``measure.quantity.estimators``). The prediction is split into the parts of the direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from stepscope.measure.change.estimate import make_change
from stepscope.measure.change.second_order import round_off_lrs
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.baselines import fit_baseline
from stepscope.measure.quantity.estimators import ProbeValues, linear
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import TokenValues, derivatives, values_at
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
        rollouts: the probe batch, sampled before the step.
        lr: learning rate of the step.
        parts: name to linear change by that part of the direction; with its error, clustered by prompt.
        probe: values before the step, with the baseline.
        slope: derivative of every token's values along the whole direction.
        tiny: values at learning rates so small that what they show beside the line is round-off.
    """

    rollouts: Rollouts
    lr: float
    parts: Mapping[str, Estimate]
    probe: ProbeValues
    slope: TokenValues
    tiny: Mapping[float, TokenValues]


def predict_change(
    policy: Policy,
    parts: Mapping[str, ParameterVector],
    rollouts: Rollouts,
    *,
    lr: float,
    quantity: str | Quantity = "entropy",
    budget: Budget = Budget(),
) -> Prediction:
    """The linear change that each part of a step will make; call it before the parameters move.

    Costs one forward-mode pass for every part that is not zero, and three forward passes.

    Args:
        policy: where the step starts; restored bitwise.
        parts: name to part of the direction; the step moves the parameters by lr times their sum.
        rollouts: the probe batch, samples of the policy that are not in the update batch.
        lr: learning rate of the step.
        quantity: a name, or a quantity.
        budget: what may be used at a time.
    """
    chosen = make_quantity(quantity, rollouts, policy=policy)
    values = values_at(policy, rollouts, [chosen], budget=budget).quantity(0)
    slopes = {
        name: derivatives(policy, rollouts, [chosen], part, budget=budget)[0].quantity(0)
        for name, part in parts.items()
        if vectors.norm(part) > 0
    }
    slope = TokenValues(
        *(
            sum((getattr(s, field) for s in slopes.values()), start=0.0 * getattr(values, field))
            for field in ("logprobs", "prefix", "token")
        )
    )
    at = probe_values(chosen, values, rollouts)
    at = replace(at, baseline=fit_baseline(BASELINE, at, slope))
    nothing = Estimate(0.0, 0.0, rollouts.num_prompts, chosen.unit, "this part of the step is zero")
    direction = vectors.add(*parts.values())
    stops = round_off_lrs(slope, at.mask, torch.finfo(policy.dtype).eps)[:2]
    method = f"forward-mode derivative, {BASELINE}"
    return Prediction(
        rollouts=rollouts,
        lr=lr,
        parts={
            name: at.estimate(linear(at, slopes[name]).scaled(lr), unit=chosen.unit, method=method)
            if name in slopes
            else nothing
            for name in parts
        },
        probe=at,
        slope=slope,
        tiny={
            t: values_at(policy, rollouts, [chosen], direction, t, budget=budget).quantity(0) for t in stops
        },
    )


def realised_change(policy: Policy, prediction: Prediction, *, budget: Budget = Budget()) -> Change:
    """The change that the step made, on the samples it was predicted on; call it after the parameters moved.

    Args:
        policy: where the step ended.
        prediction: from before the step.
        budget: what may be used at a time.

    Returns:
        A change of one point: ``true`` is the realised change, ``linear`` the predicted one, ``excess`` their
        difference with the error of the paired difference.
    """
    after = values_at(policy, prediction.rollouts, [prediction.probe.quantity], budget=budget)
    return make_change(
        prediction.probe,
        [prediction.slope],
        {**prediction.tiny, prediction.lr: after.quantity(0)},
        own_lr=prediction.lr,
        lrs=(prediction.lr,),
        tiny=tuple(prediction.tiny),
    )

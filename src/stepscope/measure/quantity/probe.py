"""A quantity on a probe batch: evaluated at the policy's parameters, with a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.baselines import fit_baseline, length_baseline
from stepscope.measure.quantity.estimators import Baseline, ProbeValues
from stepscope.measure.quantity.values import (
    TokenValues,
    derivatives,
    hidden_states,
    response_mask,
    values_at,
)
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, Rollouts


def probe_values(
    quantity: Quantity,
    values: TokenValues,
    rollouts: Rollouts,
    sequence_weights: FloatArray | None = None,
) -> ProbeValues:
    """A quantity's values on a probe batch, with no baseline yet."""
    mask = response_mask(rollouts)
    return ProbeValues(
        quantity=quantity,
        values=values,
        mask=mask,
        clusters=rollouts.prompt_index,
        baseline=Baseline("none", np.zeros(mask.shape)),
        length_baseline=length_baseline(mask, rollouts.prompt_index),
        sequence_weights=sequence_weights,
    )


def bind_quantity(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Quantity,
    *,
    direction: ParameterVector,
    baseline: str = "best",
    budget: Budget = Budget(),
) -> ProbeValues:
    """Evaluate a quantity and fit its baseline exactly as ``measure_change`` does on the same batch.

    Args:
        policy: the policy.
        rollouts: the probe batch.
        quantity: a name, or a quantity.
        direction: of the step; with baseline ``best`` the rungs are judged on the change along it, which
            costs a forward-mode pass.
        baseline: ``best``, or a rung of the ladder (``Change.baseline`` saves the pass).
        budget: what may be used at a time.

    Raises:
        MeasurementError: an unknown name.
    """
    chosen = make_quantity(quantity, rollouts, policy=policy)
    probe = probe_values(chosen, values_at(policy, rollouts, (chosen,), budget=budget).quantity(0), rollouts)
    nothing = np.zeros(probe.mask.shape)
    slopes = TokenValues(nothing, nothing, nothing)
    if chosen.on_policy and baseline == "best":
        slopes = derivatives(policy, rollouts, (chosen,), direction, budget=budget)[0].quantity(0)
    features = baseline_features(policy, rollouts, (chosen,), baseline, budget=budget)
    return replace(probe, baseline=fit_baseline(baseline, probe, slopes, features=features))


def baseline_features(
    policy: Policy, rollouts: Rollouts, quantities: Sequence[Quantity], baseline: str, *, budget: Budget
) -> FloatArray | None:
    """(seq, tok, feature) hidden states, where the baseline of one of the quantities may look at them."""
    if baseline in ("best", "ridge") and any(quantity.on_policy for quantity in quantities):
        return hidden_states(policy, rollouts, budget=budget)
    return None

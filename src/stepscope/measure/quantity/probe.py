"""A quantity on a probe batch: evaluated at the policy's parameters, with a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepscope.errors import MeasurementError
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


class Bindings:
    """The quantities of one probe batch, each evaluated and given its baseline once, however often asked for.

    For whoever asks for the same quantities in several places while the policy stays where it is, or comes
    back to where it was.

    Attributes:
        policy: the policy.
        rollouts: the probe batch.
        direction: of the step.
        budget: what may be used at a time.
    """

    def __init__(
        self, policy: Policy, rollouts: Rollouts, direction: ParameterVector, budget: Budget = Budget()
    ) -> None:
        self.policy = policy
        self.rollouts = rollouts
        self.direction = direction
        self.budget = budget
        self._values: dict[tuple[object, ...], TokenValues] = {}
        self._slopes: dict[tuple[object, ...], TokenValues] = {}
        self._bound: dict[tuple[object, ...], ProbeValues] = {}
        self._held: list[
            Quantity
        ] = []  # keys have ids of what quantities hold, which are not to be used again

    def bind(self, quantity: str | Quantity, baseline: str = "best") -> ProbeValues:
        """A quantity with its baseline, as :func:`bind_quantity` makes it.

        Raises:
            MeasurementError: an unknown name.
        """
        chosen = make_quantity(quantity, self.rollouts, policy=self.policy)
        whole = (*chosen.values_key, chosen.normalisation, chosen.version, baseline)
        if whole not in self._bound:
            self._held.append(chosen)
            self._bound[whole] = self._made(chosen, baseline)
        return self._bound[whole]

    def _made(self, chosen: Quantity, baseline: str) -> ProbeValues:
        policy, rollouts, budget, key = self.policy, self.rollouts, self.budget, chosen.values_key
        if key not in self._values:
            self._values[key] = values_at(policy, rollouts, (chosen,), budget=budget).quantity(0)
        probe = probe_values(chosen, self._values[key], rollouts)
        nothing = np.zeros(probe.mask.shape)
        slopes = TokenValues(nothing, nothing, nothing)
        if chosen.on_policy and baseline == "best":
            if key not in self._slopes:
                along = derivatives(policy, rollouts, (chosen,), self.direction, budget=budget)
                self._slopes[key] = along[0].quantity(0)
            slopes = self._slopes[key]
        features = baseline_features(policy, rollouts, (chosen,), baseline, budget=budget)
        return replace(probe, baseline=fit_baseline(baseline, probe, slopes, features=features))


def bindings_on(
    given: Bindings | None, policy: Policy, rollouts: Rollouts, direction: ParameterVector, budget: Budget
) -> Bindings:
    """The bindings that were given, of this policy and batch, or new ones where none were.

    Raises:
        MeasurementError: they are of another policy or probe batch.
    """
    if given is None:
        return Bindings(policy, rollouts, direction, budget)
    if given.policy is not policy or given.rollouts is not rollouts:
        raise MeasurementError(
            "bindings: of another policy or probe batch than those given; make Bindings of these"
        )
    return given


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
    return Bindings(policy, rollouts, direction, budget).bind(quantity, baseline)


def baseline_features(
    policy: Policy, rollouts: Rollouts, quantities: Sequence[Quantity], baseline: str, *, budget: Budget
) -> FloatArray | None:
    """(seq, tok, feature) hidden states, where the baseline of one of the quantities may look at them."""
    if baseline in ("best", "ridge") and any(quantity.on_policy for quantity in quantities):
        return hidden_states(policy, rollouts, budget=budget)
    return None

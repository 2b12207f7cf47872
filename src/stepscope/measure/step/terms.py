"""What a loss has beside its sequences: terms of the whole batch, each a component of the step of its own.

A further term is a function here that gives the minus gradient of its loss, and an entry in :data:`TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.step.divergence import divergence_gradient
from stepscope.measure.step.router import router_gradient
from stepscope.policy.gradients.derivatives import Objective, gradient
from stepscope.policy.loss.surrogate import adds_component, entropy_weights
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts


def bonus_gradient(policy: Policy, update: Rollouts, budget: Budget) -> dict[str, Tensor]:
    """Coefficient x gradient of the mean entropy of the tokens in the loss; empty without a bonus."""
    weights = entropy_weights(update, policy.settings, step=policy.step)
    return gradient(policy, update, weighted_entropies(weights), budget=budget) if weights else {}


def weighted_entropies(weights: Sequence[FloatArray]) -> Objective:
    """The objective sum_k e_ik H_ik, (seq, tok): with e = -dLoss/dH its gradient is -grad of the bonus.

    Args:
        weights: one (tok,) array per sequence of the batch it will be used on.
    """
    return lambda outputs, batch: batch.pad(weights, outputs.entropies) * outputs.entropies


TERMS: dict[str, Callable[[Policy, Rollouts, Policy | None, Budget], dict[str, Tensor]]] = {
    "bonus": lambda policy, update, _, budget: bonus_gradient(policy, update, budget),
    "divergence": divergence_gradient,
    "router": lambda policy, update, *_: router_gradient(policy, update),
}
"""Component to -grad of its part of the loss, on a batch, to a reference, within a budget; empty for none."""


def term_gradients(
    policy: Policy,
    update: Rollouts,
    *,
    reference: Policy | None = None,
    remade: bool = False,
    budget: Budget = Budget(),
) -> dict[str, dict[str, Tensor]]:
    """-grad of what in the loss belongs to no sequence, by component, of those terms that the loss has.

    Args:
        policy: its settings and its model say which.
        update: the batch of the step.
        reference: the reference policy, where a term is taken to one; None for what an adapter started from.
        remade: for steps made again without some sequences.
        budget: what may be used at a time.

    Raises:
        MeasurementError: an entropy bonus or a sum over the vocabulary in a re-made step, or no reference.
    """
    if remade and (what := adds_component(policy.settings)):
        raise MeasurementError(
            f"the loss has {what}, which belongs to no sequence, so a step without some of them is "
            "not defined; measure without re-made steps"
        )
    found = {name: of(policy, update, reference, budget) for name, of in TERMS.items()}
    return {name: vector for name, vector in found.items() if vector}

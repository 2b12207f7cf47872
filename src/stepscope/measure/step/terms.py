"""What a loss has beside its sequences: terms of the whole batch, each a component of the step of its own.

A further term is a function here that gives the minus gradient of its loss, and an entry in :data:`TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.experts import router_gradient
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients import gradient
from stepscope.policy.loss.surrogate import adds_component, entropy_weights
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts


def bonus_gradient(policy: Policy, update: Rollouts, max_sequences: int) -> dict[str, Tensor]:
    """Coefficient x gradient of the mean entropy of the tokens in the loss; empty without an entropy bonus.

    Raises:
        MeasurementError: TRL took the mean entropy of each micro-batch, not of the batch.
    """
    weights = entropy_weights(update, policy.settings)
    if not weights:
        return {}

    def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        return weigh(weights, outputs.entropies, batch)

    return gradient(policy, update, objective, max_sequences=max_sequences)


TERMS: dict[str, Callable[[Policy, Rollouts, int], dict[str, Tensor]]] = {
    "bonus": bonus_gradient,
    "router": lambda policy, update, _: router_gradient(policy, update),
}
"""Component to -grad of its part of the loss, on a batch in micro-batches of some size; empty for none."""


def term_gradients(
    policy: Policy, update: Rollouts, *, remade: bool = False, max_sequences: int = 16
) -> dict[str, dict[str, Tensor]]:
    """-grad of what in the loss belongs to no sequence, by component, of those terms that the loss has.

    Args:
        policy: its settings and its model say which.
        update: the batch of the step.
        remade: for steps made again without some sequences.
        max_sequences: micro-batch size.

    Raises:
        MeasurementError: an entropy bonus that is not of the whole batch, or one in a re-made step.
    """
    if remade and adds_component(policy.settings):
        raise MeasurementError(
            "the loss has an entropy bonus, which belongs to no sequence, so a step without some of them is "
            "not defined; measure without re-made steps"
        )
    found = {name: of(policy, update, max_sequences) for name, of in TERMS.items()}
    return {name: vector for name, vector in found.items() if vector}


def weigh(weights: Sequence[FloatArray], values: Tensor, batch: TokenBatch) -> Tensor:
    """(seq, tok) values of a micro-batch times the weights of its sequences.

    Args:
        weights: one (tok,) array per sequence of the batch that the micro-batch is cut from.
        values: (seq, tok), one value per response token.
        batch: the micro-batch.
    """
    factor = torch.zeros_like(values)
    for row, i in enumerate(batch.seq_index.tolist()):
        factor[row, : len(weights[i])] = torch.as_tensor(weights[i], dtype=factor.dtype, device=factor.device)
    return factor * values

"""The reverse KL divergence that a loss has in it at every prefix: its values, and its part of the gradient.

D_ik = KL(pi(.|s_ik) | ref(.|s_ik)), a sum over the vocabulary, is no function of the log-probs of the tokens
that were drawn. With e_ik = -dLoss/dD_ik the loss adds sum_ik e_ik grad D_ik at given prefixes to the ascent;
what the prefixes add to grad KL is in the token weights (:mod:`stepscope.policy.loss.hypo`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from stepscope.measure.quantity.kinds.kl import Reference
from stepscope.policy.forward import Reading, TokenBatch, TokenOutputs, forward
from stepscope.policy.gradients.derivatives import Objective, Readings, WeightedLogprobs, gradient
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.surrogate import divergence_weights, sums_over_vocabulary
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.reference import require_reference
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts

_KEY = "divergence"


def loss_reference(policy: Policy, reference: Policy | None) -> Reference:
    """What a training takes the divergence to: a policy that is given, or what an adapter started from.

    Raises:
        MeasurementError: none is given and the policy is a full model.
    """
    require_reference(policy, reference)
    temperature = policy.settings.temperature
    if reference is not None:
        return Reference(reference.model, temperature)
    return Reference(policy.model, temperature, switch_adapter=True, as_trained=True)


def token_divergences(
    policy: Policy, rollouts: Rollouts, reference: Policy | None, budget: Budget
) -> tuple[FloatArray, ...]:
    """D_ik in nats, one (tok,) array per sequence.

    Args:
        policy: not changed.
        rollouts: the sequences.
        reference: the reference policy; None for what an adapter started from.
        budget: what may be used at a time.

    Raises:
        MeasurementError: see :func:`loss_reference`.
    """
    of = loss_reference(policy, reference)

    def read(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            outputs = forward(
                policy.model, batch, temperature=rollouts.temperature, readings={_KEY: of.divergence(batch)}
            )
        return outputs.read[_KEY].double().cpu()

    return tuple(row.numpy() for row in sweep_rows(policy, rollouts, read, budget=budget))


def sequence_gradients(
    policy: Policy, update: Rollouts, weights: Sequence[FloatArray], reference: Policy | None
) -> SequenceGradients:
    """-grad Loss of each sequence: sum_k (w_ik grad l_ik + e_ik grad D_ik).

    Args:
        policy: where the step starts.
        update: the batch of the step.
        weights: its token weights w_ik.
        reference: the reference policy; None for what an adapter started from.

    Raises:
        BatchError: the batch is none that the loss can be of.
        MeasurementError: see :func:`loss_reference`.
    """
    of_logprobs = WeightedLogprobs(weights)
    if not sums_over_vocabulary(policy.settings):
        return SequenceGradients(update, of_logprobs)
    of_divergences, readings = _weighted(policy, divergence_weights(update, policy.settings), reference)

    def both(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        return of_logprobs(outputs, batch) + of_divergences(outputs, batch)

    return SequenceGradients(update, both, readings=readings)


def divergence_gradient(
    policy: Policy, update: Rollouts, reference: Policy | None, budget: Budget
) -> dict[str, Tensor]:
    """sum_ik e_ik grad D_ik at given prefixes, by parameter; empty where the loss has no D in it.

    Args:
        policy: where the step starts.
        update: the batch of the step.
        reference: the reference policy; None for what an adapter started from.
        budget: what may be used at a time.

    Raises:
        BatchError: the batch is none that the loss can be of.
        MeasurementError: see :func:`loss_reference`.
    """
    weights = divergence_weights(update, policy.settings)
    if not weights:
        return {}
    rows = [i for i, own in enumerate(weights) if own.any()]
    objective, readings = _weighted(policy, [weights[i] for i in rows], reference)
    return gradient(policy, update.select(rows), objective, readings=readings, budget=budget)


def _weighted(
    policy: Policy, weights: Sequence[FloatArray], reference: Policy | None
) -> tuple[Objective, Readings]:
    """The objective e_ik D_ik, (seq, tok), and what it reads."""
    of = loss_reference(policy, reference)

    def readings(batch: TokenBatch) -> Mapping[Hashable, Reading]:
        return {_KEY: of.divergence(batch)}

    def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        found = outputs.read[_KEY]
        return batch.pad(weights, found) * found

    return objective, readings

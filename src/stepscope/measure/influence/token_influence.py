"""Influence of each token on entropy and reward before a step is taken, for the rule ``influence`` to act on.

Training calls it before each optimizer step, and the reconstruction of a step from a checkpoint calls it
again, on the same probe batch (:func:`stepscope.policy.rollouts.sample_influence_probe`): hence the same
tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.change.online import BASELINE
from stepscope.measure.influence.attribution import token_products
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.reconstruct import assemble_step, weighted_logprobs
from stepscope.measure.step.terms import term_gradients
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.rules import InfluenceClipping

QUANTITIES = (("entropy", "per_token"), ("reward", "per_seq"))


def token_influences(
    policy: Policy,
    update: Rollouts,
    probe: Rollouts,
    *,
    logprobs: Sequence[FloatArray] | None = None,
    budget: Budget = Budget(),
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    """Influence of each token of a batch on entropy per token and expected reward, on policy, per unit of lr.

    w_ik (u . grad l_ik) with u = P grad F, where w are the token weights of the loss without the rule, P
    is AdamW's preconditioner in the step that they make, and grad F is estimated on the probe batch. Costs a
    gradient of the batch, two gradients of the probe batch, and two forward-mode passes over the batch; a
    third less where the rule's price is 0, since the reward is left out then.

    Args:
        policy: with AdamW's state; its settings have the rule ``influence``.
        update: the batch that makes the step.
        probe: fresh graded responses.
        logprobs: log-probs of the policy now, where it is not the one that sampled.
        budget: what may be used at a time.

    Returns:
        Influences on entropy (nats per token) and on reward (zeros at price 0), each one (tok,) array per
        sequence.

    Raises:
        MeasurementError: the settings have another rule, or the optimizer has no preconditioner.
    """
    rule = policy.settings.objective
    if not isinstance(rule, InfluenceClipping):
        raise MeasurementError(
            f"token influences belong to the objective influence, got {rule!r}; use measure.influence"
        )
    weights = token_weights(update, replace(policy.settings, objective=None), logprobs=logprobs)
    ascent = gradient(policy, update, weighted_logprobs(weights), budget=budget)
    terms = term_gradients(policy, update, budget=budget)
    step = assemble_step(policy, update, weights, ascent, terms)
    found = [tuple(np.zeros(n) for n in update.num_tokens)] * len(QUANTITIES)
    for i, (name, normalisation) in enumerate(QUANTITIES[: 1 + (rule.price > 0)]):
        quantity = make_quantity(name, probe, normalisation=normalisation)
        bound = bind_quantity(
            policy, probe, quantity, direction=step.direction, baseline=BASELINE, budget=budget
        )
        slope = probe_gradient(policy, probe, bound, max_groups=1, errors=False, budget=budget)
        u = vectors.multiply(step.metric(), slope.mean())
        one = {n: t.unsqueeze(0) for n, t in u.items()}
        found[i] = update.rows(token_products(policy, step, one, np.ones((1, 1)), budget=budget)[0])
    return found[0], found[1]

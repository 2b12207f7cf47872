"""Influence of every token on entropy and on reward before the step is taken, for an objective to act on.

Training calls it before each optimizer step, and the reconstruction of a step from a checkpoint calls it
again: the same probe batch, hence the same tokens chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.change.online import BASELINE
from stepscope.measure.influence.probe_gradient import bind_quantity, probe_gradient
from stepscope.measure.step.reconstruct import assemble_step, weighted_logprobs
from stepscope.measure.step.terms import term_gradients
from stepscope.policy import vectors
from stepscope.policy.gradients import directional_derivative, gradient, response_logprob
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.rules import InfluenceClipping
from stepscope.tasks import Task

QUANTITIES = (("entropy", "per_token"), ("reward", "per_seq"))


def token_influences(
    policy: Policy,
    update: Rollouts,
    task: Task,
    *,
    logprobs: Sequence[FloatArray] | None = None,
    budget: Budget = Budget(),
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    """Influence of each token of a batch on entropy per token and expected reward, on policy, per unit of lr.

    w_ik (u . grad l_ik) with u = P grad F, where w are the token weights of the loss without the objective, P
    is AdamW's preconditioner in the step that they make, and grad F is estimated on one fresh response to
    each of the objective's ``num_prompts`` prompts of the training split. Costs a gradient of the batch,
    sampling, two gradients of the probe batch, and two forward-mode passes over the batch; a third less where
    the objective's price is 0, since the reward is left out then.

    Args:
        policy: with AdamW's state; its settings have the objective ``influence``, and their seed and its
            step number seed the probe batch.
        update: the batch that makes the step.
        task: where probe prompts and rewards come from.
        logprobs: log-probs of the policy now, where it is not the one that sampled.
        budget: what may be used at a time.

    Returns:
        Influences on entropy (nats per token) and on reward (zeros at price 0), each one (tok,) array per
        sequence.

    Raises:
        MeasurementError: the settings have another objective.
    """
    objective = policy.settings.objective
    if not isinstance(objective, InfluenceClipping):
        raise MeasurementError(
            f"token influences belong to the objective influence, got {objective!r}; use measure.influence"
        )
    weights = token_weights(update, replace(policy.settings, objective=None), logprobs=logprobs)
    seed = int(np.random.SeedSequence([policy.settings.seed, policy.step, 2]).generate_state(1)[0])
    probe = sample_rollouts(policy, task, num_prompts=objective.num_prompts, group_size=1, seed=seed)
    ascent = gradient(policy, update, weighted_logprobs(weights), budget=budget)
    terms = term_gradients(policy, update, budget=budget)
    step = assemble_step(policy, update, weights, ascent, terms)
    found = [tuple(np.zeros(n) for n in update.num_tokens)] * len(QUANTITIES)
    for i, (name, normalisation) in enumerate(QUANTITIES[: 1 + (objective.price > 0)]):
        bound = bind_quantity(
            policy,
            probe,
            name,
            direction=step.direction,
            normalisation=normalisation,
            baseline=BASELINE,
            budget=budget,
        )
        slope = probe_gradient(policy, probe, bound, max_groups=1, errors=False, budget=budget)
        u = vectors.multiply(step.preconditioner, slope.mean())
        along = directional_derivative(policy, update, response_logprob, u, budget=budget)
        found[i] = tuple(w * d.double().cpu().numpy() for w, d in zip(weights, along, strict=True))
    return found[0], found[1]


def objective_influences(
    policy: Policy, update: Rollouts, task: Task, *, budget: Budget = Budget()
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]] | None:
    """What the objective ``influence`` looked at before this checkpoint's next step; None for all others.

    Args:
        policy: with AdamW's state.
        update: the batch that makes the step, sampled by the policy.
        task: of the training.
        budget: what may be used at a time.
    """
    if not isinstance(policy.settings.objective, InfluenceClipping):
        return None
    return token_influences(policy, update, task, budget=budget)

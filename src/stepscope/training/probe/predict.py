"""The first half of a probe: what the step under way will do, from its own gradient and a probe batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepscope.measure.change.online import BASELINE, Prediction, predict_change
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import response_text
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Rollouts
from stepscope.stats import Estimate, clustered_mean
from stepscope.training.probe.batch import noise_of_batch, products_of_batch
from stepscope.training.watching.capture import Captured, as_rollouts


@dataclass
class Pending:
    """A probe between the two sides of a step."""

    prediction: Prediction
    figures: dict[str, Estimate]
    tokens: dict[str, list[Any]]
    grad_norm: float
    seconds: float = 0.0


def predict(
    policy: Policy,
    probe: Rollouts,
    captured: list[Captured],
    args: Any,
    *,
    gradient: ParameterVector,
    noise: bool,
    top_tokens: int,
    budget: Budget,
) -> Pending:
    """The change by each part of the step, the noise scale of its batch, and its strongest tokens.

    Args:
        policy: before the step, with the optimizer's state.
        probe: samples of the policy.
        captured: the sequences of the step.
        args: of the trainer.
        gradient: that the optimizer gets, held as the policy's parameters are.
        noise: compute the noise scale.
        top_tokens: tokens to record.
        budget: what may be used at a time.
    """
    assert policy.optimizer is not None
    state = policy.optimizer
    with _alone(policy, set(state.names)):
        lr = next(g.lr for g in state.groups if g.names and g.lr > 0)
        ascent = {n: -g for n, g in gradient.items() if n in policy.parameters}
        made = state.update(policy.parameters, ascent, clip=1.0, lr=lr)
        batch = made.made_of(ascent)
        prediction = predict_change(
            policy,
            {**made.parts, "batch": batch},
            probe,
            lr=lr,
            budget=budget,
        )
        norm = vectors.norm(ascent)
        pending = Pending(prediction, {"reward": _mean_reward(probe)}, {}, norm)
        if not noise and not top_tokens:
            return pending
        update = as_rollouts(
            captured,
            policy.tokenizer,
            response_text(policy),
            temperature=policy.settings.temperature,
            max_response_tokens=policy.settings.max_response_tokens,
        )
        weights = tuple(sequence.weights for sequence in captured)
        products = products_of_batch(
            policy, update, weights, replace(budget, max_sequences=args.per_device_train_batch_size)
        )
        if noise:
            pending.figures["noise_scale"] = noise_of_batch(products, update, norm, args.max_grad_norm)
        if top_tokens and norm > 0:
            scale = norm / math.sqrt(products.sum())
            step = Step(
                components={**made.parts, "sequences": batch},
                preconditioner=made.preconditioner,
                ascent=vectors.scale(ascent, 1 / scale),
                token_weights=tuple(scale * w for w in weights),
                lr=lr,
                grad_norm=norm / scale,
                clip_coefficient=scale,
                update=update,
            )
            pending.tokens = _strongest_tokens(policy, step, probe, count=top_tokens, budget=budget)
        return pending


@contextmanager
def _alone(policy: Policy, moved: set[str]) -> Iterator[None]:
    """Inside the block the parameters that the optimizer moves are the trainable ones."""
    others = [p for name, p in policy.parameters.items() if name not in moved]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _mean_reward(probe: Rollouts) -> Estimate:
    """Mean reward of the graded responses."""
    graded = ~np.isnan(probe.rewards)
    if not graded.any():
        nan = float("nan")
        return Estimate(nan, nan, 0, "reward", "mean", reliable=False, reason="the responses are not graded")
    index = np.asarray(probe.prompt_index)[graded]
    return clustered_mean(probe.rewards[graded], index, unit="reward", method="mean over probe responses")


def _strongest_tokens(
    policy: Policy, step: Step, probe: Rollouts, *, count: int, budget: Budget
) -> dict[str, list[Any]]:
    """The tokens of the update batch with the largest influence on the probe's entropy."""
    assert policy.optimizer is not None
    shares = influence(
        policy,
        step,
        step.update,
        probe,
        through=policy.optimizer.throughs[0],
        options=InfluenceOptions(baseline=BASELINE, num_folds=1),
        budget=budget,
    )
    rows, columns = step.update.places
    values = step.lr * step.update.flat(shares.tokens)
    chosen = np.argsort(-np.abs(values), kind="stable")[:count]
    places = [(int(rows[i]), int(columns[i])) for i in chosen]
    ids = [step.update.response_token_ids[i][k] for i, k in places]
    read = response_text(policy)
    texts = {i: read.by_token(step.update.response_token_ids[i]) for i in {i for i, _ in places}}
    return {
        "prompt": [step.update.prompts[i] for i, _ in places],
        "response": [step.update.responses[i] for i, _ in places],
        "position": [k for _, k in places],
        "token_id": ids,
        "token": [texts[i][k] for i, k in places],
        "influence": values[chosen].tolist(),
        "token_weight": [float(step.token_weights[i][k]) for i, k in places],
        "logprob": [float(step.update.logprobs[i][k]) for i, k in places],
        "entropy": [float(step.update.entropies[i][k]) for i, k in places],
    }

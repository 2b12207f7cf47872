"""Steps taken again without some tokens: against entries, real training steps and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_ledger import (
    Trained,
    Vector,
    accounted,
    exact_gradients,
    exact_values,
    gains_at,
    trained,
)

import cases
from stepscope.measure.ledger.path import PathStep, knot_weights, knots
from stepscope.measure.ledger.without import Scores, Shifted, apart, held_paths, reweighted_path
from stepscope.policy import vectors
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.surrogate import policy_loss
from stepscope.policy.recorded import TrainingState
from stepscope.policy.state import Policy
from stepscope.policy.vectors import placed
from stepscope.results import BoolArray, Rollouts

SMALL = 1e-4


def chosen(step: PathStep, scores: Scores | None) -> list[BoolArray]:
    """Every token 2 or 3, of which each batch has some."""
    return of_batch(step.update)


def of_batch(update: Rollouts) -> list[BoolArray]:
    return [np.isin(np.asarray(ids), (2, 3)) for ids in update.response_token_ids]


def begun(path: Trained) -> TrainingState:
    start = path.start
    return TrainingState(path.parameters(0), start.exp_avg, start.exp_avg_sq, start.steps)


def held(policy: Policy, path: Trained, doses: Sequence[float]) -> list[list[TrainingState]]:
    """(dose, step) states."""
    found = held_paths(policy, path, begun(path), chosen, doses)
    return [[shifted.state for shifted in row] for row in zip(*found, strict=True)]


def ascending(update: Rollouts, dose: float) -> torch.Tensor:
    """(seq, tok) advantages, less on the tokens of the rule."""
    width = int(update.num_tokens.max())
    made = np.zeros((len(update), width))
    for i, own in enumerate(of_batch(update)):
        made[i, : len(own)] = update.advantages[i] * np.where(own, 1 - dose, 1.0)  # type: ignore[index]
    return torch.from_numpy(made)


def again(policy: Policy, path: Trained, dose: float, weigh: Any = None) -> list[Vector]:
    """Parameters after each step of a real training on the same batches: loss, torch's clip and AdamW."""
    params = {n: p.detach().clone().requires_grad_() for n, p in path.parameters(0).items()}
    first = path.steps[0].taken.state
    optimizer = torch.optim.AdamW(
        [
            {"params": [params[n] for n in g.names], "betas": g.betas, "weight_decay": g.weight_decay}
            for g in first.groups
        ],
        eps=first.groups[0].eps,
    )
    for n, p in params.items():
        optimizer.state[p] = {
            "step": torch.tensor(float(path.start.steps[n])),
            "exp_avg": path.start.exp_avg[n].clone(),
            "exp_avg_sq": path.start.exp_avg_sq[n].clone(),
        }
    found = []
    for step in path.steps:
        update = step.update
        tokens = make_batch(update.prompt_token_ids, update.response_token_ids)
        now = forward(policy.model, tokens, temperature=update.temperature, params=params)
        advantage = ascending(update, dose)
        if weigh is not None:
            advantage = advantage * weigh(now.logprobs.detach(), tokens, update)[:, None]
        loss = policy_loss(
            now.logprobs, now.logprobs.detach(), advantage, tokens.response_mask, policy.settings
        )
        optimizer.zero_grad()
        loss.backward()
        for group, own in zip(optimizer.param_groups, step.taken.state.groups, strict=True):
            group["lr"] = own.lr
        torch.nn.utils.clip_grad_norm_([*params.values()], policy.settings.max_grad_norm)
        optimizer.step()
        found.append({n: p.detach().clone() for n, p in params.items()})
    return found


def value_at(policy: Policy, path: Trained, theta: Vector) -> float:
    """The exact entropy."""
    return exact_values(policy, replace(path, thetas=[theta], steps=[]), "entropy")[0]


def test_without_a_dose_it_is_the_training_itself() -> None:
    policy, path = trained(5)
    (states,) = held(policy, path, [0.0])
    others = [s.state for s in reweighted_path(policy, path, begun(path), chosen, 0.0)]
    for place, (a, b) in enumerate(zip(states, others, strict=True), 1):
        assert apart(a.parameters, path.parameters(place)) < 1e-12
        assert apart(b.parameters, path.parameters(place)) < 1e-12
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    list(held_paths(policy, path, begun(path), chosen, [1.0]))
    assert all(torch.equal(before[n], p) for n, p in policy.parameters.items())


@pytest.mark.parametrize("quantity", ["entropy", "reward"])
def test_the_derivative_of_held_steps_is_the_sum_of_the_entries(quantity: str) -> None:
    """By central differences in the dose: what the rule's entries through the optimizer add up to."""
    policy, path = trained(5)
    found, _ = accounted(policy, path, quantity, through="optimizer")
    entries = sum(
        float(e.whole[0][np.concatenate(of_batch(step.update))].sum())
        for e, step in zip(found, path.steps, strict=True)
    )
    gradients = exact_gradients(policy, path, quantity, knots(len(path), 1))
    weights = knot_weights(len(path), knots(len(path), 1))
    sums = []
    for states in held(policy, path, [SMALL, -SMALL]):
        thetas = [path.parameters(0), *(state.parameters for state in states)]
        total = 0.0
        for place in range(len(path)):
            moved = {n: thetas[place + 1][n] - thetas[place][n] for n in thetas[0]}
            decay = path.step(place).taken.decay(thetas[place])
            pure = {n: moved[n] - decay[n] for n in moved}  # later decay is not followed by an entry
            total += float(vectors.stack_dots(gains_at(gradients, weights, place), pure)[0])
        sums.append(total)
    assert -(sums[0] - sums[1]) / (2 * SMALL) == pytest.approx(entries, rel=1e-6)
    assert abs(entries) > 1e-4


def slopes(rate: float) -> tuple[float, float]:
    """d entropy/d dose at the end: of a real training on the same batches, and of held gradients."""
    policy, path = trained(5, rate)
    ends = [again(policy, path, dose)[-1] for dose in (SMALL, -SMALL)]
    real = (value_at(policy, path, ends[0]) - value_at(policy, path, ends[1])) / (2 * SMALL)
    a, b = (states[-1].parameters for states in held(policy, path, [SMALL, -SMALL]))
    return real, (value_at(policy, path, dict(a)) - value_at(policy, path, dict(b))) / (2 * SMALL)


def test_a_real_training_on_the_same_batches_answers_as_predicted_while_paths_are_close() -> None:
    """What held gradients leave out falls with the length of the path, and nothing else is left out."""
    gaps = []
    for rate in (0.01, 0.005):
        real, predicted = slopes(rate)
        gaps.append(abs(real - predicted) / abs(real))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.15)
    assert gaps[1] < 0.02


@cache
def real_training() -> list[Vector]:
    policy, path = trained(5)
    return again(policy, path, 0.0)


def test_the_test_s_own_training_is_the_one_on_the_path() -> None:
    _, path = trained(5)
    for place, theta in enumerate(real_training(), 1):
        assert apart(theta, path.parameters(place)) < 1e-12


@pytest.mark.parametrize("dose", [0.5, 1.0])
def test_reweighted_steps_are_those_of_a_training_with_these_weights(dose: float) -> None:
    """Each response's loss times pi_shifted/pi of the response, by torch's own autograd, clip and AdamW."""
    policy, path = trained(5)
    shares: list[float] = []

    def weigh(now: torch.Tensor, tokens: Any, update: Rollouts) -> torch.Tensor:
        then = tokens.pad(update.logprobs, now)
        ratio = ((now - then) * tokens.response_mask).sum(1).exp()
        shares.append(float(ratio.mean() ** 2 / (ratio**2).mean()))
        return ratio / ratio.mean()

    real = again(policy, path, dose, weigh)
    found = list(reweighted_path(policy, path, begun(path), chosen, dose))
    for shifted, theta, place in zip(found, real, range(1, 6), strict=True):
        assert apart(shifted.state.parameters, theta) < 1e-10
        assert apart(theta, path.parameters(place)) > 1e-4
    assert found[0].effective == pytest.approx(1.0)
    assert found[-1].effective < 0.99
    np.testing.assert_allclose([s.effective for s in found], np.minimum.accumulate(shares), rtol=1e-9)


def test_what_the_shifted_policy_says_of_its_tokens_decides_which_are_left_out() -> None:
    policy, path = trained(3)
    seen: list[Scores] = []

    def rare(step: PathStep, scores: Scores | None) -> list[BoolArray]:
        assert scores is not None
        seen.append(scores)
        return [row + own < 0 for row, own in zip(*scores, strict=True)]

    states: list[Shifted] = list(reweighted_path(policy, path, begun(path), rare, 1.0))
    for place, scores in enumerate(seen):
        theta = path.parameters(0) if place == 0 else states[place - 1].state.parameters
        with placed(policy.parameters, theta):
            other = cases.scored(policy, path.steps[place].update)
        np.testing.assert_allclose(np.concatenate(scores[0]), np.concatenate(other.logprobs), rtol=1e-12)
        np.testing.assert_allclose(np.concatenate(scores[1]), np.concatenate(other.entropies), rtol=1e-12)

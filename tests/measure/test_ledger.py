"""The ledger on policies whose responses can all be listed: against the realised change, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy
from stepscope.measure.ledger.adjoint import Adjoint, TakenStep
from stepscope.measure.ledger.entries import Entries, step_entries
from stepscope.measure.ledger.path import (
    PathStep,
    knot_weights,
    knots,
    parts_along,
)
from stepscope.policy import vectors
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.advantages import advantages
from stepscope.policy.loss.surrogate import entropy_weights, policy_loss, token_weights
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.optim.base import Through
from stepscope.policy.state import Policy
from stepscope.policy.vectors import placed
from stepscope.reference import exact_gradient, exact_rollouts, exact_value
from stepscope.results import FloatArray, Rollouts
from stepscope.rules import EntropyBonus

Vector = dict[str, Tensor]
ONE = np.ones((1, 1))
NORMALISATION = {"entropy": "per_token", "reward": "per_seq", "length": "per_seq"}


@dataclass
class Trained:
    """A training that ``torch.optim.AdamW`` ran, kept in memory."""

    thetas: list[Vector]
    steps: list[PathStep]
    start: AdamWState

    def __len__(self) -> int:
        return len(self.steps)

    def parameters(self, place: int) -> Vector:
        return self.thetas[place]

    def step(self, place: int) -> PathStep:
        return self.steps[place]

    def first_moment(self) -> tuple[Vector, Mapping[str, int]]:
        return dict(self.start.exp_avg), self.start.steps


def update_batch(policy: Policy, seed: int) -> Rollouts:
    """Responses of random tokens to the prompts, with random advantages, scored by the policy as it is."""
    rng = np.random.default_rng(seed)
    prompts = [PROMPTS[i % 2] for i in range(4)]
    responses = [rng.integers(1, 5, rng.integers(1, 4)).tolist() for _ in prompts]
    rewards = rng.random(4)
    drawn = cases.rollouts(
        prompts,
        responses,
        rewards=rewards,
        temperature=policy.settings.temperature,
        max_response_tokens=3,
        advantages=advantages(rewards, np.arange(4) % 2, policy.settings.scale_rewards),
    )
    return cases.scored(policy, drawn)


def take_step(policy: Policy, optimizer: torch.optim.Optimizer, update: Rollouts) -> float:
    """Loss, bonus, backward, clip, step."""
    tokens = make_batch(update.prompt_token_ids, update.response_token_ids)
    now = forward(policy.model, tokens, temperature=update.temperature)
    advantage = torch.as_tensor(update.advantages)
    loss = policy_loss(now.logprobs, now.logprobs.detach(), advantage, tokens.response_mask, policy.settings)
    if bonus := entropy_weights(update, policy.settings):
        loss = loss - (tokens.pad(bonus, now.entropies) * now.entropies).sum()
    optimizer.zero_grad()
    loss.backward()
    return cases.clipped_step(policy, optimizer)


@cache
def trained(
    count: int,
    rate: float = 1.0,
    *,
    before: int = 2,
    limit: float = 0.3,
    bonus: float = 0.0,
    lora: bool = False,
) -> tuple[Policy, Trained]:
    """``count`` steps after ``before`` others; two groups, the first with decay, rates that change."""
    policy = enumerable_policy(lora=lora)
    rule = EntropyBonus(coefficient=bonus) if bonus else None
    settings = replace(policy.settings, max_grad_norm=limit, group_size=2, objective=rule)
    policy = replace(policy, settings=settings)
    params = policy.parameters
    large = tuple(n for n, p in params.items() if ("lora_A" in n if lora else p.dim() > 1))
    groups = (
        AdamWGroup(large, lr=1e-2 * rate, weight_decay=0.1, betas=(0.9, 0.95)),
        AdamWGroup(tuple(n for n in params if n not in large), lr=4e-3 * rate, betas=(0.8, 0.99)),
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [params[n] for n in g.names], "weight_decay": g.weight_decay, "betas": g.betas}
            for g in groups
        ],
        eps=1e-4,
    )
    thetas, steps = [], []
    start = None
    for t in range(before + count):
        now = replace(policy, step=t)
        update = update_batch(now, t)
        theta = {n: p.detach().clone() for n, p in params.items()}
        for own, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] = own.lr * (1 + 0.5 * np.sin(t))
        if t == before:
            start = state_of(optimizer, params, groups)
        weights = token_weights(update, settings)
        norm = take_step(now, optimizer, update)
        if t < before:
            continue
        taken = TakenStep(
            state=state_of(optimizer, params, groups),
            clip=min(1.0, limit / (norm + 1e-6)) if limit else 1.0,
            max_norm=limit,
        )
        thetas.append(theta)
        steps.append(
            PathStep(
                number=t + 1,
                taken=taken,
                update=update,
                token_weights=tuple(weights),
                entropy_weights=entropy_weights(update, settings) or None,
            )
        )
    thetas.append({n: p.detach().clone() for n, p in params.items()})
    assert start is not None
    return policy, Trained(thetas, steps, start)


def state_of(
    optimizer: torch.optim.AdamW, params: dict[str, Any], groups: Sequence[AdamWGroup]
) -> AdamWState:
    state = {n: optimizer.state[p] for n, p in params.items()}
    return AdamWState(
        groups=tuple(
            replace(g, lr=float(own["lr"]), eps=own["eps"])
            for g, own in zip(groups, optimizer.param_groups, strict=True)
        ),
        exp_avg={n: s["exp_avg"].clone() for n, s in state.items()},
        exp_avg_sq={n: s["exp_avg_sq"].clone() for n, s in state.items()},
        steps={n: int(s["step"]) for n, s in state.items()},
    )


def exact_gradients(policy: Policy, path: Trained, quantity: str, places: Sequence[int]) -> dict[int, Vector]:
    found = {}
    for place in places:
        with placed(policy.parameters, path.parameters(place)):
            listed, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
            found[place] = exact_gradient(policy, listed, quantity, normalisation=NORMALISATION[quantity])
    return found


def exact_values(policy: Policy, path: Trained, quantity: str) -> list[float]:
    listed, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    with torch.no_grad():
        return [
            float(
                exact_value(
                    policy, listed, quantity, params=path.parameters(i), normalisation=NORMALISATION[quantity]
                )
            )
            for i in (0, len(path))
        ]


def gains_at(gradients: dict[int, Vector], weights: FloatArray, place: int) -> Vector:
    made = [vectors.scale(g, float(w)) for g, w in zip(gradients.values(), weights[:, place], strict=True)]
    return {n: t.unsqueeze(0) for n, t in vectors.add(*made).items()}


def accounted(
    policy: Policy, path: Trained, quantity: str = "entropy", *, through: Through = "fixed", every: int = 1
) -> tuple[list[Entries], dict[str, float]]:
    """Entries of all steps, the first step first; and the parts of the change along the path."""
    places = knots(len(path), every)
    gradients = exact_gradients(policy, path, quantity, places)
    weights = knot_weights(len(path), places)
    after, found = Adjoint(), []
    for place in reversed(range(len(path))):
        entries, after = step_entries(
            policy, path, place, gains_at(gradients, weights, place), after, shares=ONE, through=through
        )
        found.append(entries)
    return found[::-1], along(path, gradients, weights)


def along(path: Trained, gradients: dict[int, Vector], weights: FloatArray) -> dict[str, float]:
    """The change along the path, and the parts of it that belong to no batch."""
    sums = parts_along(path, [dict(enumerate(row)) for row in weights])
    return {
        name: sum(vectors.dot(g, s[name]) for g, s in zip(gradients.values(), sums, strict=True))
        for name in sums[0]
    }


def closing_error(policy: Policy, path: Trained, quantity: str, every: int = 1) -> tuple[float, float]:
    """Realised less predicted change, and the realised one."""
    places = knots(len(path), every)
    gradients = exact_gradients(policy, path, quantity, places)
    before, after = exact_values(policy, path, quantity)
    whole = along(path, gradients, knot_weights(len(path), places))["whole"]
    return after - before - whole, after - before


def predicted(found: Sequence[Entries], parts: dict[str, float]) -> float:
    batches = sum(float(e.whole.sum() + e.bonus.sum()) for e in found)
    return batches + parts["momentum_before"] + parts["decay"]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("quantity", ["entropy", "reward"])
def test_parts_add_up_to_the_sum_along_the_path(quantity: str, every: int) -> None:
    """Tokens, the moment before, and decay against the displacements that torch made."""
    policy, path = trained(5)
    clips = [s.taken.clip for s in path.steps]
    assert 0.05 < min(clips) < 0.9
    found, parts = accounted(policy, path, quantity, every=every)
    assert predicted(found, parts) == pytest.approx(parts["whole"], rel=1e-9)
    assert min(abs(parts[n]) for n in ("momentum_before", "decay")) > 1e-3 * abs(parts["whole"])


def test_a_bonus_has_its_own_place() -> None:
    policy, path = trained(4, bonus=0.05)
    found, parts = accounted(policy, path)
    assert predicted(found, parts) == pytest.approx(parts["whole"], rel=1e-9)
    assert all(float(e.bonus[0]) > 0 for e in found)


@pytest.mark.parametrize(
    ("count", "quantity"), [(5, "entropy"), (5, "reward"), (5, "length"), (20, "length")]
)
def test_the_closing_error_falls_as_the_step_cubed(count: int, quantity: str) -> None:
    errors, changes = zip(
        *(closing_error(*trained(count, rate), quantity) for rate in (0.01, 0.005)), strict=True
    )
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    assert abs(errors[1]) < 1e-4 * abs(changes[1])


def test_the_error_of_knots_apart_falls_as_their_distance_squared() -> None:
    """So that a third of the difference to half as many knots says how large it is."""
    policy, path = trained(8, 0.02)
    errors = [closing_error(policy, path, "entropy", every)[0] for every in (1, 2, 4)]
    assert abs(errors[0]) < 0.1 * abs(errors[1])
    assert errors[2] / errors[1] == pytest.approx(4, rel=0.1)


def realised_derivatives(
    policy: Policy, path: Trained, quantity: str, *, through: Through
) -> tuple[list[FloatArray], float]:
    """w dR/dw of every token by automatic differentiation, and R; the steps are AdamW's, written out."""
    listed, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    moments = {n: -m for n, m in path.start.exp_avg.items()}
    squares = dict(path.start.exp_avg_sq)
    leaves: list[Tensor] = []
    total: Any = 0.0

    def value(params: Vector) -> Tensor:
        return exact_value(policy, listed, quantity, params=params, normalisation=NORMALISATION[quantity])

    for place, step in enumerate(path.steps):
        theta, ended = path.parameters(place), path.parameters(place + 1)
        jacobian = token_gradients(policy, theta, step.update)
        weights = torch.tensor(step.update.flat(step.token_weights), requires_grad=True)
        leaves.append(weights)
        ascent = {n: torch.tensordot(weights, j, 1) for n, j in jacobian.items()}
        norm = torch.stack([(a**2).sum() for a in ascent.values()]).sum().sqrt()
        clip: Any = step.taken.max_norm / (norm + 1e-6)
        if step.taken.clip == 1.0 or through == "fixed":
            clip = step.taken.clip
        moved = {}
        for name, group, count in step.taken.places:
            (b1, b2) = group.betas
            x = clip * ascent[name]
            moments[name] = b1 * moments[name] + (1 - b1) * x
            held = x.detach() if through == "fixed" else x
            squares[name] = b2 * squares[name] + (1 - b2) * held**2
            there = squares[name] > 0  # a token that no batch has gets no gradient, whatever the weights
            root = torch.where(there, torch.where(there, squares[name], 1.0).sqrt(), 0.0)
            divisor = root / (1 - b2**count) ** 0.5 + group.eps
            moved[name] = group.lr * moments[name] / (1 - b1**count) / divisor
            moved[name] = moved[name] - group.lr * group.weight_decay * theta[name]
        forth = value({n: theta[n] + d for n, d in moved.items()}) - value(theta)
        back = value(ended) - value({n: ended[n] - d for n, d in moved.items()})
        total = total + (forth + back) / 2
    grads = torch.autograd.grad(total, leaves)
    return [(w * g).detach().numpy() for w, g in zip(leaves, grads, strict=True)], float(total.detach())


def token_gradients(policy: Policy, theta: Vector, update: Rollouts) -> Vector:
    """(tok, ...) gradients of the log-probs of a batch's tokens, one backward pass each."""
    batch = make_batch(update.prompt_token_ids, update.response_token_ids)
    leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
    found = forward(policy.model, batch, temperature=update.temperature, params=leaves).logprobs
    rows = [
        torch.autograd.grad(x, list(leaves.values()), retain_graph=True) for x in found[batch.response_mask]
    ]
    return {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(leaves)}


@pytest.mark.parametrize("through", ["fixed", "optimizer"])
@pytest.mark.parametrize(
    ("count", "quantity", "lora"),
    [(5, "entropy", False), (5, "reward", False), (20, "entropy", False), (5, "entropy", True)],
)
def test_entries_are_derivatives_of_the_realised_change(
    count: int, quantity: str, lora: bool, through: Through
) -> None:
    """Every token of every step, to 1e-8 of the largest; R is the realised change. An adapter's as well."""
    policy, path = trained(count, lora=lora)
    assert all(("lora" in name) == lora for name in path.thetas[0])
    found, _ = accounted(policy, path, quantity, through=through)
    exact, total = realised_derivatives(policy, path, quantity, through=through)
    before, after = exact_values(policy, path, quantity)
    assert total == pytest.approx(after - before, rel=1e-8)
    scale = max(float(np.abs(e).max()) for e in exact)
    worst = max(float(np.abs(f.whole[0] - e).max()) for f, e in zip(found, exact, strict=True)) / scale
    assert worst < 1e-8
    assert all(np.abs(e).max() > 1e-4 * scale for e in exact)
    np.testing.assert_allclose(found[-1].whole, found[-1].own, rtol=1e-12)
    assert np.abs(found[0].whole - found[0].own).max() > 0.1 * np.abs(found[0].whole).max()

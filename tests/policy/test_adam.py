"""torch's Adam with its decay inside the gradient, and AdamW's implementations, each against its own step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.influence.attribution import InfluenceOptions, influences
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.lifetime import lifetime
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.adamw import AdamState, AdamWState
from stepscope.policy.optim.registry import kind_of, recognised
from stepscope.policy.state import Policy
from stepscope.training.probe.state import optimizer_state

KINDS: list[tuple[type[torch.optim.Adam], dict[str, Any]]] = [
    (torch.optim.Adam, {"weight_decay": 0.3}),
    (torch.optim.Adam, {"weight_decay": 0.3, "amsgrad": True, "foreach": True}),
    (torch.optim.Adam, {"weight_decay": 0.3, "fused": True}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "amsgrad": True, "fused": True}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "foreach": True}),
]


def trained(
    kind: Any, options: dict[str, Any], *, max_grad_norm: float
) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after real steps in two groups with their own lr, and its state by name."""
    policy = cases.policy(max_grad_norm=max_grad_norm)
    params = list(policy.parameters.values())
    groups = [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() == 1], "lr": 2e-3, "weight_decay": 0.0},
    ]
    optimizer = kind(groups, **{"lr": 1e-3, **options})
    for seed in range(3):
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))
    saved = copy.deepcopy(optimizer.state_dict())
    return replace(policy, optimizer=match_optimizer(saved, policy.model, where="here")), optimizer


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_step_is_that_of_torch(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, optimizer = trained(kind, options, max_grad_norm=max_grad_norm)
    state, live = policy.optimizer, optimizer_state(optimizer, policy.model, after_backward=False)
    inside = kind is torch.optim.Adam
    assert type(state) is type(live) is (AdamState if inside and "weight_decay" in options else AdamWState)
    assert kind_of(optimizer) is (AdamState if inside else AdamWState)
    step = cases.step(policy, seed=9)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    copies = {name: nn.Parameter(p.clone()) for name, p in before.items()}
    for name, p in copies.items():
        p.grad = -step.clip_coefficient * step.ascent[name]
    cases.take_step(policy, optimizer, step.update)
    state.take(copies, scale=1.0, lr=step.lr)
    for name, p in policy.parameters.items():
        moved = (p.detach() - before[name]) / step.lr
        torch.testing.assert_close(step.direction[name], moved, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(copies[name].detach(), p.detach(), rtol=1e-10, atol=1e-12)


def test_parts_of_a_step_with_the_decay_inside() -> None:
    """Each part is what of the step is proportional to it, at the second moment as it is after the step."""
    policy, _ = trained(*KINDS[0], max_grad_norm=0.02)
    state = policy.optimizer
    assert isinstance(state, AdamState)
    step = cases.step(policy, seed=9)
    for group in state.groups:
        b1, b2 = group.betas
        for name in group.names:
            t, theta = state.steps[name] + 1, policy.parameters[name].detach()
            inside = group.weight_decay * theta
            g = -step.clip_coefficient * step.ascent[name] + inside
            v = b2 * state.exp_avg_sq[name] + (1 - b2) * g**2
            scale = -group.lr / step.lr / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group.eps)
            expected = {
                "momentum": scale * b1 * state.exp_avg[name],
                "decay": scale * (1 - b1) * inside,
                "sequences": scale * (1 - b1) * (g - inside),
            }
            for part, value in expected.items():
                torch.testing.assert_close(step.components[part][name], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("kind", "options"), KINDS[:2])
def test_its_derivative_is_that_of_its_step(kind: Any, options: dict[str, Any]) -> None:
    policy, _ = trained(kind, options, max_grad_norm=0.02)
    state = policy.optimizer
    assert state is not None
    step = cases.step(policy, seed=9)
    change = {n: torch.randn(p.shape, dtype=p.dtype) * p.std() for n, p in step.ascent.items()}

    def direction(by: float) -> dict[str, Tensor]:
        ascent = vectors.add(step.ascent, vectors.scale(change, by))
        clip = min(1.0, 0.02 / (vectors.norm(ascent) + 1e-6))
        made = state.update(policy.parameters, ascent, clip=clip, lr=step.lr)
        return vectors.add(made.made_of(ascent), *made.parts.values())

    up, down = direction(1e-6), direction(-1e-6)
    for name, value in step_derivative(policy, step, "optimizer").along(change).items():
        expected = (up[name] - down[name]) / 2e-6
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_its_steps_are_attributed() -> None:
    policy, _ = trained(*KINDS[0], max_grad_norm=0.02)
    step = cases.step(policy, num_prompts=2, group_size=3)
    probe = cases.batch(policy, num_prompts=3, group_size=2, seed=5)
    fixed, _ = influences(policy, step, step.update, probe, options=InfluenceOptions(baseline="none"))
    whole = fixed.sequences.sum() + sum(part.value for part in fixed.components.values())
    assert whole == pytest.approx(fixed.total.value, rel=1e-9)
    found = lifetime(policy, step)
    assert found is not None
    ages = [0.9**j * (1 - 0.9**4) / (1 - 0.9 ** (4 + j)) for j in range(10)]
    assert found.effect[10] == pytest.approx(sum(ages))


def test_groups_with_both_decays_are_refused() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in layer.parameters()], lr=1e-3, weight_decay=0.1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][1]["decoupled_weight_decay"] = False
    with pytest.raises(CheckpointError, match="in the gradient in some groups and beside it in others"):
        recognised(saved, "here")

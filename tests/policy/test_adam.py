"""torch's Adam with its decay inside the gradient, and AdamW's implementations, each against its own step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cases
import real_steps
from stepscope.errors import CheckpointError
from stepscope.measure.influence.attribution import InfluenceOptions, influences
from stepscope.measure.step.lifetime import lifetime
from stepscope.policy.optim.adamw import AdamState, AdamWState
from stepscope.policy.optim.registry import kind_of, recognised
from stepscope.policy.state import Policy
from stepscope.training.watching.state import optimizer_state

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
    """A policy after real steps, with the optimizer's state."""
    policy = cases.policy(max_grad_norm=max_grad_norm)
    optimizer = kind(real_steps.two_groups(policy, lr=1e-3), **{"lr": 1e-3, **options})
    real_steps.train(policy, optimizer)
    return real_steps.matched(policy, optimizer), optimizer


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_step_is_that_of_torch(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, optimizer = trained(kind, options, max_grad_norm=max_grad_norm)
    live = optimizer_state(optimizer, policy.model, after_backward=False)
    inside = kind is torch.optim.Adam
    expected = AdamState if inside and "weight_decay" in options else AdamWState
    assert type(policy.optimizer) is type(live) is expected
    assert kind_of(optimizer) is (AdamState if inside else AdamWState)
    step = cases.step(policy, seed=9)
    taken = real_steps.taken_from_state(policy, step)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-8, atol=1e-10)
    for name, p in policy.parameters.items():
        torch.testing.assert_close(taken[name], p.detach(), rtol=1e-10, atol=1e-12)


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
    real_steps.assert_derivative_is_that_of_the_step(
        policy, cases.step(policy, seed=9), h=1e-6, rtol=1e-3, relative_atol=1e-5
    )


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

"""``torch.optim.SGD``: its next step, its derivative, and what becomes of a gradient in it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.lifetime import lifetime
from stepscope.measure.step.rounding import rounded_step
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.registry import kind_of
from stepscope.policy.optim.sgd import SGDState
from stepscope.policy.state import Policy
from stepscope.training.probe.state import optimizer_state

KINDS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3},
    {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.8, "nesterov": True, "foreach": True},
]


def trained(
    options: dict[str, Any], *, steps: int = 3, **settings: Any
) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after real steps; two groups with their own lr, one of them without decay."""
    policy = cases.policy(**settings)
    params = list(policy.parameters.values())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "lr": 0.1},
        {"params": [p for p in params if p.dim() == 1], "lr": 0.2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, **{"lr": 0.1, **options})
    for seed in range(steps):
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))
    return policy, optimizer


def matched(policy: Policy, optimizer: torch.optim.Optimizer) -> Policy:
    """With the optimizer's state; unnamed parameters without moments are in the order of the model."""
    saved = copy.deepcopy(optimizer.state_dict())
    names = {id(p): n for n, p in policy.model.named_parameters()}
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [names[id(p)] for p in live["params"]]
    return replace(policy, optimizer=match_optimizer(saved, policy.model, where="optimizer.pt"))


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", KINDS)
def test_the_step_is_that_of_torch(options: dict[str, Any], steps: int, max_grad_norm: float) -> None:
    policy, optimizer = trained(options, steps=steps, max_grad_norm=max_grad_norm)
    assert kind_of(optimizer) is SGDState
    state = optimizer_state(
        optimizer, policy.model, after_backward=False
    )  # before the first step there is no file
    policy = matched(policy, optimizer) if steps else replace(policy, optimizer=state)
    assert policy.optimizer is not None
    assert policy.optimizer.groups == state.groups
    step = cases.step(policy, seed=9)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    copies = {name: torch.nn.Parameter(p.clone()) for name, p in before.items()}
    for name, p in copies.items():
        p.grad = -step.clip_coefficient * step.ascent[name]
    cases.take_step(policy, optimizer, step.update)
    policy.optimizer.take(copies, scale=1.0, lr=step.lr)
    for name, p in policy.parameters.items():
        moved = (p.detach() - before[name]) / step.lr
        torch.testing.assert_close(step.direction[name], moved, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(copies[name].detach(), p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", KINDS)
def test_its_derivative_is_that_of_its_step(options: dict[str, Any]) -> None:
    policy, optimizer = trained(options, max_grad_norm=0.02)
    policy = matched(policy, optimizer)
    state = policy.optimizer
    assert state is not None
    step = cases.step(policy, seed=9)
    change = {n: torch.randn(p.shape, dtype=p.dtype) * p.std() for n, p in step.ascent.items()}

    def direction(by: float) -> dict[str, Tensor]:
        ascent = vectors.add(step.ascent, vectors.scale(change, by))
        clip = min(1.0, 0.02 / (vectors.norm(ascent) + 1e-6))
        made = state.update(policy.parameters, ascent, clip=clip, lr=step.lr)
        return vectors.add(made.made_of(ascent), *made.parts.values())

    found = step_derivative(policy, step, "optimizer").along(change)
    for name, value in found.items():
        expected = (direction(1e-5)[name] - direction(-1e-5)[name]) / 2e-5
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("options", KINDS)
def test_what_becomes_of_a_gradient_is_what_torch_makes_of_it(options: dict[str, Any], begun: bool) -> None:
    """A tiny further gradient in one step, over ten steps with the same gradients."""
    paths = []
    for further in (0.0, 1.0):
        p = torch.nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        optimizer = torch.optim.SGD([p], **{"lr": 0.1, **options})
        if begun:
            p.grad = torch.tensor([0.2], dtype=torch.float64)
            optimizer.step()
        state = optimizer_state(optimizer, torch.nn.ParameterDict({"p": p}), after_backward=False)
        paths.append([])
        for n in range(10):
            p.grad = torch.tensor([0.1 + further * (n == 0)], dtype=torch.float64)
            optimizer.step()
            paths[-1].append(float(p.detach()))
    moved = [b - a for a, b in zip(*paths, strict=True)]
    for n in (1, 2, 10):
        assert state.carried("p", n) == pytest.approx(moved[n - 1] / moved[0], rel=1e-9)


@pytest.mark.parametrize("options", KINDS)
def test_shares_by_arithmetic(options: dict[str, Any]) -> None:
    """Weights of a long series of gradients in one step, read off torch's own."""
    p = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], **{"lr": 0.1, **options, "weight_decay": 0.0})
    for gradient in torch.eye(200, dtype=torch.float64):  # each step's is that of a coordinate of its own
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
    weights = before - p.detach()
    state = optimizer_state(optimizer, torch.nn.ParameterDict({"p": p}), after_backward=False)
    white, same = state.own_shares("p")
    assert white == pytest.approx(float(weights[-1] ** 2 / (weights**2).sum()), rel=1e-6)
    assert same == pytest.approx(float(weights[-1] / weights.sum()), rel=1e-6)


def test_parameters_without_gradient_and_frozen_ones() -> None:
    policy = cases.policy()
    names = list(policy.parameters)
    policy.parameters[names[3]].requires_grad_(False)
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    idle = policy.parameters[names[5]]
    for seed in range(2):
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))
        idle.grad = None
    # matched by the shapes of the buffers alone, which frozen layers make ambiguous without names
    state = matched(policy, optimizer).optimizer
    assert state is not None
    assert names[3] not in state.names
    found = lifetime(replace(policy, optimizer=state), cases.step(replace(policy, optimizer=state), seed=4))
    assert found is not None
    assert found.white_noise_share == pytest.approx(0.19)


def test_in_bfloat16_the_step_is_taken_by_torch() -> None:
    policy, optimizer = trained({"momentum": 0.9, "weight_decay": 0.1}, dtype=torch.bfloat16)
    policy = matched(policy, optimizer)
    assert policy.optimizer is not None
    assert policy.optimizer.half_types == ("bfloat16",)
    step = cases.step(policy, seed=9)
    taken = rounded_step(policy, step, step.lr)
    assert taken is not None
    for name, p in policy.parameters.items():
        p.grad = -step.ascent[name].to(p.dtype)
    torch.nn.utils.clip_grad_norm_(policy.parameters.values(), policy.settings.max_grad_norm)
    optimizer.step()
    for name, p in policy.parameters.items():
        torch.testing.assert_close(taken.parameters[name], p.detach(), rtol=0, atol=0)


def test_one_that_maximizes_is_refused() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, maximize=True)
    with pytest.raises(CheckpointError, match="the optimizer maximizes"):
        match_optimizer(optimizer.state_dict(), layer, where="here")


def test_a_buffer_of_another_model_and_impossible_settings_are_refused() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"another model|another set"):
        match_optimizer(optimizer.state_dict(), torch.nn.Linear(4, 2), where="here")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["momentum"] = 1.5
    with pytest.raises(CheckpointError, match=r"momentum is 1\.5, expected at least 0 and below 1"):
        match_optimizer(saved, layer, where="here")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.full((2, 3), torch.nan)
    with pytest.raises(CheckpointError, match="momentum_buffer of weight"):
        match_optimizer(saved, layer, where="here")

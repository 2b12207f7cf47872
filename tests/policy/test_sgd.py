"""``torch.optim.SGD``: its next step, its derivative, and what becomes of a gradient in it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import cases
import real_steps
from stepscope.errors import CheckpointError
from stepscope.measure.step.lifetime import lifetime
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.registry import kind_of
from stepscope.policy.optim.sgd import SGDState
from stepscope.policy.state import Policy
from stepscope.training.watching.state import optimizer_state

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
    """A policy after real steps, with the optimizer's state."""
    policy = cases.policy(**settings)
    optimizer = torch.optim.SGD(real_steps.two_groups(policy, lr=0.1), **{"lr": 0.1, **options})
    real_steps.train(policy, optimizer, steps=steps)
    if steps:
        return real_steps.matched(policy, optimizer, named=True), optimizer
    # before the first step there is no file
    state = optimizer_state(optimizer, policy.model, after_backward=False)
    return replace(policy, optimizer=state), optimizer


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", KINDS)
def test_the_step_is_that_of_torch(options: dict[str, Any], steps: int, max_grad_norm: float) -> None:
    policy, optimizer = trained(options, steps=steps, max_grad_norm=max_grad_norm)
    assert kind_of(optimizer) is type(policy.optimizer) is SGDState
    live = optimizer_state(optimizer, policy.model, after_backward=False)
    assert policy.optimizer.groups == live.groups
    step = cases.step(policy, seed=9)
    taken = real_steps.taken_from_state(policy, step)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-10, atol=1e-12)
    for name, p in policy.parameters.items():
        torch.testing.assert_close(taken[name], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", KINDS)
def test_its_derivative_is_that_of_its_step(options: dict[str, Any]) -> None:
    policy, _ = trained(options, max_grad_norm=0.02)
    real_steps.assert_derivative_is_that_of_the_step(
        policy, cases.step(policy, seed=9), h=1e-5, rtol=1e-3, relative_atol=1e-3
    )


@pytest.mark.parametrize("begun", [1, 0])
@pytest.mark.parametrize("options", KINDS)
def test_what_becomes_of_a_gradient_is_what_torch_makes_of_it(options: dict[str, Any], begun: int) -> None:
    state, moved = real_steps.carried_on(
        lambda params: torch.optim.SGD(params, **{"lr": 0.1, **options}), begun=begun
    )
    for n in (1, 2, 10):
        assert state.carried("p", n) == pytest.approx(moved[n - 1] / moved[0], rel=1e-9)


@pytest.mark.parametrize("options", KINDS)
def test_shares_by_arithmetic(options: dict[str, Any]) -> None:
    """In a step after very many."""
    own = {"lr": 0.1, **options, "weight_decay": 0.0}
    state, weights = real_steps.gradients_in_a_step(lambda params: torch.optim.SGD(params, **own), steps=200)
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
    state = real_steps.matched(policy, optimizer, named=True).optimizer
    assert state is not None
    assert names[3] not in state.names
    found = lifetime(replace(policy, optimizer=state), cases.step(replace(policy, optimizer=state), seed=4))
    assert found is not None
    assert found.white_noise_share == pytest.approx(0.19)


def test_in_bfloat16_the_step_is_taken_by_torch() -> None:
    policy, optimizer = trained({"momentum": 0.9, "weight_decay": 0.1}, dtype=torch.bfloat16)
    assert policy.optimizer is not None
    assert policy.optimizer.half_types == ("bfloat16",)
    real_steps.assert_rounded_as_the_library_does(policy, optimizer)


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

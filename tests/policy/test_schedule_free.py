"""schedulefree's SGD and AdamW: the next step at y, its derivative, and what becomes of a gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

import cases
import real_steps
from stepscope.errors import CheckpointError
from stepscope.measure.influence.attribution import InfluenceOptions, influences
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.registry import kind_of, recognised
from stepscope.policy.optim.schedule_free import (
    MANY,
    ScheduleFreeAdamW,
    ScheduleFreeGroup,
    ScheduleFreeSGD,
)
from stepscope.policy.state import Policy
from stepscope.training.watching.state import optimizer_state

AdamW, SGD = schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (AdamW, {}),
    (AdamW, {"weight_decay": 0.3, "warmup_steps": 8, "r": 1.0, "foreach": False}),
    (AdamW, {"betas": (0.8, 0.95), "weight_lr_power": 0.0}),
    (SGD, {}),
    (SGD, {"weight_decay": 0.3, "momentum": 0.7, "warmup_steps": 3}),
]


def trained(
    kind: Any, options: dict[str, Any], *, steps: int = 4, max_grad_norm: float = 0.02
) -> tuple[Policy, Any]:
    """A policy after real steps, at the point y, with the optimizer's state."""
    policy = cases.policy(max_grad_norm=max_grad_norm)
    lr = 1e-3 if kind is AdamW else 0.1
    optimizer = kind(real_steps.two_groups(policy, lr=lr), **{"lr": lr, **options})
    optimizer.train()
    real_steps.train(policy, optimizer, steps=steps)
    if steps:
        return real_steps.matched(policy, optimizer), optimizer
    state = optimizer_state(optimizer, policy.model, after_backward=False)
    return replace(policy, optimizer=state), optimizer


def in_training(options: dict[str, Any]) -> real_steps.Make:
    """SGD in its training mode."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = SGD(params, **{"lr": 0.1, **options})
        optimizer.train()
        return optimizer

    return make


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_step_is_the_librarys(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, optimizer = trained(kind, options, max_grad_norm=max_grad_norm)
    expected = ScheduleFreeAdamW if kind is AdamW else ScheduleFreeSGD
    assert kind_of(optimizer) is type(policy.optimizer) is expected
    step = cases.step(policy, seed=9)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_the_first_step_is_the_librarys(kind: Any) -> None:
    policy, optimizer = trained(kind, {}, steps=0)
    step = cases.step(policy, seed=9)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_its_derivative_is_that_of_its_step(kind: Any, options: dict[str, Any]) -> None:
    policy, _ = trained(kind, options)
    real_steps.assert_derivative_is_that_of_the_step(
        policy, cases.step(policy, seed=9), h=1e-6, rtol=1e-3, relative_atol=1e-5, atol=1e-8
    )


def test_its_steps_are_attributed() -> None:
    policy, _ = trained(*KINDS[1])
    step = cases.step(policy, num_prompts=2, group_size=3)
    probe = cases.batch(policy, num_prompts=3, group_size=2, seed=5)
    fixed, _ = influences(policy, step, step.update, probe, options=InfluenceOptions(baseline="none"))
    whole = fixed.sequences.sum() + sum(part.value for part in fixed.components.values())
    assert whole == pytest.approx(fixed.total.value, rel=1e-9)
    assert policy.optimizer is not None
    assert "schedule-free AdamW is at step 5" in policy.optimizer.youth


@pytest.mark.parametrize("options", [options for kind, options in KINDS if kind is SGD] + [{"r": 1.0}])
@pytest.mark.parametrize("begun", [1, 5])
def test_what_becomes_of_a_gradient_is_what_the_library_makes_of_it(
    options: dict[str, Any], begun: int
) -> None:
    state, moved = real_steps.carried_on(in_training(options), begun=begun)
    for n in (1, 2, 10):
        assert state.carried("p", n) == pytest.approx(moved[n - 1] / moved[0], rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"r": 1.0}, {"momentum": 0.5}])
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_shares_by_arithmetic(options: dict[str, Any], steps: int) -> None:
    state, weights = real_steps.gradients_in_a_step(in_training(options), steps=steps)
    white, same = state.own_shares("p")
    assert white == pytest.approx(float(weights[-1] ** 2 / (weights**2).sum()), rel=1e-9)
    assert same == pytest.approx(float(weights[-1] / weights.sum()), rel=1e-9)


def test_sums_over_very_many_steps_are_integrals() -> None:
    groups = [
        ScheduleFreeGroup(("p",), lr=0.1, taken=MANY + n, weight_sum=0.01 * (MANY + n), r=0.0) for n in (0, 1)
    ]
    few, many = (ScheduleFreeSGD(groups=(g,), steps={}, z={}, exp_avg_sq={}).own_shares("p") for g in groups)
    assert many == pytest.approx(few, rel=1e-5)


def test_weights_in_evaluation_mode_are_refused() -> None:
    policy, optimizer = trained(*KINDS[0])
    optimizer.eval()
    with pytest.raises(
        CheckpointError, match="saved in the optimizer's evaluation mode: they are the average x"
    ):
        match_optimizer(optimizer.state_dict(), policy.model, where="here")


def test_a_parameter_without_gradient_has_an_entry_of_nothing_and_no_step() -> None:
    layer = nn.ParameterDict({"idle": torch.ones(2), "weight": torch.ones(3)})
    optimizer = AdamW(layer.values(), lr=1e-3)
    optimizer.train()
    layer["weight"].grad = torch.ones(3)
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0] == {}
    saved["param_groups"][0]["param_names"] = list(layer)
    assert match_optimizer(saved, layer, where="here").names == ("weight",)


def test_relatives_and_impossible_states_are_refused() -> None:
    layer = nn.Linear(3, 2)
    radam = schedulefree.RAdamScheduleFree(layer.parameters())
    own = SGD(layer.parameters(), lr=0.1)
    for optimizer in (radam, own):
        optimizer.train()
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.raises(CheckpointError, match="schedule-free RAdam"):
        recognised(radam.state_dict(), "here")
    for key, value, told in (
        ("lr", 0.0, "no direction times 0"),
        ("k", -3, "has taken -3 steps"),
        ("weight_sum", -1.0, "weight_sum is -1.0"),
        ("momentum", 1.0, "beta1 is 1.0"),
    ):
        saved = copy.deepcopy(own.state_dict())
        saved["param_groups"][0][key] = value
        with pytest.raises(CheckpointError, match=told):
            match_optimizer(saved, layer, where="here")

"""Adafactor of torch and of transformers: the next step of each, its derivative, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.influence.attribution import InfluenceOptions, influences
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.lifetime import lifetime
from stepscope.measure.step.rounding import rounded_step
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.adafactor import AdafactorState
from stepscope.policy.optim.registry import kind_of
from stepscope.policy.optim.transformers_adafactor import TransformersAdafactorState
from stepscope.policy.state import Policy
from stepscope.training.probe.state import optimizer_state

GIVEN = {"scale_parameter": False, "relative_step": False}
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.Adafactor, {}),
    (torch.optim.Adafactor, {"weight_decay": 0.1, "d": 1.5, "eps": (1e-5, 1e-2), "beta2_decay": -0.5}),
    (torch.optim.Adafactor, {"foreach": True, "weight_decay": 0.1}),
    (Adafactor, GIVEN),
    (Adafactor, {**GIVEN, "weight_decay": 0.1, "clip_threshold": 2.0}),
    (Adafactor, {**GIVEN, "scale_parameter": True, "weight_decay": 0.1, "decay_rate": -0.6}),
]


def trained(
    kind: Any, options: dict[str, Any], *, steps: int = 3, lr: float = 1e-2, **settings: Any
) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after real steps in two groups with their own lr, one of them without decay."""
    policy = cases.policy(**settings)
    params = list(policy.parameters.values())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "lr": lr},
        {"params": [p for p in params if p.dim() == 1], "lr": 2 * lr, "weight_decay": 0.0},
    ]
    optimizer = kind(groups, **{"lr": lr, **options})
    for seed in range(steps):
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))
    return policy, optimizer


def matched(policy: Policy, optimizer: torch.optim.Optimizer) -> Policy:
    """With the optimizer's state by name."""
    saved = copy.deepcopy(optimizer.state_dict())
    return replace(policy, optimizer=match_optimizer(saved, policy.model, where="optimizer.pt"))


def direction(policy: Policy, ascent: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
    assert policy.optimizer is not None
    clip = min(1.0, policy.settings.max_grad_norm / (vectors.norm(ascent) + 1e-6))
    made = policy.optimizer.update(policy.parameters, ascent, clip=clip, lr=lr)
    return vectors.add(made.made_of(ascent), *made.parts.values())


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_step_is_the_librarys(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, optimizer = trained(kind, options, max_grad_norm=max_grad_norm)
    policy = matched(policy, optimizer)
    expected = AdafactorState if kind is torch.optim.Adafactor else TransformersAdafactorState
    assert kind_of(optimizer) is type(policy.optimizer) is expected
    step = cases.step(policy, seed=9)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    cases.take_step(policy, optimizer, step.update)
    for name, p in policy.parameters.items():
        moved = (p.detach() - before[name]) / step.lr
        torch.testing.assert_close(step.direction[name], moved, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Adafactor])
def test_the_first_step_is_the_librarys(kind: Any) -> None:
    """And one at a learning rate above 1/sqrt(t), which torch does not take."""
    options = {} if kind is torch.optim.Adafactor else GIVEN
    policy, optimizer = trained(kind, options, steps=0, lr=2.0)
    policy = replace(policy, optimizer=optimizer_state(optimizer, policy.model, after_backward=False))
    step = cases.step(policy, seed=9)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    cases.take_step(policy, optimizer, step.update)
    for name, p in policy.parameters.items():
        moved = (p.detach() - before[name]) / step.lr
        torch.testing.assert_close(step.direction[name], moved, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_its_derivative_is_that_of_its_step(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, optimizer = trained(kind, options, max_grad_norm=max_grad_norm or 1e9)
    policy = matched(policy, optimizer)
    step = cases.step(policy, seed=9)
    change = {n: torch.randn(p.shape, dtype=p.dtype) * p.std() for n, p in step.ascent.items()}
    up, down = (
        direction(policy, vectors.add(step.ascent, vectors.scale(change, by)), step.lr)
        for by in (1e-6, -1e-6)
    )
    derivative = step_derivative(policy, step, "optimizer")
    along = derivative.along(change)
    for name, value in along.items():
        expected = (up[name] - down[name]) / 2e-6
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    other = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in step.ascent.items()}
    pulled = derivative.pulled({n: t[None].clone() for n, t in other.items()})
    assert vectors.dot({n: t[0] for n, t in pulled.items()}, change) == pytest.approx(
        vectors.dot(other, along)
    )


def test_its_steps_are_attributed() -> None:
    policy, optimizer = trained(*KINDS[1])
    policy = matched(policy, optimizer)
    step = cases.step(policy, num_prompts=2, group_size=3)
    probe = cases.batch(policy, num_prompts=3, group_size=2, seed=5)
    fixed, through = influences(policy, step, step.update, probe, options=InfluenceOptions(baseline="none"))
    whole = fixed.sequences.sum() + sum(part.value for part in fixed.components.values())
    assert whole == pytest.approx(fixed.total.value, rel=1e-9)
    assert through.sequences.sum() != pytest.approx(fixed.sequences.sum(), rel=0.01)
    assert policy.optimizer is not None
    assert "Adafactor is at step 4" in policy.optimizer.youth
    found = lifetime(policy, step)
    assert found is not None
    assert found.white_noise_share == 1
    assert 0.9 < found.effect[10] <= 1


def test_matrices_of_three_dimensions_and_parameters_without_gradient() -> None:
    layer = nn.ParameterDict(
        {"experts": torch.randn(3, 4, 5), "bias": torch.randn(5), "idle": torch.randn(2, 2)}
    )
    for kind, options in ((torch.optim.Adafactor, {"lr": 0.1}), (Adafactor, {**GIVEN, "lr": 0.1})):
        optimizer = kind(layer.double().values(), **options)
        for _ in range(3):
            for name in ("experts", "bias"):
                layer[name].grad = torch.randn_like(layer[name])
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["param_names"] = list(layer)
        state = match_optimizer(saved, layer, where="here")
        assert set(state.names) == {"experts", "bias"}
        before = {n: layer[n].detach().clone() for n in state.names}
        ascent = {n: torch.randn_like(t) for n, t in before.items()}
        made = state.update(before, ascent, clip=1.0, lr=0.1)
        whole = vectors.add(made.made_of(ascent), *made.parts.values())
        for name in state.names:
            layer[name].grad = -ascent[name]
        optimizer.step()
        for name in state.names:
            moved = (layer[name].detach() - before[name]) / 0.1
            torch.testing.assert_close(whole[name], moved, rtol=1e-9, atol=1e-11)


def test_in_bfloat16_the_step_is_taken_by_torch() -> None:
    policy, optimizer = trained(torch.optim.Adafactor, {}, dtype=torch.bfloat16)
    policy = matched(policy, optimizer)
    step = cases.step(policy, seed=9)
    taken = rounded_step(policy, step, step.lr)
    assert taken is not None
    for name, p in policy.parameters.items():
        p.grad = -step.ascent[name].to(p.dtype)
    torch.nn.utils.clip_grad_norm_(policy.parameters.values(), policy.settings.max_grad_norm)
    optimizer.step()
    for name, p in policy.parameters.items():
        torch.testing.assert_close(taken.parameters[name], p.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"beta1": 0.9, **GIVEN, "lr": 1e-3}, "keeps a first moment"),
        ({}, "makes its own learning rate"),
    ],
)
def test_settings_of_transformers_that_are_refused(options: dict[str, Any], told: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = Adafactor(layer.parameters(), **options)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(CheckpointError, match=told):
        match_optimizer(optimizer.state_dict(), layer, where="here")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("row_var", None, "has not col_var and row_var alone"),
        ("variance", torch.ones(2, 3), "has not col_var and row_var alone"),
        ("row_var", torch.ones(2, 2), "shape"),
        ("row_var", torch.full((2, 1), torch.nan), "row_var of weight"),
        ("col_var", torch.full((1, 3), -1.0), "negative"),
    ],
)
def test_damaged_states_are_refused(key: str, value: Any, told: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adafactor(layer.parameters())
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    if value is None:
        del saved["state"][0][key]
    else:
        saved["state"][0][key] = value
    with pytest.raises(CheckpointError, match=told):
        match_optimizer(saved, layer, where="here")

"""Adafactor of torch and of transformers: the next step of each, its derivative, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

import cases
import real_steps
from stepscope.errors import CheckpointError
from stepscope.measure.influence.attribution import InfluenceOptions, influences
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.lifetime import lifetime
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.adafactor import AdafactorState
from stepscope.policy.optim.registry import kind_of
from stepscope.policy.optim.transformers_adafactor import TransformersAdafactorState
from stepscope.policy.state import Policy
from stepscope.training.watching.state import optimizer_state

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
    """A policy after real steps, with the optimizer's state."""
    policy = cases.policy(**settings)
    optimizer = kind(real_steps.two_groups(policy, lr=lr), **{"lr": lr, **options})
    real_steps.train(policy, optimizer, steps=steps)
    if steps:
        return real_steps.matched(policy, optimizer), optimizer
    state = optimizer_state(optimizer, policy.model, after_backward=False)
    return replace(policy, optimizer=state), optimizer


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_step_is_the_librarys(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, optimizer = trained(kind, options, max_grad_norm=max_grad_norm)
    expected = AdafactorState if kind is torch.optim.Adafactor else TransformersAdafactorState
    assert kind_of(optimizer) is type(policy.optimizer) is expected
    step = cases.step(policy, seed=9)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Adafactor])
def test_the_first_step_is_the_librarys(kind: Any) -> None:
    """And one at a learning rate above 1/sqrt(t), which torch does not take."""
    options = {} if kind is torch.optim.Adafactor else GIVEN
    policy, optimizer = trained(kind, options, steps=0, lr=2.0)
    step = cases.step(policy, seed=9)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_its_derivative_is_that_of_its_step(kind: Any, options: dict[str, Any], max_grad_norm: float) -> None:
    policy, _ = trained(kind, options, max_grad_norm=max_grad_norm)
    step = cases.step(policy, seed=9)
    real_steps.assert_derivative_is_that_of_the_step(policy, step, h=1e-6, rtol=1e-5, relative_atol=1e-5)
    derivative = step_derivative(policy, step, "optimizer")
    one, other = ({n: torch.randn_like(t) for n, t in step.ascent.items()} for _ in range(2))
    pulled = {n: t[0] for n, t in derivative.pulled({n: t[None] for n, t in other.items()}).items()}
    assert vectors.dot(pulled, one) == pytest.approx(vectors.dot(other, derivative.along(one)))


def test_its_steps_are_attributed() -> None:
    policy, _ = trained(*KINDS[1])
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
    assert found.white_noise_share == pytest.approx(1, rel=1e-12)
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
    real_steps.assert_rounded_as_the_library_does(*trained(torch.optim.Adafactor, {}, dtype=torch.bfloat16))


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

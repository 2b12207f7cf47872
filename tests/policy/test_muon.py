"""Muon: torch's own steps rebuilt, and the derivative of its formula held to differences."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import real_steps
from stepscope.errors import CheckpointError
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.nonlinear import neglected_part
from stepscope.measure.step.reconstruct import assemble_step
from stepscope.measure.step.rounding import rounded_step
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.muon import MuonState, orthogonalised
from stepscope.policy.state import Policy

SETTINGS = [
    pytest.param({}, 0.0, id="plain"),
    pytest.param({"nesterov": False, "ns_steps": 3}, 0.02, id="no-nesterov-clipped"),
    pytest.param({"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5}, 0.02, id="rms-of-adamw-clipped"),
]


def trained(limit: float, **options: Any) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after three steps of Muon on its matrices, all else frozen; two groups, two rates."""
    policy = cases.policy(max_grad_norm=limit)
    for p in policy.model.parameters():
        p.requires_grad_(p.ndim == 2)
    named = [(n, p) for n, p in policy.parameters.items()]
    groups = [
        {"params": [(n, p) for n, p in named if "mlp" in n], "lr": 0.01, "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named if "mlp" not in n], "lr": 0.02},
    ]
    optimizer = torch.optim.Muon(groups, **options)
    real_steps.train(policy, optimizer)
    return real_steps.matched(policy, optimizer), optimizer


@pytest.mark.parametrize(("options", "limit"), SETTINGS)
def test_a_rebuilt_step_is_torchs(options: dict[str, Any], limit: float) -> None:
    policy, optimizer = trained(limit, **options)
    assert isinstance(policy.optimizer, MuonState)
    step = cases.step(policy, seed=9)
    assert list(step.components) == ["momentum", "decay", "sequences"]
    assert (step.clip_coefficient < 1) == (limit > 0)
    taken = real_steps.taken_from_state(policy, step)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-9, atol=1e-11)
    for n, p in policy.parameters.items():
        torch.testing.assert_close(taken[n], p.detach(), rtol=0, atol=1e-14)


def test_its_momentum_is_the_step_without_a_gradient() -> None:
    policy, optimizer = trained(0.0)
    step = cases.step(policy, seed=9)
    nothing = vectors.zeros_like(step.ascent)
    alone = assemble_step(policy, step.update, step.token_weights, nothing, {})
    assert vectors.norm(alone.components["sequences"]) == 0.0
    for n, p in policy.parameters.items():
        torch.testing.assert_close(alone.components["momentum"][n], step.components["momentum"][n])
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    optimizer.step()
    for n, p in policy.parameters.items():
        moved = (p.detach() - before[n]) / step.lr
        torch.testing.assert_close(moved, alone.direction[n], rtol=1e-9, atol=1e-11)


def test_terms_of_the_loss_add_up_with_the_sequences() -> None:
    policy, _ = trained(0.02)
    step = cases.step(policy, seed=9)
    half = vectors.scale(step.ascent, 0.5)
    parted = assemble_step(policy, step.update, step.token_weights, half, {"bonus": half})
    assert list(parted.components) == ["momentum", "decay", "sequences", "bonus"]
    for n, t in step.direction.items():
        torch.testing.assert_close(parted.direction[n], t, rtol=1e-12, atol=1e-12)
    assert vectors.norm(parted.components["bonus"]) > 0.01 * vectors.norm(parted.components["sequences"])


def test_a_training_with_weights_in_bfloat16_is_rounded_as_torch_does() -> None:
    policy = cases.policy(dtype=torch.float32, max_grad_norm=0.02)
    for p in policy.model.parameters():
        p.requires_grad_(p.ndim == 2)
    kept = {n: torch.nn.Parameter(p.detach().bfloat16()) for n, p in policy.parameters.items()}
    optimizer = torch.optim.Muon(list(kept.items()), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for p in kept.values():
        p.grad = 0.01 * torch.randn(p.shape, generator=generator).bfloat16()
    optimizer.step()
    for n, p in policy.parameters.items():
        p.data.copy_(kept[n])
    state = match_optimizer(copy.deepcopy(optimizer.state_dict()), policy.model, where="here")
    policy = replace(policy, optimizer=state)
    step = cases.step(policy, seed=9)
    taken = rounded_step(policy, step, step.lr)
    assert taken is not None
    assert 0 < taken.share_moved < 1
    for n, p in kept.items():
        p.grad = -step.ascent[n].bfloat16()
    torch.nn.utils.clip_grad_norm_(kept.values(), 0.02)
    optimizer.step()
    for n, p in kept.items():
        torch.testing.assert_close(taken.parameters[n], p.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_the_formula_is_torchs_but_for_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    matrix = torch.nn.Parameter(torch.zeros_like(weights))
    optimizer = torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizer.state[matrix]["momentum_buffer"] = weights.clone()
    matrix.grad = gradient
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    model = torch.nn.Linear(shape[1], shape[0], bias=False)
    state = match_optimizer(saved, model, where="here", dtype=torch.float64)
    assert isinstance(state, MuonState)
    ours = orthogonalised(state.groups[0], weights, 1.0, -gradient)
    missed = float((ours - matrix.detach()).norm() / ours.norm())
    assert 1e-4 < missed < 0.04  # eight bits; a wrong scale or a step too few is above 0.1


@pytest.mark.parametrize(("options", "limit"), SETTINGS)
def test_its_derivative_is_that_of_differences(options: dict[str, Any], limit: float) -> None:
    """Of the whole step, clipping included: the formula in float64, since bfloat16 has steps of its own."""
    policy, _ = trained(limit, **options)
    step = cases.step(policy, seed=9)
    state = policy.optimizer
    assert isinstance(state, MuonState)
    generator = torch.Generator().manual_seed(1)
    change = {n: t.std() * torch.randn(t.shape, generator=generator).to(t) for n, t in step.ascent.items()}
    slope = {n: torch.randn(t.shape, generator=generator).to(t) for n, t in step.ascent.items()}

    def at(h: float) -> dict[str, Tensor]:
        ascent = vectors.add(step.ascent, vectors.scale(change, h))
        clip = min(1.0, limit / (vectors.norm(ascent) + 1e-6)) if limit else 1.0
        return {
            n: orthogonalised(g, state.buffer[n], g.lr / step.lr, clip * ascent[n])
            for g in state.groups
            for n in g.names
        }

    h = 1e-5
    moved = vectors.scale(vectors.add(at(h), vectors.scale(at(-h), -1.0)), 1 / (2 * h))
    derivative = step_derivative(policy, step, "optimizer")
    along = derivative.along(change)
    missed = vectors.norm(vectors.add(along, vectors.scale(moved, -1.0))) / vectors.norm(moved)
    assert missed < 1e-5
    pulled = {n: t[0] for n, t in derivative.pulled({n: t[None] for n, t in slope.items()}).items()}
    assert vectors.dot(along, slope) == pytest.approx(vectors.dot(change, pulled), rel=1e-9)


def test_what_the_derivative_neglects_is_measured() -> None:
    """Without momentum a step does not depend on the gradient's length, and the derivative sees nothing."""
    policy, _ = trained(0.0, momentum=0.0)
    step = cases.step(policy, seed=9)
    share = neglected_part(policy, step)
    assert share.value == pytest.approx(1.0, abs=0.05)
    assert not share.reliable
    policy, _ = trained(0.0, momentum=0.9)
    far = neglected_part(policy, cases.step(policy, seed=9)).value
    tiny = vectors.scale(step.ascent, 1e-3)
    near = neglected_part(policy, assemble_step(policy, step.update, step.token_weights, tiny, {})).value
    assert near < far


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ns_steps", 100),
        ("ns_steps", 2.5),
        ("ns_coefficients", (1.0, 2.0)),
        ("adjust_lr_fn", "spectral"),
        ("momentum", 1.5),
        ("eps", float("nan")),
    ],
)
def test_what_torch_does_not_take_is_refused(key: str, value: Any) -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Muon(model.parameters())
    model.weight.grad = torch.ones(2, 3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(CheckpointError, match=key):
        match_optimizer(saved, model, where="here")

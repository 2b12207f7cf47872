"""What keeping moments in 8 bits loses: bounds from the codes, against the moments that were encoded."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

import cases
from stepscope.measure.step.reconstruct import assemble_step
from stepscope.measure.step.storage import storage_figures, storage_loss
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.bitsandbytes import BitsAndBytesAdamW
from stepscope.policy.optim.storage import stored_tensors
from stepscope.policy.state import Policy

BETAS = (0.9, 0.999)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b|."""
    return vectors.norm(vectors.add(a, vectors.scale(b, -1))) / vectors.norm(b)


@pytest.fixture(scope="module")
def stored() -> tuple[Policy, dict[str, dict[str, Tensor]]]:
    """A policy with the codes of a real training, and the moments that were encoded so."""
    policy = cases.policy(dtype=torch.float64)
    optimizer: Any = bitsandbytes.optim.AdamW8bit(policy.parameters.values(), lr=1e-3, min_8bit_size=1)

    def state() -> BitsAndBytesAdamW:
        saved = copy.deepcopy(optimizer.state_dict())
        found = match_optimizer(saved, policy.model, where="optimizer.pt", dtype=torch.float64)
        assert isinstance(found, BitsAndBytesAdamW)
        return found.of_cpu()

    for seed in range(8):
        before = state().tensors() if seed else {}
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))
    gradients = {n: p.grad for n, p in policy.parameters.items() if p.grad is not None}
    exact = {
        key: {n: beta * before[key][n] + (1 - beta) * g**power for n, g in gradients.items()}
        for key, beta, power in (("exp_avg", BETAS[0], 1), ("exp_avg_sq", BETAS[1], 2))
    }
    return replace(policy, optimizer=state()), exact


def test_the_moments_before_encoding_lie_within_the_bounds(stored: tuple[Policy, Any]) -> None:
    policy, exact = stored
    state = policy.optimizer
    assert state is not None
    found = stored_tensors(state)
    assert list(found) == ["exp_avg", "exp_avg_sq"]
    for key, tensors in exact.items():
        for name, tensor in tensors.items():
            codes = state.codes[key][name]
            room = 1e-6 * float(codes.absmax.max())
            assert ((codes.low - room <= tensor) & (tensor <= codes.high + room)).all()
        lost = apart(dict(state.tensors()[key]), tensors)
        assert lost <= found[key].worst
        assert lost == pytest.approx(found[key].typical, rel=0.5)


def test_the_step_with_the_moments_before_encoding_lies_within_the_bounds(stored: tuple[Policy, Any]) -> None:
    policy, exact = stored
    assert policy.optimizer is not None
    step = cases.step(policy, seed=20)
    found = storage_loss(policy, step)
    assert found is not None
    fine = replace(policy, optimizer=replace(policy.optimizer, codes={}, **exact))
    other = assemble_step(fine, step.update, step.token_weights, step.ascent, {})
    lost = apart(other.direction, step.direction)
    assert 0 < lost <= found.direction_worst
    assert found.direction / 4 < lost < found.direction * 4
    assert found.share == 1
    assert storage_loss(fine, other) is None
    figures = storage_figures(found, 3)
    assert figures["storage_error"].value == found.direction
    assert figures["storage_error_worst"].value == found.direction_worst


def test_earlier_encodings_have_lost_more_than_the_last() -> None:
    """Against the moments of 32 bits after the same gradients: what no file tells."""
    policy = cases.policy(dtype=torch.float64)
    twins = {n: torch.nn.Parameter(p.detach().clone()) for n, p in policy.parameters.items()}
    eight: Any = bitsandbytes.optim.AdamW8bit(policy.parameters.values(), lr=1e-3, min_8bit_size=1)
    fine = torch.optim.AdamW(twins.values(), lr=1e-3)
    for seed in range(30):
        cases.take_step(policy, eight, cases.batch(policy, seed=seed))
        for name, p in policy.parameters.items():
            twins[name].grad = None if p.grad is None else p.grad.clone()
        fine.step()
    state = match_optimizer(
        copy.deepcopy(eight.state_dict()), policy.model, where="here", dtype=torch.float64
    )
    policy = replace(policy, optimizer=state)
    moments = {
        key: {n: fine.state[p][key] for n, p in twins.items()}
        for key in state.tensors()
        if key in state.codes
    }
    step = cases.step(policy, seed=99)
    found = storage_loss(policy, step)
    assert found is not None
    other = replace(policy, optimizer=replace(state, codes={}, **moments))
    whole = assemble_step(other, step.update, step.token_weights, step.ascent, {})
    lost = apart(step.direction, whole.direction)
    assert 1.5 * found.direction < lost < 0.1
    assert vectors.cosine(step.direction, whole.direction) > 0.998


def test_every_coordinate_lies_within_its_corners(stored: tuple[Policy, Any]) -> None:
    """States drawn anywhere in the intervals, the ends included, are no farther than the bound."""
    policy, _ = stored
    state = policy.optimizer
    assert state is not None
    step = cases.step(policy, seed=20)
    found = storage_loss(policy, step)
    assert found is not None
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            key: {
                n: c.drawn(generator).double().where(torch.rand(c.code.shape) < 0.5, c.low)
                for n, c in codes.items()
            }
            for key, codes in state.codes.items()
        }
        other = replace(policy, optimizer=replace(state, codes={}, **drawn))
        moved = assemble_step(other, step.update, step.token_weights, step.ascent, {}).direction
        assert apart(moved, step.direction) <= found.direction_worst

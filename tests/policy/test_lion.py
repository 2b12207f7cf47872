"""Lion: the steps of lion-pytorch and bitsandbytes rebuilt, and what its secant adds up to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cases
import real_steps
from stepscope.errors import CheckpointError, MeasurementError
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.reconstruct import Step, sequence_direction
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.lion import BitsAndBytesLion, LionState
from stepscope.policy.optim.registry import kind_of
from stepscope.policy.state import Policy

lion_pytorch = pytest.importorskip("lion_pytorch")
bitsandbytes = pytest.importorskip("bitsandbytes")


def trained(limit: float) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after steps of lion-pytorch in two groups, with its state."""
    policy = cases.policy(max_grad_norm=limit)
    groups = real_steps.two_groups(policy, lr=0.001)
    groups[0] |= {"weight_decay": 0.3}
    groups[1] |= {"betas": (0.8, 0.95)}
    optimizer = lion_pytorch.Lion(groups, lr=0.001)
    real_steps.train(policy, optimizer)
    return real_steps.matched(policy, optimizer), optimizer


@pytest.mark.parametrize("limit", [0.0, 0.02])
def test_a_rebuilt_step_is_that_of_lion_pytorch(limit: float) -> None:
    policy, optimizer = trained(limit)
    assert type(policy.optimizer) is LionState
    step = cases.step(policy, seed=9)
    assert list(step.components) == ["momentum", "decay", "sequences"]
    assert (step.clip_coefficient < 1) == (limit > 0)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-9, atol=1e-10)


def test_a_rebuilt_step_is_that_of_bitsandbytes() -> None:
    """Its steps on the processor, in float32."""
    policy = cases.policy(max_grad_norm=0.0, dtype=torch.float32)
    optimizer = bitsandbytes.optim.Lion32bit(policy.parameters.values(), lr=0.001, betas=(0.9, 0.95))
    real_steps.train(policy, optimizer)
    policy = real_steps.matched(policy, optimizer)
    assert type(policy.optimizer) is BitsAndBytesLion
    assert set(policy.optimizer.steps.values()) == {3}
    step = cases.step(policy, seed=9)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=0, atol=5e-4)


def test_a_mean_in_8_bits_is_decoded_as_bitsandbytes_does() -> None:
    model = torch.nn.Linear(100, 50, bias=False)
    optimizer = bitsandbytes.optim.Lion8bit(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        model.weight.grad = torch.randn(50, 100, generator=generator)
        optimizer.step()
    state = match_optimizer(copy.deepcopy(optimizer.state_dict()), model, where="here")
    assert type(state) is BitsAndBytesLion
    assert set(state.codes["exp_avg"]) == {"weight"}
    gradient = 0.5 * torch.randn(50, 100, generator=generator)
    made = state.update(dict(model.named_parameters()), {"weight": -gradient}, clip=1.0, lr=0.01)
    direction = made.parts["momentum"]["weight"] + made.made_of({"weight": -gradient})["weight"]
    before = model.weight.detach().clone()
    model.weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close((model.weight.detach() - before) / 0.01, direction, rtol=0, atol=1e-4)


def own_step(limit: float = 0.02) -> tuple[Policy, Step]:
    policy, _ = trained(limit)
    return policy, cases.step(policy, seed=9)


def test_the_batch_turns_coordinates_and_its_sequences_share_them() -> None:
    policy, step = own_step()
    rate = {n: g.lr / step.lr for g in policy.optimizer.groups for n in g.names}  # type: ignore[union-attr]
    turned = 0
    for n, t in step.components["sequences"].items():
        whole = (t / rate[n]).round(decimals=9).abs()
        assert set(whole.unique().tolist()) <= {0.0, 2.0}  # a sign turns or it stays
        turned += int((whole == 2).sum())
        torch.testing.assert_close(
            step.components["momentum"][n],
            -rate[n] * policy.optimizer.exp_avg[n].sign(),  # type: ignore[union-attr]
        )
        assert bool((step.metric()[n] >= 0).all())
    assert 0 < turned < sum(t.numel() for t in step.direction.values()) / 2
    shares = [sequence_direction(policy, step, i) for i in range(len(step.update))]
    for n, t in vectors.add(*shares).items():
        torch.testing.assert_close(t, step.components["sequences"][n], rtol=1e-9, atol=1e-9)


def test_there_is_no_derivative_of_a_sign() -> None:
    policy, step = own_step()
    with pytest.raises(MeasurementError, match=r"Lion's step is a sign.*use through=fixed"):
        step_derivative(policy, step, "optimizer")
    assert policy.optimizer is not None
    with pytest.raises(MeasurementError, match="take influence through=fixed"):
        policy.optimizer.slope(policy.parameters, step.ascent, clip=1.0, lr=1.0)


def test_a_coordinate_too_small_to_divide_by_is_left_to_the_rest() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = lion_pytorch.Lion(model.parameters(), lr=1.0)
    model.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    state = match_optimizer(copy.deepcopy(optimizer.state_dict()), model, where="here")
    ascent = {"weight": torch.tensor([[1e-40, 0.5]])}
    made = state.update(dict(model.named_parameters()), ascent, clip=1.0, lr=1.0)
    assert made.preconditioner is not None
    assert made.preconditioner["weight"].tolist() == [[0.0, 2.0]]
    assert (made.parts["momentum"]["weight"] + made.made_of(ascent)["weight"]).tolist() == [[1.0, 1.0]]


def lion_of_bitsandbytes(**changes: Any) -> dict[str, Any]:
    model = torch.nn.Linear(100, 50, bias=False)
    optimizer = bitsandbytes.optim.Lion(model.parameters(), **changes)
    model.weight.grad = torch.ones(50, 100)
    optimizer.step()
    saved: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    return saved


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_decay": 0.1}, "weight decay, which its versions put into different places"),
        ({"betas": (0.9, 0.0)}, "not AdamW or Lion"),
    ],
)
def test_what_bitsandbytes_leaves_open_is_refused(changes: dict[str, Any], named: str) -> None:
    model = torch.nn.Linear(100, 50, bias=False)
    with pytest.raises(CheckpointError, match=named):
        match_optimizer(lion_of_bitsandbytes(**changes), model, where="here")


def test_a_cautious_lion_is_refused() -> None:
    from lion_pytorch.cautious_lion import Lion

    model = torch.nn.Linear(2, 3)
    optimizer = Lion(model.parameters(), lr=0.1)
    assert kind_of(optimizer) is None
    assert kind_of(lion_pytorch.Lion(model.parameters())) is not None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(CheckpointError, match="cautious_factor"):
        match_optimizer(copy.deepcopy(optimizer.state_dict()), model, where="here")


def test_what_excludes_a_token_has_no_decay_where_its_group_has_none() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = lion_pytorch.Lion(model.parameters(), lr=1.0)
    model.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    state = match_optimizer(copy.deepcopy(optimizer.state_dict()), model, where="here")
    weights = {"weight": torch.tensor([[-torch.inf, 1.0]])}
    made = state.update(weights, {"weight": torch.ones(1, 2)}, clip=1.0, lr=1.0)
    assert made.parts["decay"]["weight"].tolist() == [[0.0, 0.0]]

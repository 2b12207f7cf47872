"""What rebuilt steps are held to: the next step of a library's optimizer that trained the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import cases
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.reconstruct import Step
from stepscope.measure.step.rounding import rounded_step
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.state import Policy
from stepscope.training.watching.state import optimizer_state

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def two_groups(policy: Policy, *, lr: float) -> list[dict[str, Any]]:
    """Its matrices, and its other parameters with twice the learning rate and no decay."""
    trainable = [p for p in policy.parameters.values() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1], "lr": lr},
        {"params": [p for p in trainable if p.dim() == 1], "lr": 2 * lr, "weight_decay": 0.0},
    ]


def train(policy: Policy, optimizer: torch.optim.Optimizer, *, steps: int = 3) -> None:
    """Steps on as many batches."""
    for seed in range(steps):
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))


def matched(
    policy: Policy, optimizer: torch.optim.Optimizer, *, named: bool = False, dtype: torch.dtype | None = None
) -> Policy:
    """With the state that the optimizer would save.

    Args:
        policy: which it trains.
        optimizer: after some steps.
        named: the state has the parameters' names, for one that does not tell them by shapes.
        dtype: in which its tensors are read.
    """
    saved = copy.deepcopy(optimizer.state_dict())
    names = {id(p): n for n, p in policy.model.named_parameters()}
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True) if named else ():
        group["param_names"] = [names[id(p)] for p in live["params"]]
    return replace(policy, optimizer=match_optimizer(saved, policy.model, where="optimizer.pt", dtype=dtype))


def displacement(policy: Policy, optimizer: torch.optim.Optimizer, step: Step) -> dict[str, Tensor]:
    """What the library's own step with the same batch does, per unit of lr; the policy is moved."""
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    cases.take_step(policy, optimizer, step.update)
    return {name: (p.detach() - before[name]) / step.lr for name, p in policy.parameters.items()}


def assert_step_is_the_librarys(
    policy: Policy, optimizer: torch.optim.Optimizer, step: Step, *, rtol: float, atol: float
) -> None:
    for name, moved in displacement(policy, optimizer, step).items():
        torch.testing.assert_close(step.direction[name], moved, rtol=rtol, atol=atol)


def taken_from_state(policy: Policy, step: Step) -> dict[str, Tensor]:
    """Where the optimizer ends that is made anew from the state."""
    assert policy.optimizer is not None
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in policy.parameters.items()}
    for name, p in copies.items():
        p.grad = -step.clip_coefficient * step.ascent[name]
    policy.optimizer.take(copies, scale=1.0, lr=step.lr)
    return {name: p.detach() for name, p in copies.items()}


def assert_rounded_as_the_library_does(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """A step of parameters in a half type, bit for bit."""
    step = cases.step(policy, seed=9)
    taken = rounded_step(policy, step, step.lr)
    assert taken is not None
    for name, p in policy.parameters.items():
        p.grad = -step.ascent[name].to(p.dtype)
    cases.clipped_step(policy, optimizer)
    for name, p in policy.parameters.items():
        torch.testing.assert_close(taken.parameters[name], p.detach(), rtol=0, atol=0)


def assert_derivative_is_that_of_the_step(
    policy: Policy, step: Step, *, h: float, rtol: float, relative_atol: float, atol: float = 0.0
) -> None:
    """Against central differences of the step in its gradient, along a random change; clipping included.

    Args:
        policy: with an optimizer's state.
        step: its next.
        h: half the distance of a difference.
        rtol: of a coordinate.
        relative_atol: of a coordinate, over the largest of its parameter.
        atol: further, of a coordinate.
    """
    state, limit = policy.optimizer, policy.settings.max_grad_norm
    assert state is not None
    change = {n: torch.randn(p.shape, dtype=p.dtype) * p.std() for n, p in step.ascent.items()}

    def direction(by: float) -> dict[str, Tensor]:
        ascent = vectors.add(step.ascent, vectors.scale(change, by))
        clip = min(1.0, limit / (vectors.norm(ascent) + 1e-6)) if limit else 1.0
        made = state.update(policy.parameters, ascent, clip=clip, lr=step.lr)
        return vectors.add(made.made_of(ascent), *made.parts.values())

    more, less = direction(h), direction(-h)
    for name, value in step_derivative(policy, step, "optimizer").along(change).items():
        expected = (more[name] - less[name]) / (2 * h)
        most = relative_atol * float(expected.abs().max()) + atol
        torch.testing.assert_close(value, expected, rtol=rtol, atol=most)


def carried_on(make: Make, *, begun: int) -> tuple[OptimizerState, list[float]]:
    """What a further gradient in one step has moved after each of ten steps with the same gradients.

    Args:
        make: of the optimizer.
        begun: steps before it.

    Returns:
        The state before the first of the ten steps, of the parameter p; the displacements.
    """
    paths: list[list[float]] = [[], []]
    for further, path in enumerate(paths):
        p = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        optimizer = make([p])
        for _ in range(begun):
            p.grad = torch.tensor([0.2], dtype=torch.float64)
            optimizer.step()
        state = state_of(optimizer, p)
        for n in range(10):
            p.grad = torch.tensor([0.1 + further * (n == 0)], dtype=torch.float64)
            optimizer.step()
            path.append(float(p.detach()))
    return state, [b - a for a, b in zip(*paths, strict=True)]


def gradients_in_a_step(make: Make, *, steps: int) -> tuple[OptimizerState, Tensor]:
    """Weights of all gradients so far in the last of some steps: each has a coordinate of its own.

    Returns:
        The state before that step, of the parameter p; (step,) the weights.
    """
    p = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    optimizer = make([p])
    for gradient in torch.eye(steps, dtype=torch.float64):
        before, state = p.detach().clone(), state_of(optimizer, p)
        p.grad = gradient.clone()
        optimizer.step()
    return state, before - p.detach()


def state_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> OptimizerState:
    """That of a running optimizer of one parameter, p."""
    return optimizer_state(optimizer, nn.ParameterDict({"p": p}), after_backward=False)

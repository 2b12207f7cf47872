"""An optimizer of one's own: a class and an entry in the registry, and steps are rebuilt and attributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

import cases
import real_steps
from stepscope.measure.influence.attribution import InfluenceOptions, influences
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.lifetime import lifetime
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy import vectors
from stepscope.policy.optim.base import OptimizerState, Update
from stepscope.policy.optim.registry import OPTIMIZERS, kind_of, measurable
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedState
from stepscope.policy.optim.slope import Elementwise, Slope
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector

MOMENTUM, ALPHA, EPS = 0.9, 0.99, 1e-8


@dataclass(frozen=True, repr=False, kw_only=True)
class RootOfSquares(OptimizerState):
    """RMSprop with momentum: v' = alpha v + (1 - alpha) (c g)^2; the step is b' = 0.9 b + c g / sqrt(v')."""

    buffer: Mapping[str, Tensor]
    square: Mapping[str, Tensor]

    label: ClassVar[str] = "RMSprop"
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "momentum", "alpha", "eps", "centered", "weight_decay", "maximize"}),
        entry=frozenset({"step", "square_avg", "momentum_buffer"}),
        group_optional=frozenset({"foreach", "differentiable", "capturable"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.RMSprop

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        return cls(
            groups=tuple(ParameterGroup(**group.shared) for group in saved.groups),
            steps=saved.steps(),
            buffer=saved.tensors("momentum_buffer"),
            square=saved.tensors("square_avg"),
        )

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        return {"momentum_buffer": self.buffer, "square_avg": self.square}

    def roots(self, ascent: ParameterVector, clip: float) -> dict[str, Tensor]:
        return {n: (ALPHA * v + (1 - ALPHA) * (clip * ascent[n]) ** 2).sqrt() for n, v in self.square.items()}

    def update(
        self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float
    ) -> Update:
        momentum = vectors.scale(self.buffer, -MOMENTUM)
        return Update(
            {"momentum": momentum}, {n: clip / (r + EPS) for n, r in self.roots(ascent, clip).items()}
        )

    def slope(self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float) -> Slope:
        found = {}
        for n, root in self.roots(ascent, clip).items():
            square = (1 - ALPHA) * (clip * ascent[n]) ** 2
            found[n] = 1 / (root + EPS) - (square / root).nan_to_num() / (root + EPS) ** 2
        return Elementwise(found)

    def carried(self, name: str, horizon: int) -> float:
        return sum(MOMENTUM**j for j in range(horizon))

    def own_shares(self, name: str) -> tuple[float, float]:
        return 1 - MOMENTUM**2, 1 - MOMENTUM

    def options(self, group: ParameterGroup) -> dict[str, Any]:
        return super().options(group) | {"momentum": MOMENTUM}


@pytest.fixture
def registered() -> Iterator[None]:
    OPTIMIZERS.append(RootOfSquares)
    yield
    OPTIMIZERS.remove(RootOfSquares)


@pytest.fixture
def trained(registered: None, tiny_policy: Policy) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after two steps of ``torch.optim.RMSprop``, with its state matched by name."""
    optimizer = torch.optim.RMSprop(tiny_policy.parameters.values(), lr=1e-2, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in tiny_policy.parameters.values():
            p.grad = 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return real_steps.matched(tiny_policy, optimizer), optimizer


def test_a_step_of_ones_own_optimizer_is_that_of_its_library(
    trained: tuple[Policy, torch.optim.Optimizer],
) -> None:
    policy, optimizer = trained
    step = cases.step(policy, num_prompts=2, group_size=3)
    assert list(step.components) == ["momentum", "sequences"]
    assert kind_of(optimizer) is RootOfSquares
    assert "RMSprop" in measurable()
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    copies = {n: torch.nn.Parameter(p.clone()) for n, p in before.items()}
    for n, p in policy.parameters.items():
        p.grad = -step.clip_coefficient * step.ascent[n]
        copies[n].grad = p.grad.clone()
    optimizer.step()
    assert policy.optimizer is not None
    assert policy.optimizer.take(copies, scale=1.0, lr=step.lr) == "single tensor"
    for n, p in policy.parameters.items():
        expected = before[n] + step.lr * step.direction[n]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(copies[n].detach(), expected, rtol=1e-12, atol=1e-15)


def test_its_steps_are_attributed(trained: tuple[Policy, torch.optim.Optimizer]) -> None:
    policy, _ = trained
    step = cases.step(policy, num_prompts=2, group_size=3)
    probe = cases.batch(policy, num_prompts=3, group_size=2, seed=5)
    fixed, through = influences(policy, step, step.update, probe, options=InfluenceOptions(baseline="none"))
    whole = fixed.sequences.sum() + fixed.components["momentum"].value
    assert whole == pytest.approx(fixed.total.value, rel=1e-9)
    assert set(fixed.components) == {"momentum"}
    assert abs(through.sequences.sum()) < abs(fixed.sequences.sum())  # P shrinks where a gradient grows
    along = step_derivative(policy, step, "optimizer").along(step.ascent)
    assert policy.optimizer is not None
    sizes = (1 - 1e-5, 1 + 1e-5)
    assert step.clip_coefficient == 1.0
    low, high = (vectors.scale(step.ascent, by) for by in sizes)
    less, more = (policy.optimizer.update({}, a, clip=1.0, lr=step.lr).made_of(a) for a in (low, high))
    for name, value in along.items():
        torch.testing.assert_close(value, (more[name] - less[name]) / 2e-5, rtol=1e-5, atol=1e-7)
    found = lifetime(policy, step)
    assert found is not None
    assert found.effect[10] == pytest.approx(10 * (1 - MOMENTUM**10))
    assert found.white_noise_share == pytest.approx(0.19)
    assert reconstruct_step(policy, step.update).lr == step.lr

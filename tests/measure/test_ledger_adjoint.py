"""The ledger's recursion against automatic differentiation of AdamW, replayed on given gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.ledger.adjoint import Adjoint, Pulled, TakenStep, carried_moment, pull
from stepscope.policy.optim.adamw import AdamState, AdamWGroup, AdamWState
from stepscope.policy.optim.base import Through
from stepscope.policy.optim.sgd import SGDGroup, SGDState

SHAPES = {"a": (3, 2), "b": (4,)}
LIMIT = 1.0
Vector = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """Steps of AdamW on given ascents, and what a quantity gains along each displacement."""

    start: AdamWState
    ascents: list[Vector]
    gains: list[Vector]
    thetas: list[Vector]
    rates: list[float]
    limit: float

    def replay(
        self, ascents: list[Vector], first: Vector, *, held: list[tuple[float, Vector]] | None
    ) -> tuple[Tensor, list[tuple[AdamWState, float, Vector]]]:
        """sum_t G_t . Delta_t by the formulas of AdamW, and the states; c and D may be held."""
        squares = dict(self.start.exp_avg_sq)
        largest = dict(self.start.max_exp_avg_sq)
        first = dict(first)
        total, states = torch.zeros((), dtype=torch.float64), []
        for t, ascent in enumerate(ascents):
            norm = torch.stack([(x**2).sum() for x in ascent.values()]).sum().sqrt()
            limit = self.limit / (norm + 1e-6) if self.limit else torch.ones(())
            clip = limit if float(limit.detach()) < 1 else torch.ones(())
            divisors = {}
            groups = tuple(replace(g, lr=g.lr * self.rates[t]) for g in self.start.groups)
            for group in groups:
                for name in group.names:
                    count = self.start.steps[name] + t + 1
                    (b1, b2), theta = group.betas, self.thetas[t][name]
                    gradient = -(clip if held is None else held[t][0]) * ascent[name]
                    if not group.decoupled:
                        gradient = gradient + group.weight_decay * theta
                    first[name] = b1 * first[name] + (1 - b1) * gradient
                    squares[name] = b2 * squares[name] + (1 - b2) * gradient**2
                    root = squares[name]
                    if group.amsgrad:
                        root = largest[name] = torch.maximum(largest[name], squares[name])
                    divisors[name] = root.sqrt() / (1 - b2**count) ** 0.5 + group.eps
                    divisor = divisors[name] if held is None else held[t][1][name]
                    moved = -group.lr * first[name] / (1 - b1**count) / divisor
                    if group.decoupled:
                        moved = moved - group.lr * group.weight_decay * theta
                    total = total + (self.gains[t][name] * moved).sum()
            state = replace(
                self.start,
                groups=groups,
                exp_avg={n: x.detach() for n, x in first.items()},
                exp_avg_sq={n: x.detach() for n, x in squares.items()},
                max_exp_avg_sq={n: x.detach() for n, x in largest.items()},
                steps={n: c + t + 1 for n, c in self.start.steps.items()},
            )
            states.append((state, float(clip.detach()), {n: d.detach() for n, d in divisors.items()}))
        return total, states


def made(*, steps: int, count: int, limit: float, amsgrad: bool, decoupled: bool = True) -> Run:
    generator = torch.Generator().manual_seed(count + steps)

    def drawn(size: float = 1.0) -> Vector:
        return {n: size * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}

    groups = (
        AdamWGroup(
            ("a",), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), amsgrad=amsgrad, decoupled=decoupled
        ),
        AdamWGroup(
            ("b",), lr=3e-3, weight_decay=0.0, betas=(0.8, 0.99), amsgrad=amsgrad, decoupled=decoupled
        ),
    )
    squares = {n: x**2 for n, x in drawn(0.3 if count else 0.0).items()}
    kind = AdamWState if decoupled else AdamState
    start = kind(
        groups=groups,
        exp_avg=drawn(0.2 if count else 0.0),
        exp_avg_sq=squares,
        max_exp_avg_sq={n: 2 * x for n, x in squares.items()} if amsgrad else {},
        steps=dict.fromkeys(SHAPES, count),
    )
    scales = (0.3 + torch.rand(steps, generator=generator, dtype=torch.float64)).tolist()
    return Run(
        start=start,
        ascents=[drawn(s) for s in scales],
        gains=[drawn() for _ in range(steps)],
        thetas=[drawn() for _ in range(steps)],
        rates=torch.rand(steps, generator=generator).tolist(),
        limit=limit,
    )


def walked(run: Run, through: Through) -> tuple[list[Pulled], list[TakenStep]]:
    """The recursion over the run, the first step first."""
    _, states = run.replay(run.ascents, dict(run.start.exp_avg), held=None)
    steps = [
        TakenStep(state=s, clip=c, max_norm=run.limit, ascent=a, parameters=theta)
        for (s, c, _), a, theta in zip(states, run.ascents, run.thetas, strict=True)
    ]
    after, found = Adjoint(), []
    for step, gain in zip(reversed(steps), reversed(run.gains), strict=True):
        found.append(pull(step, {n: x.unsqueeze(0) for n, x in gain.items()}, after, through))
        after = found[-1].before
    return found[::-1], steps


RUNS = [
    pytest.param(7, 3, LIMIT, False, True, id="clipped"),
    pytest.param(20, 0, LIMIT, False, True, id="from-the-first-step"),
    pytest.param(5, 60, 0.0, False, True, id="unclipped-late"),
    pytest.param(9, 4, LIMIT, True, True, id="amsgrad"),
    pytest.param(6, 2, LIMIT, False, False, id="adam"),
]


@pytest.mark.parametrize("through", ["fixed", "optimizer"])
@pytest.mark.parametrize(("steps", "count", "limit", "amsgrad", "decoupled"), RUNS)
def test_recursion_is_the_derivative_of_the_optimizer(
    steps: int, count: int, limit: float, amsgrad: bool, decoupled: bool, through: Through
) -> None:
    """With respect to every gradient and to the moment before the first step; own and later parts apart."""
    run = made(steps=steps, count=count, limit=limit, amsgrad=amsgrad, decoupled=decoupled)
    found, _ = walked(run, through)
    leaves = [{n: x.clone().requires_grad_() for n, x in a.items()} for a in run.ascents]
    first = {n: x.clone().requires_grad_() for n, x in run.start.exp_avg.items()}
    with torch.no_grad():
        _, states = run.replay(run.ascents, dict(run.start.exp_avg), held=None)
    held = [(c, d) for _, c, d in states] if through == "fixed" else None
    total, _ = run.replay(leaves, first, held=held)
    flat = [x for leaf in leaves for x in leaf.values()] + list(first.values())
    grads = torch.autograd.grad(total, flat)
    exact = [dict(zip(SHAPES, grads[i : i + 2], strict=True)) for i in range(0, len(grads), 2)]
    clips = [c for _, c, _ in states]
    assert (min(clips) < 1 < 1 + max(clips)) == bool(limit)
    scale = max(float(g.abs().max()) for g in grads)
    for t, pulled in enumerate(found):
        for name in SHAPES:
            whole = (pulled.own[name] + pulled.later[name])[0]
            np.testing.assert_allclose(whole, exact[t][name], rtol=1e-9, atol=1e-12 * scale)
    for name in SHAPES:
        np.testing.assert_allclose(
            -found[0].before.first[name][0], exact[-1][name], rtol=1e-9, atol=1e-12 * scale
        )
    alone = replace(run, gains=[{n: 0 * x for n, x in g.items()} for g in run.gains[:-1]] + run.gains[-1:])
    last, _ = walked(alone, through)
    for name in SHAPES:
        np.testing.assert_allclose(last[-1].own[name], found[-1].own[name])
        assert not found[-1].later[name].any()
        assert not last[0].own[name].any()
        assert last[0].later[name].any()


@pytest.mark.parametrize("decoupled", [True, False])
def test_fixed_parts_add_up_to_the_sum_along_the_path(decoupled: bool) -> None:
    """Gradients of all steps, the moment before the first, and decay: to round-off."""
    run = made(steps=8, count=3, limit=LIMIT, amsgrad=False, decoupled=decoupled)
    found, steps = walked(run, "fixed")
    total, _ = run.replay(run.ascents, dict(run.start.exp_avg), held=None)
    parts = 0.0
    for pulled, step, ascent, gain, theta in zip(
        found, steps, run.ascents, run.gains, run.thetas, strict=True
    ):
        parts += sum(float(((pulled.own[n] + pulled.later[n])[0] * ascent[n]).sum()) for n in SHAPES)
        parts += sum(float((gain[n] * d).sum()) for n, d in step.decay(theta).items())
        parts -= sum(float((p[0] * theta[n]).sum()) for n, p in pulled.decay.items())
        assert bool(pulled.decay) != decoupled
    parts -= sum(float((found[0].before.first[n][0] * run.start.exp_avg[n]).sum()) for n in SHAPES)
    assert parts == pytest.approx(float(total), rel=1e-11)
    by_steps = sum(
        float((g[n] * d).sum())
        for s, g in zip(steps, run.gains, strict=True)
        for n, d in carried_moment(s, run.start.exp_avg, run.start.steps).items()
    )
    by_recursion = -sum(float((found[0].before.first[n][0] * run.start.exp_avg[n]).sum()) for n in SHAPES)
    assert by_steps == pytest.approx(by_recursion, rel=1e-11)


def test_a_parameter_that_a_step_leaves_alone_keeps_its_moments() -> None:
    run = made(steps=1, count=3, limit=0.0, amsgrad=False)
    _, states = run.replay(run.ascents, dict(run.start.exp_avg), held=None)
    only = states[0][0].groups[0]
    step = TakenStep(state=replace(states[0][0], groups=(only,)), ascent=run.ascents[0])
    gains = {n: x.unsqueeze(0) for n, x in run.gains[0].items()}
    later = {n: 2 * x for n, x in gains.items()}
    found = pull(step, gains, Adjoint(later, later), "optimizer")
    assert not found.own["b"].any()
    assert not found.later["b"].any()
    assert torch.equal(found.before.first["b"], later["b"])
    assert torch.equal(found.before.second["b"], later["b"])
    assert found.later["a"].any()
    assert not step.decay(run.thetas[0])["b"].any()
    assert not carried_moment(step, run.start.exp_avg, run.start.steps)["b"].any()


def test_refuses_what_it_does_not_follow() -> None:
    run = made(steps=2, count=3, limit=0.0, amsgrad=False)
    _, states = run.replay(run.ascents, dict(run.start.exp_avg), held=None)
    bare = TakenStep(state=replace(states[0][0], exp_avg={}))
    gains = {n: x.unsqueeze(0) for n, x in run.gains[0].items()}
    assert pull(bare, gains, Adjoint(), "fixed").own
    with pytest.raises(MeasurementError, match="first moment of every step"):
        pull(bare, gains, Adjoint(), "optimizer")
    with pytest.raises(MeasurementError, match="AdamW and Adam, got SGD"):
        TakenStep(state=SGDState(groups=(SGDGroup(("a",), lr=1.0),), steps={}, buffer={}))

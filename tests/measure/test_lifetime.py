"""A batch's effect through momentum against torch.optim.AdamW, and its share against simulated gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.step.lifetime import lifetime, lifetime_figures
from stepscope.policy.optim.adamw import AdamWGroup
from stepscope.policy.state import Policy


def displaced(
    gradient: torch.Tensor, root: torch.Tensor, group: AdamWGroup, step: int, n: int
) -> list[float]:
    """First parameter after each step of torch's AdamW: this gradient, then none; D held at ``root``."""
    parameter = torch.nn.Parameter(torch.full_like(gradient, 0.7))
    optimizer = torch.optim.AdamW(
        [parameter], lr=group.lr, betas=group.betas, eps=group.eps, weight_decay=group.weight_decay
    )
    first, path = torch.zeros_like(gradient), []
    for j in range(n):
        parameter.grad = gradient.clone() if j == 0 else torch.zeros_like(gradient)
        t, beta2 = step + j, group.betas[1]
        # such that sqrt(v') / sqrt(1 - b2^t) comes out as ``root``
        second = (root**2 * (1 - beta2**t) - (1 - beta2) * parameter.grad**2) / beta2
        optimizer.state[parameter] = {
            "step": torch.tensor(float(t - 1)),
            "exp_avg": first,
            "exp_avg_sq": second,
        }
        optimizer.step()
        first = optimizer.state[parameter]["exp_avg"]
        path.append(float(parameter.detach()[0]))
    return path


@pytest.mark.parametrize("step", [1, 4, 11, 61])
@pytest.mark.parametrize(("beta1", "decay"), [(0.9, 0.0), (0.9, 5.0), (0.5, 0.0), (0.0, 1.0)])
def test_carried_effect_is_that_of_torch(step: int, beta1: float, decay: float) -> None:
    group = AdamWGroup(("p",), lr=1e-2, betas=(beta1, 0.95), weight_decay=decay)
    gradient, root = (
        torch.tensor([0.3, -2.0], dtype=torch.float64),
        torch.tensor([1.3, 2.0], dtype=torch.float64),
    )
    moved = displaced(gradient, root, group, step, 40)
    still = displaced(0 * gradient, root, group, step, 40)
    effect = np.array(moved) - np.array(still)
    for n in (1, 2, 10, 40):
        assert group.carried(step, n) == pytest.approx(effect[n - 1] / effect[0], rel=1e-9)


def test_known_values() -> None:
    """Late in a training a batch does 6.5 times its own step's effect in 10 steps, 10 times at most."""
    group = AdamWGroup(("p",), lr=0.0)
    assert group.carried(10_000, 1) == 1.0
    assert group.carried(10_000, 10) == pytest.approx(6.513, abs=1e-3)
    assert group.carried(10_000, 40) == pytest.approx(9.852, abs=1e-3)
    assert group.carried(11, 10) < group.carried(61, 10) < group.carried(10_000, 10)


@pytest.mark.parametrize("constant", [False, True], ids=["white noise", "constant"])
def test_share_of_a_batch_by_arithmetic_alone(
    constant: bool,
) -> None:
    """A step made of simulated gradients has the share that is said of it, and so a relative share of 1."""
    policy = cases.policy()
    step = cases.step(policy, num_prompts=2, group_size=2)
    state, t = policy.optimizer, 11
    assert state is not None
    generator = torch.Generator().manual_seed(0)
    like = {n: torch.zeros(200, 50, dtype=torch.float64) for n in state.exp_avg}
    moment, gradient = like, like
    for k in range(t):
        if k == 0 or not constant:
            gradient = {n: torch.randn(z.shape, generator=generator, dtype=z.dtype) for n, z in like.items()}
        moment = {n: 0.9 * moment[n] + 0.1 * gradient[n] for n in like}
    scale = 1 / (1 - 0.9**t)
    sequences = {n: 0.1 * scale * g for n, g in gradient.items()}
    momentum = {n: scale * m - sequences[n] for n, m in moment.items()}
    made = replace(step, components={"momentum": momentum, "sequences": sequences})
    aged = replace(policy, optimizer=replace(state, steps=dict.fromkeys(state.steps, t - 1)))
    found = lifetime(aged, made)
    assert found.step == t
    assert found.white_noise_share == pytest.approx(0.2108, abs=1e-4)
    assert found.constant_share == pytest.approx(0.1457, abs=1e-4)
    expected = found.constant_share if constant else found.white_noise_share
    assert found.share == pytest.approx(expected, rel=1e-9 if constant else 0.02)
    assert found.effect == pytest.approx({n: state.groups[0].carried(t, n) for n in (1, 10, 40)}, rel=1e-2)


def test_groups_count_by_the_length_they_have(tiny_policy: Policy) -> None:
    step = cases.step(tiny_policy, num_prompts=2, group_size=2)
    state = tiny_policy.optimizer
    assert state is not None
    young = set(state.groups[0].names)
    ages = {n: 0 if n in young else 99 for n in state.steps}
    found = lifetime(replace(tiny_policy, optimizer=replace(state, steps=ages)), step)
    length = {n: float((t**2).sum()) for n, t in step.components["sequences"].items()}
    share = sum(length[n] for n in young) / sum(length.values())
    first, second = (group.carried(t, 10) for group, t in zip(state.groups, (1, 100), strict=True))
    assert found.effect[10] == pytest.approx(share * first + (1 - share) * second, rel=1e-9)
    assert found.effect[1] == pytest.approx(1.0, rel=1e-15)
    assert found.step == 100
    assert set(lifetime_figures(found, 2)) == {
        "share_sequences_relative",
        "effect_after_10_steps",
        "effect_after_40_steps",
    }


def test_a_policy_without_optimizer_is_refused(tiny_policy: Policy) -> None:
    step = cases.step(tiny_policy, num_prompts=2, group_size=2)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        lifetime(replace(tiny_policy, optimizer=None), step)

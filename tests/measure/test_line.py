from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from enumerable import ARCHITECTURES, EOS, PROMPTS, enumerable_policy, random_step
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.values import (
    derivatives,
    hidden_states,
    response_mask,
    second_doubt,
    values_at,
)
from stepscope.policy import forward
from stepscope.policy.numerics import nested
from stepscope.policy.numerics.nested import SmoothActivations
from stepscope.policy.passes import Budget
from stepscope.policy.vectors import scale
from stepscope.reference import exact_rollouts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_derivatives_are_limits_of_differences(architecture: str) -> None:
    policy = enumerable_policy(architecture)
    rollouts, _ = exact_rollouts(policy, PROMPTS[:1], eos_id=EOS)
    direction = random_step(policy).direction
    quantities = [make_quantity("entropy", rollouts), make_quantity("logprob", rollouts)]
    (only,) = derivatives(policy, rollouts, quantities, direction, budget=Budget(max_sequences=128))
    first, second = derivatives(
        policy, rollouts, quantities, direction, order=2, budget=Budget(max_sequences=128)
    )
    h = 1e-4
    up, base, down = (
        values_at(policy, rollouts, quantities, direction, lr, budget=Budget(max_sequences=128))
        for lr in (h, 0.0, -h)
    )
    for name in ("logprobs", "prefix", "token"):
        plus, zero, minus = (getattr(t, name) for t in (up, base, down))
        size = np.abs(getattr(second, name)).max()
        np.testing.assert_allclose(getattr(first, name), (plus - minus) / (2 * h), atol=1e-4 * (1 + size))
        np.testing.assert_allclose(
            getattr(second, name), (plus + minus - 2 * zero) / h**2, atol=1e-3 * (1 + size)
        )
        np.testing.assert_allclose(getattr(only, name), getattr(first, name), rtol=1e-9, atol=1e-9)


def test_parameters_come_back_bitwise_and_padding_is_zero() -> None:
    policy = enumerable_policy()
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    quantities = [make_quantity("entropy", rollouts)]
    table = values_at(policy, rollouts, quantities, random_step(policy).direction, 0.1)
    derivatives(policy, rollouts, quantities, random_step(policy).direction, order=2)
    for name, values in policy.parameters.items():
        assert torch.equal(values, before[name])
    mask = response_mask(rollouts)
    assert (table.logprobs[~mask] == 0).all()
    assert (table.prefix[:, ~mask] == 0).all()
    assert (table.logprobs[mask] < 0).all()


def test_micro_batches_do_not_matter() -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    quantities = [make_quantity("entropy", rollouts)]
    direction = random_step(policy).direction
    few, many = (
        values_at(policy, rollouts, quantities, direction, 1e-2, budget=Budget(max_sequences=m))
        for m in (7, 200)
    )
    np.testing.assert_allclose(few.prefix, many.prefix, atol=1e-12)
    np.testing.assert_allclose(few.logprobs, many.logprobs, atol=1e-12)


def test_a_wrong_second_derivative_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own nested rule for layer_norm is wrong; without its replacement the figures are in doubt."""
    policy = enumerable_policy("gpt2")
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    entropy, step = make_quantity("entropy", rollouts), random_step(policy)
    assert derivatives(policy, rollouts, [entropy], step.direction, order=2)[1].doubt == ""
    monkeypatch.setattr(forward, "differentiable", lambda model: nullcontext())
    first, second = derivatives(policy, rollouts, [entropy], step.direction, order=2)
    assert first.doubt == ""
    assert "no correct rule" in second.doubt
    assert second.quantity(0).select(np.array([0])).doubt == second.doubt
    change = measure_change(
        policy, step, rollouts, quantity=entropy, lrs=[1e-4, 1e-3], options=ChangeOptions(second_order=True)
    )
    assert change.curvature is not None
    assert not change.curvature.reliable
    assert change.linear_up_to is None
    for point in change.points:
        assert point.second_order is not None
        assert second.doubt in point.second_order.reason
        assert second.doubt not in point.linear.reason


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.7, 1.3])
def test_the_check_of_second_derivatives_holds_on_peaked_policies(double: bool, share: float) -> None:
    """Tokens of probability near 1 that hardly move, and a rare one that bends by l'' = -Var(dz) = -3e6."""
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 400, 4, dtype=dtype, generator=generator)
    logits[:, :, 0] += 12.0
    speeds = torch.randn(1, 400, 4, dtype=dtype, generator=generator)
    logits[:, 7] = torch.tensor([np.log(2), 0.0, 0.0, -30.0], dtype=dtype)
    speeds[:, 7] = torch.tensor([0.0, 6e6**0.5, -(6e6**0.5), 0.0], dtype=dtype)
    chosen = torch.zeros(1, 400, 1, dtype=torch.long)

    def value(lr: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits + lr * speeds, -1).gather(-1, chosen).squeeze(-1)

    def slope(lr: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(value, (lr,), (torch.ones_like(lr),))[1]

    zero = torch.zeros((), dtype=dtype)
    first, second = torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))
    assert float(second[0, 7]) == pytest.approx(-3e6, rel=1e-5)
    assert second.abs().median() < 1
    mask = torch.ones(1, 400, dtype=torch.bool)
    doubt = second_doubt(slope, first, share * second, mask, torch.finfo(dtype).eps)
    assert bool(doubt) == (share != 1.0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(broken: float) -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS[:1], eos_id=EOS)
    sound = make_quantity("reward", rollouts)
    rewards = rollouts.rewards.copy()
    rewards[3] = broken
    spoilt = replace(sound, rewards=rewards)  # type: ignore[call-arg]
    place = f"quantity of sequence 3, response token {rollouts.num_tokens[3] - 1}"
    with pytest.raises(MeasurementError, match=f"value at lr 0 of the {place}: not finite"):
        values_at(policy, rollouts, [spoilt])


def test_a_missing_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = enumerable_policy("qwen2")
    rollouts, _ = exact_rollouts(policy, PROMPTS[:1], eos_id=EOS)
    monkeypatch.delitem(nested._WRITTEN_OUT, F.silu)
    quantities, direction = [make_quantity("entropy", rollouts)], random_step(policy).direction
    with pytest.raises(MeasurementError, match=r"order 2 \(.*silu.*without second order"):
        derivatives(policy, rollouts, quantities, direction, order=2)
    assert len(derivatives(policy, rollouts, quantities, direction, budget=Budget(max_sequences=128))) == 1


@pytest.mark.parametrize("function", [F.silu, F.mish, F.glu])
def test_written_out_activations_agree_with_torch_and_differentiate_twice(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def along(lr: torch.Tensor) -> torch.Tensor:
        return function(x + lr * v)

    with SmoothActivations():
        torch.testing.assert_close(along(zero), function(x), rtol=1e-12, atol=1e-12)
        _, second = torch.func.jvp(lambda e: torch.func.jvp(along, (e,), (one,))[1], (zero,), (one,))
    h = 1e-4
    difference = (along(zero + h) + along(zero - h) - 2 * along(zero)) / h**2
    torch.testing.assert_close(second, difference, rtol=0, atol=1e-6)


def test_second_order_is_there_in_float32_and_scales() -> None:
    policy = enumerable_policy("qwen2")
    policy.model.float()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    direction = random_step(policy).direction
    quantities = [make_quantity("entropy", rollouts)]
    once = derivatives(policy, rollouts, quantities, direction, order=2)
    twice = derivatives(policy, rollouts, quantities, scale(direction, 2.0), order=2)
    largest = np.abs(once[1].prefix).max()
    np.testing.assert_allclose(twice[0].prefix, 2 * once[0].prefix, atol=1e-3 * np.abs(once[0].prefix).max())
    np.testing.assert_allclose(twice[1].prefix, 4 * once[1].prefix, atol=1e-3 * largest)


def test_hidden_states_are_projected_only_when_wide() -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    whole = hidden_states(policy, rollouts)
    assert whole.shape == (*response_mask(rollouts).shape, 16)
    assert (whole[~response_mask(rollouts)] == 0).all()
    narrow = hidden_states(policy, rollouts, max_features=8)
    again = hidden_states(policy, rollouts, max_features=8, budget=Budget(max_sequences=3))
    assert narrow.shape[-1] == 8
    np.testing.assert_allclose(narrow, again, atol=1e-5)
    # prefixes are equal for responses that agree so far: the first position depends on the prompt alone
    first = whole[rollouts.prompt_index == 0][:, 0]
    np.testing.assert_allclose(first, np.broadcast_to(first[0], first.shape), atol=1e-6)

"""Every estimator against its exact twin on policies whose responses can all be listed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step, shifted_model
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change, measure_changes
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.quantity.base import NORMALISATIONS, VERSIONS, make_quantity, quantities
from stepscope.measure.quantity.estimators import ESTIMATORS
from stepscope.measure.quantity.objective import quantity_objective
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.passes import Budget
from stepscope.reference import (
    exact_change,
    exact_derivatives,
    exact_gradient,
    exact_rollouts,
    exact_value,
    list_responses,
    sample_exact,
)

LRS = (1e-6, 1e-3, 1e-1)
VARIANTS = (
    ("llama", {"use_dora": True}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
)


def test_all_responses_are_listed_once_and_their_probabilities_sum_to_one() -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    assert len(rollouts) == len(PROMPTS) * (1 + 4 + 16 + 64)
    assert len(set(zip(rollouts.prompt_ids, rollouts.response_token_ids, strict=True))) == len(rollouts)
    assert probabilities.sum() == pytest.approx(1, abs=1e-14)
    assert rollouts.truncated.sum() == len(PROMPTS) * 64
    assert all(EOS not in r[:-1] for r in rollouts.response_token_ids)
    assert list_responses(3, 1, 0) == [(0,), (1,), (2,)]


def test_too_many_responses_are_refused() -> None:
    with pytest.raises(MeasurementError, match="more than 20000"):
        exact_rollouts(enumerable_policy(length=8), PROMPTS, eos_id=EOS)


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [
        ("qwen2", False),
        ("llama", True),
        ("gpt2", False),
        ("gemma3", True),
        ("mixtral", False),
        *(pytest.param(a, options, marks=pytest.mark.slow) for a, options in VARIANTS),
        *(pytest.param(a, True, marks=pytest.mark.slow) for a in ("qwen2", "qwen3", "gpt2")),
        *(
            pytest.param(a, False, marks=pytest.mark.slow)
            for a in ("qwen3", "llama", "gemma3", "qwen3_moe", "olmoe")
        ),
    ],
)
def test_in_the_limit_every_estimate_is_exact(architecture: str, lora: bool | dict[str, Any]) -> None:
    policy = enumerable_policy(architecture, lora=lora)
    reference = shifted_model(policy)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = random_step(policy)
    found = measure_changes(
        policy,
        step,
        rollouts,
        quantities=[
            variant
            for name in quantities()
            for variant in make_quantity(name, rollouts, policy=policy, reference=reference).variants()
        ],
        lrs=LRS,
        budget=Budget(max_sequences=256),
        options=ChangeOptions(baseline="ridge", second_order=True, sequence_weights=probabilities),
    )
    assert len(found) == 15
    for change in found:
        which = {"normalisation": change.normalisation, "version": change.version, "reference": reference}
        name = f"{change.quantity} {change.normalisation} {change.version}"
        value = exact_value(policy, rollouts, change.quantity, **which).item()
        slope, curvature = exact_derivatives(policy, rollouts, change.quantity, step.direction, **which)
        assert change.value.value == pytest.approx(value, abs=1e-12), name
        assert change.slope.value == pytest.approx(slope, abs=1e-9), name
        assert change.curvature is not None
        assert change.curvature.value == pytest.approx(curvature, rel=1e-9, abs=1e-9), name
        for point in change.points:
            true = exact_change(policy, rollouts, change.quantity, step.direction, point.lr, **which)
            assert point.true.value == pytest.approx(true, abs=1e-12), f"{name} lr {point.lr}"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_in_the_limit_every_estimator_of_the_true_change_is_exact(estimator: str) -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = random_step(policy)
    for change in measure_changes(
        policy,
        step,
        rollouts,
        quantities=[
            make_quantity(name, rollouts, normalisation=n)
            for name in ("entropy", "reward", "logprob")
            for n in NORMALISATIONS
        ],
        lrs=LRS,
        budget=Budget(max_sequences=256),
        options=ChangeOptions(estimator=estimator, sequence_weights=probabilities),
    ):
        for point in change.points:
            true = exact_change(
                policy,
                rollouts,
                change.quantity,
                step.direction,
                point.lr,
                normalisation=change.normalisation,
            )
            assert point.true.value == pytest.approx(true, abs=1e-12), change.quantity


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_surrogate_has_the_exact_gradient(normalisation: str, version: str) -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    weights = torch.from_numpy(probabilities)
    for name in ("entropy", "reward", "length", "logprob"):
        kind = quantities()[name]
        if normalisation not in kind.normalisations or version not in kind.versions:
            continue
        quantity = make_quantity(name, rollouts, normalisation=normalisation, version=version)
        values = values_at(policy, rollouts, [quantity], budget=Budget(max_sequences=256)).quantity(0)
        surrogate = quantity_objective(probe_values(quantity, values, rollouts, probabilities))

        def weighted(outputs: TokenOutputs, batch: TokenBatch) -> torch.Tensor:
            return surrogate(outputs, batch) * weights[batch.seq_index]  # noqa: B023 (used at once)

        found = gradient(policy, rollouts, weighted, budget=Budget(max_sequences=256))
        exact = exact_gradient(policy, rollouts, name, normalisation=normalisation, version=version)
        for parameter, expected in exact.items():
            torch.testing.assert_close(found[parameter], expected, rtol=0, atol=1e-9)


def test_exact_derivatives_are_those_of_the_exact_change() -> None:
    policy = enumerable_policy("gpt2")
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    step = random_step(policy)
    first, second = exact_derivatives(policy, rollouts, "entropy", step.direction)
    h = 1e-4
    up = exact_change(policy, rollouts, "entropy", step.direction, h)
    down = exact_change(policy, rollouts, "entropy", step.direction, -h)
    assert (up - down) / (2 * h) == pytest.approx(first, rel=1e-4)
    assert (up + down) / h**2 == pytest.approx(second, rel=1e-3)


def test_a_sample_agrees_with_the_exact_value_within_its_errors() -> None:
    policy = enumerable_policy(length=4)
    prompts = ((2, 3), (4, 2, 3), (3, 3), (2, 4, 4))
    rollouts, probabilities = exact_rollouts(policy, prompts, eos_id=EOS, reward=digit_reward)
    step = random_step(policy)
    sample, rows = sample_exact(rollouts, probabilities, num_prompts=160, group_size=2, seed=0)
    assert sample.num_prompts == 160
    shares = np.bincount(rows, minlength=len(rollouts)) / len(rows)
    assert np.abs(shares - probabilities).max() < 5 * np.sqrt(probabilities.max() / len(rows))
    for change in measure_changes(
        policy,
        step,
        sample,
        quantities=[
            make_quantity(name, sample, normalisation=n)
            for name in ("entropy", "reward")
            for n in NORMALISATIONS
        ],
        lrs=(1e-3, 1e-2),
        budget=Budget(max_sequences=256),
        options=ChangeOptions(second_order=True),
    ):
        which = {"normalisation": change.normalisation}
        slope, curvature = exact_derivatives(policy, rollouts, change.quantity, step.direction, **which)
        assert change.curvature is not None
        pairs = [(change.slope, slope), (change.curvature, curvature)]
        for point in change.points:
            true = exact_change(policy, rollouts, change.quantity, step.direction, point.lr, **which)
            pairs.append((point.true, true))
        for estimate, exact in pairs:
            assert abs(estimate.value - exact) < 4 * estimate.stderr, estimate.method
            assert estimate.stderr < abs(exact) + 40 * estimate.stderr


def test_round_off_floor_is_the_error_that_float32_makes() -> None:
    policy = enumerable_policy()
    single = replace(policy, model=copy.deepcopy(policy.model).float())
    with torch.no_grad():
        for exact, rounded in zip(policy.model.parameters(), single.model.parameters(), strict=True):
            exact.copy_(rounded.double())
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    step = random_step(single)
    exact_direction = {n: t.double() for n, t in step.direction.items()}

    def measure(lrs: tuple[float, ...]) -> tuple[float, float, list[float]]:
        change = measure_change(
            single,
            replace(step, lr=lrs[0]),
            rollouts,
            lrs=lrs,
            options=ChangeOptions(baseline="none", sequence_weights=probabilities),
        )
        errors = [
            p.true.value - exact_change(policy, rollouts, "entropy", exact_direction, p.lr)
            for p in change.points
        ]
        return change.round_off, change.measurable_from, errors

    floor, start, _ = measure((1e-6,))
    _, _, errors = measure(tuple(start * f for f in (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.3, 2, 3)))
    actual = float(np.sqrt(np.mean(np.square(errors))))
    assert 0.2 < actual / floor < 5

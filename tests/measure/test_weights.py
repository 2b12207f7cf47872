from __future__ import annotations

import numpy as np
import pytest

from enumerable import EOS, PROMPTS, enumerable_policy, random_step
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.importance_weights import check_weights, importance_weights, last_weights
from stepscope.measure.quantity.values import response_mask, values_at
from stepscope.reference import exact_rollouts


def test_weights_are_products_of_ratios_minus_one() -> None:
    before = np.log([[0.5, 0.25, 1.0]])
    after = np.log([[0.6, 0.5, 1.0]])
    weights = importance_weights(before, after)
    np.testing.assert_allclose(weights.before[0], [0, 0.2, 1.4])
    np.testing.assert_allclose(weights.through[0], [0.2, 1.4, 1.4])
    np.testing.assert_allclose(weights.growth[0], [0.2, 1.2, 0])
    np.testing.assert_allclose(weights.whole, [1.4])
    assert last_weights(weights, np.array([[True, True]]), token_dependent=False) == pytest.approx([1.2])
    assert last_weights(weights, np.array([[True, True]]), token_dependent=True) == pytest.approx([2.4])


def test_tiny_changes_keep_their_digits() -> None:
    weights = importance_weights(np.zeros((1, 2)), np.array([[1e-13, 2e-13]]))
    assert weights.whole[0] == pytest.approx(3e-13, rel=1e-10)
    assert weights.growth[0, 1] == pytest.approx(2e-13, rel=1e-10)


def test_mean_is_one_at_every_position_and_growth_has_mean_zero_given_the_prefix() -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    quantities = [make_quantity("entropy", rollouts)]
    direction = random_step(policy).direction
    base = values_at(policy, rollouts, quantities)
    moved = values_at(policy, rollouts, quantities, direction, 0.05)
    weights = importance_weights(base.logprobs, moved.logprobs)
    assert np.abs(weights.whole).max() > 0.1
    np.testing.assert_allclose(probabilities @ weights.before, 0, atol=1e-13)
    np.testing.assert_allclose(probabilities @ weights.through, 0, atol=1e-13)
    mask = response_mask(rollouts)
    rows = [
        i
        for i, (p, r) in enumerate(zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True))
        if p == PROMPTS[0] and r[0] == 3 and mask[i, 1]
    ]
    assert abs(float(probabilities[rows] @ weights.growth[rows, 1])) < 1e-14


def test_untrustworthy_weights_are_named() -> None:
    generator = np.random.default_rng(0)
    assert check_weights(1 + 0.01 * generator.standard_normal(200)).reason == ""
    few = np.full(100, 1e-3)
    few[0] = 100.0
    assert "effective sample size" in check_weights(few).reason
    heavy = 1 + 1e-3 * generator.pareto(0.8, 1000)
    found = check_weights(heavy)
    assert found.pareto_k > 0.7
    assert "Pareto k" in found.reason
    assert check_weights(heavy, np.full(1000, 1e-3)).reason == ""

from __future__ import annotations

import numpy as np
import pytest

from enumerable import EOS, PROMPTS, enumerable_policy, random_step
from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.baselines import (
    LADDER,
    _choose,
    fit_baseline,
    position_mean,
    ridge_critic,
)
from stepscope.measure.quantity.estimators import ProbeValues, returns
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import TokenValues, derivatives, hidden_states, values_at
from stepscope.policy.passes import Budget
from stepscope.reference import exact_rollouts, sample_exact


def test_position_mean_is_over_other_prompts() -> None:
    targets = np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0], [100.0, 50.0]])
    mask = np.array([[True, True], [True, False], [True, True], [True, True]])
    clusters = np.array([0, 0, 1, 2])
    found = position_mean(targets, mask, clusters)
    np.testing.assert_allclose(found[0], [105 / 2, 56 / 2])
    np.testing.assert_allclose(found[1], [105 / 2, 0])
    np.testing.assert_allclose(found[2], [104 / 3, 52 / 2])
    alone = position_mean(targets[:2], mask[:2], clusters[:2])
    assert (alone == 0).all()


def test_nobody_sees_their_own_return() -> None:
    generator = np.random.default_rng(0)
    targets = generator.standard_normal((30, 4))
    features = generator.standard_normal((30, 4, 3))
    mask = generator.random((30, 4)) < 0.9
    mask[:, 0] = True
    clusters = np.repeat(np.arange(15), 2)
    changed = targets.copy()
    changed[clusters == 3] += 100.0
    own = clusters == 3
    for fit in (
        lambda t: position_mean(t, mask, clusters),
        lambda t: ridge_critic(t, features, mask, clusters),
    ):
        before, after = fit(targets), fit(changed)
        np.testing.assert_allclose(before[own], after[own], atol=1e-11)
        assert np.abs(before[~own] - after[~own]).max() > 1


def test_ridge_finds_what_the_features_know() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((200, 5, 4))
    mask = np.ones((200, 5), dtype=bool)
    mask[::3, 3:] = False
    signal = features @ np.array([1.0, -2.0, 0.0, 0.5]) + np.arange(5)
    targets = (signal + 0.1 * generator.standard_normal((200, 5))) * mask
    found = ridge_critic(targets, features, mask, np.arange(200))
    assert (found[~mask] == 0).all()
    assert np.std((targets - found)[mask]) < 0.12
    noise = ridge_critic(generator.standard_normal((200, 5)) * mask, features, mask, np.arange(200))
    assert np.std(noise[mask]) < 0.2


def _probe(
    num_prompts: int, *, on_policy: bool = True, seed: int = 0
) -> tuple[ProbeValues, TokenValues, np.ndarray]:
    policy = enumerable_policy(length=4)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=num_prompts, group_size=1, seed=seed)
    version = "on_policy" if on_policy else "fixed_prefix"
    entropy = make_quantity("entropy", sample, normalisation="per_seq", version=version)
    table = values_at(policy, sample, [entropy], budget=Budget(max_sequences=256))
    (first,) = derivatives(
        policy, sample, [entropy], random_step(policy).direction, budget=Budget(max_sequences=256)
    )
    probe = probe_values(entropy, table.quantity(0), sample)
    return probe, first.quantity(0), hidden_states(policy, sample, budget=Budget(max_sequences=256))


def test_the_best_rung_leaves_the_smallest_error_and_all_are_reported() -> None:
    probe, first, features = _probe(200)
    best = fit_baseline("best", probe, first, features=features)
    assert set(best.stderr) == set(LADDER)
    assert best.stderr[best.kind] <= best.stderr["position"]
    assert best.stderr[best.kind] <= min(best.stderr.values()) / 0.95
    same = fit_baseline(best.kind, probe, first, features=features)
    np.testing.assert_array_equal(same.values, best.values)
    assert fit_baseline("none", probe, first).explained == pytest.approx(0, abs=1e-12)
    current = fit_baseline("current", probe, first)
    np.testing.assert_array_equal(current.values, probe.values.prefix)
    left = (returns(probe.values, probe.mask, 0.0) - best.values)[probe.mask]
    assert best.explained == pytest.approx(
        1 - left.var() / returns(probe.values, probe.mask, 0.0)[probe.mask].var()
    )


def test_a_rung_must_beat_the_default_by_a_margin() -> None:
    assert _choose({"none": 1.0, "current": 0.97, "position": 1.0, "ridge": 0.96}) == "position"
    assert _choose({"none": 0.94, "current": 2.0, "position": 1.0, "ridge": 0.9}) == "ridge"
    nan = float("nan")
    assert _choose({"none": nan, "current": nan, "position": nan}) == "position"


def test_fixed_prefixes_need_none_and_mistakes_are_named() -> None:
    probe, first, features = _probe(12, on_policy=False)
    assert fit_baseline("best", probe, first, features=features).kind == "none"
    probe, first, _ = _probe(64)
    assert set(fit_baseline("best", probe, first).stderr) == {"none", "current", "position"}
    probe, first, features = _probe(63)
    few = fit_baseline("best", probe, first, features=features)
    assert (few.kind, list(few.stderr)) == ("position", ["position"])
    with pytest.raises(MeasurementError, match="hidden states"):
        fit_baseline("ridge", probe, first)
    with pytest.raises(MeasurementError, match="choose from best, none"):
        fit_baseline("critic", probe, first)

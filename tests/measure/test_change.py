from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import cases
from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step
from stepscope.errors import MeasurementError
from stepscope.measure.change import measured
from stepscope.measure.change.estimate import _flagged
from stepscope.measure.change.fresh_samples import resample_change
from stepscope.measure.change.measured import lr_grid
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.quantity.base import make_quantity, quantities
from stepscope.measure.quantity.importance_weights import WeightCheck
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.reference import exact_change, exact_rollouts, sample_exact
from stepscope.results import Rollouts
from stepscope.results.change import Change
from stepscope.stats import Estimate

measure_change = partial(measured.measure_change, budget=Budget(max_sequences=128))
measure_changes = partial(measured.measure_changes, budget=Budget(max_sequences=128))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return enumerable_policy()


@pytest.fixture(scope="module")
def probe(policy: Policy) -> Rollouts:
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    return sample_exact(rollouts, probabilities, num_prompts=60, group_size=2, seed=0)[0]


def test_a_series_holds_what_it_says(policy: Policy, probe: Rollouts) -> None:
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    step = replace(random_step(policy), lr=1e-4)
    change = measure_change(
        policy, step, probe, lrs=[1e-5, 1e-3], options=ChangeOptions(second_order=True, antithetic=True)
    )
    assert [p.lr for p in change.points] == [1e-5, 1e-4, 1e-3]
    assert (change.quantity, change.normalisation, change.version) == ("entropy", "per_token", "on_policy")
    own = change.at(1e-4)
    assert own.true.unit == own.linear.unit == change.value.unit == "nats/token"
    assert own.true.n == 60
    assert own.linear.value == pytest.approx(1e-4 * change.slope.value)
    assert own.second_order is not None
    assert change.curvature is not None
    assert own.second_order.value == pytest.approx(0.5e-8 * change.curvature.value)
    assert own.excess.value == pytest.approx(own.true.value - own.linear.value, rel=1e-6)
    assert own.excess.value == pytest.approx(own.second_order.value, rel=0.05)
    assert own.excess.stderr < 0.1 * own.true.stderr
    assert own.odd is not None
    assert abs(own.odd.value - own.linear.value) < 0.05 * abs(own.excess.value)
    assert own.true.reliable
    assert own.effective_sample_size == pytest.approx(120, rel=1e-3)
    assert change.fit is not None
    assert change.fit.slope == pytest.approx(1, abs=0.05)
    assert change.value.value == pytest.approx(probe.entropy_per_seq.sum() / probe.num_tokens.sum())
    assert change.baseline in change.baseline_stderr
    assert change.measurable_from < 1e-8
    assert change.linear_up_to == pytest.approx(0.2 * abs(change.slope.value / change.curvature.value))
    assert all(torch.equal(p, before[n]) for n, p in policy.parameters.items())
    kept = Change.from_json(change.to_json(), "change.json")
    assert kept.at(own.lr).true == own.true
    assert kept.fit == change.fit
    assert kept.to_json() == change.to_json()


def test_the_same_call_gives_the_same_numbers(policy: Policy, probe: Rollouts) -> None:
    step = random_step(policy)
    one, two = (
        measure_change(policy, step, probe, lrs=[1e-3], options=ChangeOptions(second_order=True))
        for _ in range(2)
    )
    assert one.to_json() == two.to_json()


def test_series_together_are_series_alone(policy: Policy, probe: Rollouts) -> None:
    step = random_step(policy)
    together = measure_changes(
        policy,
        step,
        probe,
        quantities=[v for name in ("entropy", "reward") for v in make_quantity(name, probe).variants()],
        lrs=[1e-3],
    )
    names = [(c.quantity, c.normalisation, c.version) for c in together]
    assert names == [
        ("entropy", "per_token", "on_policy"),
        ("entropy", "per_token", "fixed_prefix"),
        ("entropy", "per_seq", "on_policy"),
        ("entropy", "per_seq", "fixed_prefix"),
        ("reward", "per_token", "on_policy"),
        ("reward", "per_seq", "on_policy"),
    ]
    alone = measure_change(
        policy, step, probe, quantity=make_quantity("reward", probe, normalisation="per_seq"), lrs=[1e-3]
    )
    assert alone.to_json() == together[-1].to_json()
    assert together[1].points[0].effective_sample_size == len(probe)


def test_untrustworthy_points_say_why_and_stay_out_of_the_fit(policy: Policy, probe: Rollouts) -> None:
    change = measure_change(policy, random_step(policy), probe, lrs=[1e-17, 1e-4, 1e-3, 1.0])
    assert not change.at(1.0).true.reliable
    assert "effective sample size" in change.at(1.0).true.reason
    assert not change.at(1e-17).true.reliable
    assert "round-off" in change.at(1e-17).true.reason
    assert change.fit is not None
    assert change.fit.lrs == (1e-4, 1e-3)


def test_float64_is_linear_over_six_decades_down_to_round_off(policy: Policy, probe: Rollouts) -> None:
    lrs = [10.0**power for power in range(-12, -5)]
    step = replace(random_step(policy), lr=1e-6)
    change = measure_change(policy, step, probe, lrs=lrs, options=ChangeOptions(second_order=True))
    assert change.fit is not None
    assert change.fit.lrs == pytest.approx(tuple(lrs))
    assert change.fit.slope == pytest.approx(1, abs=1e-3)
    assert change.fit.r2 > 0.999999
    for point in change.points[:4]:
        assert point.true.value == pytest.approx(point.linear.value, rel=1e-4)
    assert change.measurable_from < 1e-13


def test_the_fit_stays_in_the_linear_regime(policy: Policy, probe: Rollouts) -> None:
    step = replace(random_step(policy), lr=1e-5)
    change = measure_change(
        policy, step, probe, lrs=[1e-6, 1e-4, 5e-2], options=ChangeOptions(second_order=True)
    )
    assert change.at(5e-2).true.reliable
    assert change.linear_up_to is not None
    assert 1e-4 < change.linear_up_to < 5e-2
    assert change.fit is not None
    assert change.fit.lrs == (1e-6, 1e-5, 1e-4)
    beyond = measure_change(
        policy, replace(step, lr=5e-2), probe, lrs=[1e-4], options=ChangeOptions(second_order=True)
    )
    assert beyond.fit is not None
    assert beyond.fit.lrs == (1e-4, 5e-2)


def test_round_off_that_looks_like_a_change_is_flagged() -> None:
    fine = WeightCheck(10.0, 0.1, 10, "")
    seen = Estimate(5.0, 0.1, 10, "nats", "")
    assert _flagged(seen, fine, 0.4).reliable
    assert _flagged(seen, fine, 1.0, expected=4.0).reliable
    assert "round-off" in _flagged(seen, fine, 1.0, expected=2.0).reason
    assert "round-off" in _flagged(seen, fine, 2.0, expected=50.0).reason
    assert _flagged(seen, fine, 0.4, expected=0.0).reliable


def test_one_prompt_has_a_value_but_no_error(policy: Policy, probe: Rollouts) -> None:
    change = measure_change(policy, random_step(policy), probe.select([0, 1]), lrs=[1e-3])
    point = change.points[0]
    assert np.isfinite(point.true.value)
    assert np.isnan(point.true.stderr)
    assert not point.true.reliable
    assert "at least two" in point.true.reason


def test_the_sweep_holds_the_own_learning_rate() -> None:
    np.testing.assert_allclose(lr_grid(1e-5, None), [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
    assert lr_grid(1e-5, [1e-3, 1e-6]) == (1e-6, 1e-5, 1e-3)
    assert lr_grid(0.0, [1e-3]) == (1e-3,)
    with pytest.raises(MeasurementError, match="give the learning rates"):
        lr_grid(0.0, None)
    with pytest.raises(MeasurementError, match="positive"):
        lr_grid(1e-5, [-1.0])


def test_mistakes_are_named(policy: Policy, probe: Rollouts) -> None:
    step = random_step(policy)
    with pytest.raises(MeasurementError, match="unknown estimator"):
        measure_change(policy, step, probe, options=ChangeOptions(estimator="magic"))
    with pytest.raises(MeasurementError, match="unknown baseline"):
        measure_change(policy, step, probe, options=ChangeOptions(baseline="magic"))
    with pytest.raises(MeasurementError, match="nothing to measure"):
        measure_changes(policy, step, probe, quantities=())
    with pytest.raises(MeasurementError, match="constant by definition"):
        make_quantity("length", probe, normalisation="per_token")
    with pytest.raises(MeasurementError, match="unknown version"):
        measure_change(policy, step, probe, quantity=make_quantity("entropy", probe, version="off_policy"))
    with pytest.raises(MeasurementError, match=r"only 0\.001; add it"):
        measure_change(policy, step, probe, lrs=[1e-3]).at(0.5)


def test_a_direction_that_changes_nothing_changes_nothing(policy: Policy, probe: Rollouts) -> None:
    step = random_step(policy)
    still = replace(step, direction={n: torch.zeros_like(t) for n, t in step.direction.items()})
    change = measure_change(policy, still, probe, lrs=[1e-3], options=ChangeOptions(second_order=True))
    assert change.points[0].true.value == 0
    assert change.slope.value == 0
    assert change.measurable_from == float("inf")
    assert change.linear_up_to == float("inf")


def test_the_linear_change_of_a_larger_batch_is_a_control_variate(policy: Policy, probe: Rollouts) -> None:
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    large, _ = sample_exact(rollouts, probabilities, num_prompts=1500, group_size=1, seed=7)
    step = random_step(policy)
    lr = 3e-3
    point = measure_change(policy, step, probe, lrs=[lr]).at(lr)
    slope = measured.measure_slope(policy, step, large, budget=Budget(max_sequences=256))
    found = measured.with_linear_control(point, slope)
    exact = exact_change(policy, rollouts, "entropy", step.direction, lr)
    assert found.stderr < 0.5 * point.true.stderr
    assert abs(found.value - exact) < 4 * found.stderr
    assert "1500 prompts" in found.method
    alone = measured.measure_slope(policy, step, probe)
    assert alone.value == pytest.approx(point.linear.value / lr, rel=1e-9)
    with pytest.raises(MeasurementError, match="constant by definition"):
        measured.measure_slope(
            policy, step, probe, quantity=make_quantity("reward", probe, version="fixed_prefix")
        )


def test_sampling_afresh_agrees(policy: Policy) -> None:
    """Draws from the enumerated distribution at both ends; no weights, no derivatives."""
    step = random_step(policy)
    lr = 0.2
    seeds = iter(range(10))

    def sample() -> Rollouts:
        rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
        return sample_exact(rollouts, probabilities, num_prompts=4000, group_size=1, seed=next(seeds))[0]

    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    for quantity, normalisation in (("entropy", "per_token"), ("length", "per_seq")):
        found = resample_change(
            policy, step, sample, lr=lr, quantity=quantities()[quantity](normalisation=normalisation)
        )
        exact = exact_change(policy, rollouts, quantity, step.direction, lr, normalisation=normalisation)
        assert abs(found.value - exact) < 4 * found.stderr
        assert found.stderr < 0.5 * abs(exact)
        assert "different prompts" in found.method


def test_a_real_step_of_a_real_optimizer_is_measured() -> None:
    policy = cases.policy(group_size=2, max_response_tokens=2)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    drawn, _ = sample_exact(rollouts, probabilities, num_prompts=4, group_size=2, seed=0)
    update = replace(drawn, advantages=drawn.rewards - drawn.rewards.mean())
    step = reconstruct_step(policy, update)
    change = measure_change(policy, step, rollouts, options=ChangeOptions(sequence_weights=probabilities))
    for point in change.points:
        exact = exact_change(policy, rollouts, "entropy", step.direction, point.lr)
        assert point.true.value == pytest.approx(exact, abs=1e-12)

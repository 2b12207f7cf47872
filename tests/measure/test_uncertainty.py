from __future__ import annotations

import numpy as np
import pytest

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.change.uncertainty import estimate_ratio
from stepscope.policy.passes import Budget
from stepscope.reference import exact_rollouts, sample_exact
from stepscope.results.change import Change
from stepscope.stats import jackknife_ratio


@pytest.fixture(scope="module")
def series() -> tuple[dict[str, Change], object]:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    probe, _ = sample_exact(rollouts, probabilities, num_prompts=60, group_size=2, seed=0)
    found = {
        errors: measure_change(
            policy,
            random_step(policy),
            probe,
            lrs=[1e-3],
            budget=Budget(max_sequences=128),
            options=ChangeOptions(errors=errors, second_order=True, antithetic=True),
        )
        for errors in ("delta", "jackknife", "bootstrap")
    }
    return found, probe


def test_three_kinds_of_error_agree(series: tuple) -> None:
    found, _ = series
    for name in ("jackknife", "bootstrap"):
        for one, other in (
            (found["delta"].value, found[name].value),
            (found["delta"].slope, found[name].slope),
            (found["delta"].curvature, found[name].curvature),
            (found["delta"].points[0].true, found[name].points[0].true),
            (found["delta"].points[0].excess, found[name].points[0].excess),
            (found["delta"].points[0].odd, found[name].points[0].odd),
        ):
            assert other.stderr == pytest.approx(one.stderr, rel=0.25), other.method
            assert other.stderr != one.stderr
            assert abs(other.value - one.value) < 0.2 * one.stderr
            assert name in other.method
            assert "given the update batch" in other.method
            assert other.n == one.n == 60


def test_jackknife_of_the_value_is_the_jackknife_of_a_ratio(series: tuple) -> None:
    found, probe = series
    expected = jackknife_ratio(
        probe.entropy_per_seq, probe.num_tokens, probe.prompt_index, unit="", method=""
    )
    assert found["jackknife"].value.value == pytest.approx(expected.value, rel=1e-10)
    assert found["jackknife"].value.stderr == pytest.approx(expected.stderr, rel=1e-8)


def test_bootstrap_of_the_value_is_the_spread_over_resampled_prompts(series: tuple) -> None:
    found, probe = series
    totals, lengths = probe.entropy_per_seq.reshape(60, 2), probe.num_tokens.reshape(60, 2)
    drawn = np.random.default_rng(0).integers(60, size=(400, 60))
    draws = [totals[rows].sum() / lengths[rows].sum() for rows in drawn]
    assert found["bootstrap"].value.stderr == pytest.approx(np.std(draws, ddof=1), rel=1e-10)
    assert found["bootstrap"].value.value == found["delta"].value.value


@pytest.mark.parametrize("errors", ["delta", "jackknife", "bootstrap"])
def test_a_ratio_of_sums_has_the_error_of_the_value_of_a_series(series: tuple, errors: str) -> None:
    found, probe = series
    ratio = estimate_ratio(
        probe.entropy_per_seq,
        probe.num_tokens,
        probe.prompt_index,
        errors=errors,
        unit="nats/token",
        method="ratio of sums",
    )
    assert ratio.value == pytest.approx(found[errors].value.value, rel=1e-10)
    assert ratio.stderr == pytest.approx(found[errors].value.stderr, rel=1e-8)
    assert errors in ratio.method


def test_unknown_kinds_are_refused() -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    with pytest.raises(MeasurementError, match="choose from delta, jackknife, bootstrap"):
        measure_change(
            policy, random_step(policy), rollouts.select(np.arange(4)), options=ChangeOptions(errors="magic")
        )

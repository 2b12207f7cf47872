from __future__ import annotations

import numpy as np
import pytest

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step
from stepscope.measure.change.second_order import second
from stepscope.measure.quantity.baselines import fit_baseline, length_baseline
from stepscope.measure.quantity.estimators import (
    ESTIMATORS,
    Probe,
    Sampled,
    linear,
    per_decision,
    self_normalised,
    value,
    whole_sequence,
)
from stepscope.measure.quantity.quantities import make_quantity
from stepscope.measure.quantity.values import TokenTable, derivatives, hidden_states, response_mask, values_at
from stepscope.policy.passes import Budget
from stepscope.reference import exact_rollouts, sample_exact
from stepscope.stats import jackknife_ratio

LRS = (1e-4, 2e-4, 4e-4, 8e-4)


@pytest.fixture(scope="module")
def tables() -> tuple[TokenTable, tuple[TokenTable, ...], dict[float, TokenTable], np.ndarray, np.ndarray]:
    policy = enumerable_policy(length=4)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=40, group_size=2, seed=0)
    direction = random_step(policy).direction
    quantities = [make_quantity("logprob", sample)]
    slopes = derivatives(policy, sample, quantities, direction, order=2, budget=Budget(max_sequences=128))
    moved = {
        lr: values_at(policy, sample, quantities, direction, lr, budget=Budget(max_sequences=128)).quantity(0)
        for lr in (*LRS, *(-lr for lr in LRS), 1e-9)
    }
    base = values_at(policy, sample, quantities, budget=Budget(max_sequences=128)).quantity(0)
    return base, tuple(s.quantity(0) for s in slopes), moved, response_mask(sample), sample.prompt_index


def _probe(tables: tuple, *, per_token: bool, on_policy: bool = True) -> Probe:
    base, slopes, _, mask, clusters = tables
    probe = Probe(
        base,
        mask,
        clusters,
        per_token,
        on_policy,
        np.zeros(mask.shape),
        length_baseline(mask, clusters),
    )
    return probe.with_baseline(fit_baseline("position", probe, slopes[0]).values)


def _slope(lrs: tuple[float, ...], values: list[float]) -> float:
    return float(np.polyfit(np.log(lrs), np.log(np.abs(values)), 1)[0])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_three_orders_agree_on_the_same_samples(tables: tuple, per_token: bool, on_policy: bool) -> None:
    """true - linear falls as lr^2, and true - linear - second order as lr^3, values and influences alike."""
    probe = _probe(tables, per_token=per_token, on_policy=on_policy)
    _, slopes, moved, _, _ = tables
    first, bend = linear(probe, slopes[0]), second(probe, slopes[0], slopes[1])
    once = [per_decision(probe, moved[lr]).plus(first, -lr) for lr in LRS]
    twice = [s.plus(bend, -(lr**2) / 2) for lr, s in zip(LRS, once, strict=True)]
    assert _slope(LRS, [s.value for s in once]) == pytest.approx(2, abs=0.1)
    assert _slope(LRS, [s.value for s in twice]) == pytest.approx(3, abs=0.2)
    assert _slope(LRS, [float(np.abs(s.influence).mean()) for s in once]) == pytest.approx(2, abs=0.1)
    assert _slope(LRS, [float(np.abs(s.influence).mean()) for s in twice]) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("per_token", [True, False])
def test_the_odd_part_is_free_of_second_order(tables: tuple, per_token: bool) -> None:
    probe = _probe(tables, per_token=per_token)
    _, slopes, moved, _, _ = tables
    first = linear(probe, slopes[0])
    errors = [
        (per_decision(probe, moved[lr]).value - per_decision(probe, moved[-lr]).value) / 2 - lr * first.value
        for lr in LRS
    ]
    assert _slope(LRS, errors) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "regression"])
@pytest.mark.parametrize("per_token", [True, False])
def test_influences_have_mean_zero_and_are_the_derivative_in_the_sequence_weights(
    tables: tuple, name: str, per_token: bool
) -> None:
    """Weight on one sequence moves the estimate by its influence (regression: only as n grows)."""
    base, _, moved, mask, clusters = tables
    estimator = ESTIMATORS[name]
    lr = LRS[-1]
    zeros = np.zeros(mask.shape)

    def estimate(shares: np.ndarray) -> Sampled:
        return estimator(Probe(base, mask, clusters, per_token, True, zeros, zeros, shares), moved[lr])

    count = len(mask)
    even = np.full(count, 1 / count)
    centre = estimator(Probe(base, mask, clusters, per_token, True, zeros, zeros), moved[lr])
    assert centre.value == pytest.approx(estimate(even).value, rel=1e-9)
    assert abs(centre.influence.mean()) < 1e-12
    for i in (0, 7, 33):
        shares = even * (1 - 1e-4)
        shares[i] += 1e-4
        difference = (estimate(shares).value - centre.value) / 1e-4
        assert difference == pytest.approx(centre.influence[i], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("per_token", [True, False])
def test_influences_of_value_slope_and_curvature_are_derivatives_in_the_weights(
    tables: tuple, per_token: bool
) -> None:
    base, slopes, _, mask, clusters = tables
    zeros = np.zeros(mask.shape)

    def estimates(shares: np.ndarray | None) -> list[Sampled]:
        probe = Probe(base, mask, clusters, per_token, True, zeros, zeros, shares)
        return [value(probe), linear(probe, slopes[0]), second(probe, slopes[0], slopes[1])]

    count = len(mask)
    for i in (0, 7, 33):
        shares = np.full(count, (1 - 1e-5) / count)
        shares[i] += 1e-5
        for centre, nudged in zip(estimates(None), estimates(shares), strict=True):
            found = (nudged.value - centre.value) / 1e-5
            assert found == pytest.approx(
                centre.influence[i], rel=2e-3, abs=1e-4 * np.abs(centre.influence).max()
            )


def test_errors_are_clustered_by_prompt_and_agree_with_the_jackknife(tables: tuple) -> None:
    base, _, moved, mask, clusters = tables
    probe = _probe(tables, per_token=True)
    found = probe.estimate(value(probe), unit="nats/token", method="")
    knife = jackknife_ratio(probe.totals, probe.lengths, clusters, unit="nats/token", method="")
    assert found.n == len(set(clusters.tolist())) == 40
    assert found.stderr == pytest.approx(knife.stderr, rel=0.1)
    alone = Probe(base, mask, np.arange(len(mask)), True, True, probe.baseline, probe.length_baseline)
    assert alone.estimate(value(alone), unit="", method="").stderr != found.stderr
    change = per_decision(probe, moved[LRS[0]])
    assert probe.estimate(change, unit="", method="").value == change.value


def test_small_changes_keep_their_digits(tables: tuple) -> None:
    """At lr = 1e-9 all estimators see the derivative to six digits of float64's round-off."""
    probe = _probe(tables, per_token=True)
    _, slopes, moved, _, _ = tables
    assert per_decision(probe, moved[1e-9]).value == pytest.approx(
        1e-9 * linear(probe, slopes[0]).value, rel=1e-5
    )
    assert self_normalised(probe, moved[1e-9]).value == pytest.approx(
        self_normalised(probe, moved[LRS[0]]).value * 1e-9 / LRS[0], rel=0.05
    )


def test_whole_sequence_weights_are_noisier_where_the_quantity_is_spread_over_positions() -> None:
    policy = enumerable_policy(length=4)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=300, group_size=1, seed=0)
    quantities = [make_quantity("entropy", sample)]
    direction = random_step(policy).direction
    (first,) = derivatives(policy, sample, quantities, direction, budget=Budget(max_sequences=256))
    base, moved = (
        values_at(policy, sample, quantities, direction, lr, budget=Budget(max_sequences=256)).quantity(0)
        for lr in (0, 1e-3)
    )
    mask, clusters = response_mask(sample), sample.prompt_index
    zeros = np.zeros(mask.shape)
    probe = Probe(base, mask, clusters, True, True, zeros, length_baseline(mask, clusters))
    features = hidden_states(policy, sample, budget=Budget(max_sequences=256))
    best = fit_baseline("best", probe, first.quantity(0), features=features)
    errors = {
        name: probe.estimate(s, unit="", method="").stderr
        for name, s in {
            "ours": per_decision(probe.with_baseline(best.values), moved),
            "whole": whole_sequence(probe, moved),
        }.items()
    }
    assert errors["whole"] > 1.4 * errors["ours"]

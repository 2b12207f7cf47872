from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step
from stepscope.measure.change.second_order import second
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.baselines import fit_baseline, length_baseline
from stepscope.measure.quantity.estimators import (
    ESTIMATORS,
    Baseline,
    ProbeValues,
    Sampled,
    linear,
    per_decision,
    self_normalised,
    value,
    whole_sequence,
)
from stepscope.measure.quantity.kinds.logprob import LogProb
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import (
    TokenValues,
    derivatives,
    hidden_states,
    response_mask,
    values_at,
)
from stepscope.policy.passes import Budget
from stepscope.reference import exact_rollouts, sample_exact
from stepscope.stats import jackknife_ratio

LRS = (1e-4, 2e-4, 4e-4, 8e-4)


@pytest.fixture(scope="module")
def tables() -> tuple[TokenValues, tuple[TokenValues, ...], dict[float, TokenValues], np.ndarray, np.ndarray]:
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


def _probe(tables: tuple, *, per_token: bool, on_policy: bool = True) -> ProbeValues:
    base, slopes, _, mask, clusters = tables
    probe = _without_baseline(base, mask, clusters, per_token=per_token, on_policy=on_policy)
    return replace(
        probe,
        length_baseline=length_baseline(mask, clusters),
        baseline=fit_baseline("position", probe, slopes[0]),
    )


def _without_baseline(
    base: TokenValues,
    mask: np.ndarray,
    clusters: np.ndarray,
    shares: np.ndarray | None = None,
    *,
    per_token: bool,
    on_policy: bool = True,
) -> ProbeValues:
    quantity = LogProb(
        normalisation="per_token" if per_token else "per_seq",
        version="on_policy" if on_policy else "fixed_prefix",
    )
    zeros = np.zeros(mask.shape)
    return ProbeValues(quantity, base, mask, clusters, Baseline("none", zeros), zeros, shares)


def _slope(lrs: tuple[float, ...], values: list[float]) -> float:
    return float(np.polyfit(np.log(lrs), np.log(np.abs(values)), 1)[0])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_three_orders_agree_on_the_same_samples(tables: tuple, per_token: bool, on_policy: bool) -> None:
    """true - linear falls as lr^2, and true - linear - second order as lr^3, values and residuals alike."""
    probe = _probe(tables, per_token=per_token, on_policy=on_policy)
    _, slopes, moved, _, _ = tables
    first, bend = linear(probe, slopes[0]), second(probe, slopes[0], slopes[1])
    once = [per_decision(probe, moved[lr]).plus(first, -lr) for lr in LRS]
    twice = [s.plus(bend, -(lr**2) / 2) for lr, s in zip(LRS, once, strict=True)]
    assert _slope(LRS, [s.value for s in once]) == pytest.approx(2, abs=0.1)
    assert _slope(LRS, [s.value for s in twice]) == pytest.approx(3, abs=0.2)
    assert _slope(LRS, [float(np.abs(s.residuals).mean()) for s in once]) == pytest.approx(2, abs=0.1)
    assert _slope(LRS, [float(np.abs(s.residuals).mean()) for s in twice]) == pytest.approx(3, abs=0.2)


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
def test_residuals_have_mean_zero_and_are_the_derivative_in_the_sequence_weights(
    tables: tuple, name: str, per_token: bool
) -> None:
    """Weight on one sequence moves the estimate by its residual (regression: only as n grows)."""
    base, _, moved, mask, clusters = tables
    estimator = ESTIMATORS[name]
    lr = LRS[-1]

    def estimate(shares: np.ndarray) -> Sampled:
        return estimator(_without_baseline(base, mask, clusters, shares, per_token=per_token), moved[lr])

    count = len(mask)
    even = np.full(count, 1 / count)
    centre = estimator(_without_baseline(base, mask, clusters, per_token=per_token), moved[lr])
    assert centre.value == pytest.approx(estimate(even).value, rel=1e-9)
    assert abs(centre.residuals.mean()) < 1e-12
    for i in (0, 7, 33):
        shares = even * (1 - 1e-4)
        shares[i] += 1e-4
        difference = (estimate(shares).value - centre.value) / 1e-4
        assert difference == pytest.approx(centre.residuals[i], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("per_token", [True, False])
def test_residuals_of_value_slope_and_curvature_are_derivatives_in_the_weights(
    tables: tuple, per_token: bool
) -> None:
    base, slopes, _, mask, clusters = tables

    def estimates(shares: np.ndarray | None) -> list[Sampled]:
        probe = _without_baseline(base, mask, clusters, shares, per_token=per_token)
        return [value(probe), linear(probe, slopes[0]), second(probe, slopes[0], slopes[1])]

    count = len(mask)
    for i in (0, 7, 33):
        shares = np.full(count, (1 - 1e-5) / count)
        shares[i] += 1e-5
        for centre, nudged in zip(estimates(None), estimates(shares), strict=True):
            found = (nudged.value - centre.value) / 1e-5
            assert found == pytest.approx(
                centre.residuals[i], rel=2e-3, abs=1e-4 * np.abs(centre.residuals).max()
            )


def test_errors_are_clustered_by_prompt_and_agree_with_the_jackknife(tables: tuple) -> None:
    _, _, moved, mask, clusters = tables
    probe = _probe(tables, per_token=True)
    found = probe.estimate(value(probe), unit="nats/token", method="")
    knife = jackknife_ratio(probe.totals, probe.lengths, clusters, unit="nats/token", method="")
    assert found.n == len(set(clusters.tolist())) == 40
    assert found.stderr == pytest.approx(knife.stderr, rel=0.1)
    alone = replace(probe, clusters=np.arange(len(mask)))
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
    probe = probe_values(quantities[0], base, sample)
    features = hidden_states(policy, sample, budget=Budget(max_sequences=256))
    best = fit_baseline("best", probe, first.quantity(0), features=features)
    errors = {
        name: probe.estimate(s, unit="", method="").stderr
        for name, s in {
            "ours": per_decision(replace(probe, baseline=best), moved),
            "whole": whole_sequence(probe, moved),
        }.items()
    }
    assert errors["whole"] > 1.4 * errors["ours"]

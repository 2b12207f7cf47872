"""Statistics against closed forms, brute force and simulation."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from cases import estimate_of
from stepscope.loglog import loglog_fit
from stepscope.measure.quantity.importance_weights import effective_sample_size, pareto_k
from stepscope.stats import (
    NOT_FINITE,
    Estimate,
    bootstrap,
    clustered_mean,
    clustered_ratio,
    jackknife_ratio,
    pass_at_k,
)


def _clustered_sample(generator, num_clusters, size, between, within):
    effects = generator.normal(0, between, num_clusters).repeat(size)
    return effects + generator.normal(0, within, num_clusters * size)


def test_mean_of_singleton_clusters_has_the_textbook_error():
    x = np.random.default_rng(0).normal(size=50)
    got = clustered_mean(x, np.arange(50), unit="nats", method="m")
    assert got.value == pytest.approx(x.mean(), rel=1e-14)
    assert got.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(50), rel=1e-12)
    assert (got.n, got.unit, got.method, got.reliable) == (50, "nats", "m", True)


def test_mean_of_equal_clusters_has_the_error_of_the_cluster_means():
    x = _clustered_sample(np.random.default_rng(1), 20, 8, 1.0, 0.5)
    means = x.reshape(20, 8).mean(1)
    got = clustered_mean(x, np.arange(20).repeat(8), unit="", method="")
    assert got.stderr == pytest.approx(means.std(ddof=1) / np.sqrt(20), rel=1e-12)
    assert got.n == 20


def test_mean_error_covers_the_truth_where_the_naive_error_does_not():
    generator = np.random.default_rng(2)
    clusters = np.arange(40).repeat(8)
    clustered = naive = 0
    for _ in range(600):
        x = _clustered_sample(generator, 40, 8, 1.0, 1.0)
        got = clustered_mean(x, clusters, unit="", method="")
        clustered += abs(got.value) < 2.02 * got.stderr
        naive += abs(got.value) < 2.02 * x.std(ddof=1) / np.sqrt(len(x))
    assert 0.92 <= clustered / 600 <= 0.98
    assert naive / 600 < 0.75


def test_one_cluster_gives_no_error_and_says_so():
    for function in (clustered_ratio, jackknife_ratio):
        got = function([1.0, 2.0], [1.0, 1.0], [3, 3], unit="", method="")
        assert got.value == 1.5
        assert np.isnan(got.stderr)
        assert not got.reliable
        assert "at least two" in got.reason


def test_ratio_error_matches_simulation():
    generator = np.random.default_rng(3)
    clusters = np.arange(60).repeat(4)
    values, delta, jack = [], [], []
    for _ in range(800):
        length = generator.poisson(6, 240) + 1.0 + generator.poisson(3, 60).repeat(4)
        x = length * generator.gamma(2.0, 0.5, 240)
        values.append(x.sum() / length.sum())
        delta.append(clustered_ratio(x, length, clusters, unit="", method="").stderr)
        jack.append(jackknife_ratio(x, length, clusters, unit="", method="").stderr)
    spread = np.std(values, ddof=1)
    assert np.mean(delta) == pytest.approx(spread, rel=0.08)
    assert np.mean(jack) == pytest.approx(spread, rel=0.08)


def test_jackknife_by_brute_force_and_its_bias_correction():
    generator = np.random.default_rng(4)
    x, y = generator.normal(3, 1, 30), generator.gamma(2, 1, 30)
    clusters = np.arange(10).repeat(3)
    without = np.array([x[clusters != g].sum() / y[clusters != g].sum() for g in range(10)])
    got = jackknife_ratio(x, y, clusters, unit="", method="")
    assert got.stderr == pytest.approx(np.sqrt(9 / 10 * ((without - without.mean()) ** 2).sum()), rel=1e-12)
    assert got.value == pytest.approx(10 * x.sum() / y.sum() - 9 * without.mean(), rel=1e-12)
    # x is independent of y: E[x]/E[y] = 1.5, the plain ratio is biased upwards, the corrected one much less
    plain, corrected = [], []
    for _ in range(20000):
        x, y = generator.normal(3, 0.1, 5), generator.gamma(2, 1, 5)
        plain.append(x.sum() / y.sum())
        corrected.append(jackknife_ratio(x, y, np.arange(5), unit="", method="").value)
    assert abs(np.mean(corrected) - 1.5) < 0.4 * abs(np.mean(plain) - 1.5)


def test_labels_of_clusters_do_not_matter():
    x = np.random.default_rng(5).normal(size=12)
    numbers = np.arange(4).repeat(3)
    names = np.array(["d", "a", "c", "b"]).repeat(3)
    a, b = (clustered_mean(x, c, unit="", method="") for c in (numbers, names))
    assert a.stderr == pytest.approx(b.stderr, rel=1e-14)


def test_bootstrap_agrees_with_the_clustered_error_and_repeats():
    x = _clustered_sample(np.random.default_rng(6), 50, 6, 1.0, 1.0)
    clusters = np.arange(50).repeat(6)
    got = bootstrap(lambda i: float(x[i].mean()), clusters, num_resamples=2000, seed=0)
    want = clustered_mean(x, clusters, unit="", method="")
    assert got.stderr == pytest.approx(want.stderr, rel=0.08)
    assert got.low < want.value < got.high
    assert got.high - got.low == pytest.approx(2 * 1.96 * want.stderr, rel=0.12)
    assert bootstrap(lambda i: float(x[i].mean()), clusters, num_resamples=50, seed=1) == bootstrap(
        lambda i: float(x[i].mean()), clusters, num_resamples=50, seed=1
    )


def test_effective_sample_size():
    assert effective_sample_size(np.full(17, 0.3)) == pytest.approx(17)
    assert effective_sample_size([1.0, 0, 0]) == 1
    assert np.isnan(effective_sample_size([0.0, 0.0]))


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.8, 1.2])
def test_pareto_k_of_generalised_pareto_draws(shape):
    generator = np.random.default_rng(7)
    found = [pareto_k(((1 - generator.random(4000)) ** -shape - 1) / shape) for _ in range(150)]
    tail = 190  # 3 sqrt(4000): ten points of prior at 0.5 against 190 of data
    assert np.mean(found) == pytest.approx((tail * shape + 10 * 0.5) / (tail + 10), abs=0.04)


def test_pareto_k_is_free_of_scale_and_offset_and_light_for_bounded_tails():
    generator = np.random.default_rng(8)
    w = (1 - generator.random(1000)) ** -0.6
    assert pareto_k(1e6 * w) == pytest.approx(pareto_k(w), rel=1e-9)
    assert pareto_k(3.0 + w) == pytest.approx(pareto_k(w), rel=1e-6)
    assert pareto_k(1 + 1e-9 * generator.normal(size=1000)) < 0.3


def test_pareto_k_without_a_tail_is_nan():
    assert np.isnan(pareto_k(np.ones(1000)))
    assert np.isnan(pareto_k(np.arange(1, 21)))
    assert not np.isnan(pareto_k(np.random.default_rng(0).random(26)))


@pytest.mark.parametrize(("n", "k"), [(5, 1), (5, 2), (6, 6), (8, 3)])
def test_pass_at_k_counts_all_subsets(n, k):
    for c in range(n + 1):
        correct = [i < c for i in range(n)]
        subsets = list(combinations(range(n), k))
        want = np.mean([any(correct[i] for i in subset) for subset in subsets])
        assert float(pass_at_k(n, c, k)) == pytest.approx(want, abs=1e-12)


def test_pass_at_k_is_unbiased_in_simulation():
    """Eight samples of prompts solved with chance p estimate 1 - (1 - p)^k."""
    generator = np.random.default_rng(4)
    for p in (0.02, 0.3, 0.6):
        correct = generator.binomial(8, p, size=40_000)
        for k in (1, 3, 8):
            estimates = pass_at_k(8, correct, k)
            assert abs(estimates.mean() - (1 - (1 - p) ** k)) < 4 * estimates.std() / 200, (p, k)


def test_pass_at_k_over_arrays_and_refusals():
    np.testing.assert_allclose(pass_at_k(8, [0, 4, 8], 1), [0, 0.5, 1], atol=1e-12)
    with pytest.raises(ValueError, match="at least 9 samples"):
        pass_at_k(8, [1], 9)
    with pytest.raises(ValueError, match="between 0 and"):
        pass_at_k(8, [9], 1)


def test_loglog_fit_of_a_power_law():
    x = np.logspace(-9, -4, 6)
    fit = loglog_fit(x, -3.0 * x**1.25)
    assert fit.slope == pytest.approx(1.25, abs=1e-12)
    assert np.exp(fit.intercept) == pytest.approx(3.0, rel=1e-10)
    assert fit.r2 == pytest.approx(1, abs=1e-12)
    assert fit.n == 6
    assert fit.lrs == tuple(x)


def test_loglog_fit_leaves_out_what_has_no_logarithm():
    fit = loglog_fit([1e-3, 1e-2, 1e-1, 1.0], [0.0, 1e-2, float("nan"), 1.0])
    assert fit.lrs == (1e-2, 1.0)
    assert fit.slope == pytest.approx(1)
    assert np.isnan(loglog_fit([1e-3], [1.0]).slope)


def test_loglog_slope_error_matches_simulation():
    generator = np.random.default_rng(9)
    x = np.logspace(-6, -2, 9)
    fits = [loglog_fit(x, x * np.exp(generator.normal(0, 0.1, 9))) for _ in range(2000)]
    assert np.sqrt(np.mean([f.slope_stderr**2 for f in fits])) == pytest.approx(
        np.std([f.slope for f in fits]), rel=0.06
    )


def test_estimate_round_trip_reads_null_as_nan():
    estimate = Estimate(1.5, 0.1, 7, "nats", "m", reliable=False, reason="few")
    assert estimate_of(asdict(estimate)) == estimate
    assert np.isnan(estimate_of({**asdict(estimate), "stderr": None}).stderr)


@pytest.mark.parametrize(
    ("value", "stderr"), [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, np.nan), (1.0, np.inf), (1.0, -0.5)]
)
def test_what_is_no_number_is_never_reliable(value, stderr):
    made = Estimate(value, stderr, 5, "1", "m")
    assert (made.reliable, made.reason) == (False, NOT_FINITE)
    assert not replace(made, reliable=True).reliable
    assert Estimate(value, stderr, 5, "1", "m", False, "too few").reason == "too few"
    assert not estimate_of(asdict(made) | {"reliable": True, "reason": ""}).reliable


def test_an_estimate_prints_as_people_say_it():
    """Student's 97.5 % quantile for four degrees of freedom is 2.776."""
    made = Estimate(0.5, 0.125, 5, "nats/token", "m")
    assert repr(made) == str(made) == "0.5 +- 0.12 nats/token (95 % 0.1529 to 0.8471, n = 5)"
    assert repr(made.doubted("too few")).endswith("n = 5); not reliable: too few")
    assert repr(Estimate(12.0, np.nan, 3, "1", "exact")) == "12 (n = 3)"


def test_an_exact_figure_without_an_error_is_reliable():
    assert Estimate(0.5, np.nan, 5, "1", "exact").reliable

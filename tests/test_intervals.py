"""95 % intervals: what they are made of, what they do at the edges, and how they are stored."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cases import estimate_of
from stepscope.intervals import FEW, proportion, student, studentised
from stepscope.stats import Estimate, clustered_mean, paired_ratio_difference

NAN, INF = float("nan"), float("inf")


def test_student_is_that_of_scipy_and_is_the_default() -> None:
    assert student(9) == pytest.approx(scipy_stats.t.ppf(0.975, 8))
    assert np.isnan(student(1))
    made = Estimate(2.0, 0.5, 9, "1", "")
    assert (made.low, made.high) == pytest.approx((2 - student(9) * 0.5, 2 + student(9) * 0.5))
    exact = Estimate(2.0, 0.0, 1, "1", "")
    assert (exact.low, exact.high, exact.resolved) == (2.0, 2.0, True)
    nothing = Estimate(2.0, NAN, 1, "1", "")
    assert np.isnan(nothing.low)
    assert not nothing.resolved


def test_resolved_and_reliable_say_different_things() -> None:
    far = Estimate(17.7, 246.0, 8, "1", "")
    assert (far.reliable, far.resolved) == (True, False)
    doubtful = Estimate(5.0, 1.0, 50, "1", "").doubted("", "a heavy tail")
    assert (doubtful.reliable, doubtful.resolved, doubtful.reason) == (False, True, "a heavy tail")
    assert doubtful.doubted("no baseline").reason == "a heavy tail; no baseline"
    assert far.doubted("") == far


def test_ends_go_with_the_value_and_through_json() -> None:
    made = Estimate(3.0, 1.0, 20, "nats", "", low=1.0, high=4.0)
    turned = made.scaled(-2.0, unit="bits")
    assert (turned.value, turned.stderr, turned.unit) == (-6.0, 2.0, "bits")
    assert (turned.low, turned.high) == (-8.0, -2.0)
    assert estimate_of(json.loads(json.dumps(asdict(made)))) == made
    endless = estimate_of({**asdict(made), "low": None, "high": None})
    assert (endless.low, endless.high) == (-INF, INF)
    limit = {**asdict(made), "value": None, "stderr": None, "reliable": False, "high": None}
    found = estimate_of(limit)
    assert (found.low, found.high) == (1.0, INF)


def test_studentised_is_the_quantile_of_resampled_t() -> None:
    rng = np.random.default_rng(5)
    sums = rng.exponential(size=(20, 3)) - 1
    sums -= sums.mean(0)
    size = 20 - round(np.sqrt(20))
    drawn = rng.integers(20, size=(20_000, size))
    for item in range(3):
        x = sums[:, item][drawn]
        t = np.abs(x.mean(1)) / (x.std(1, ddof=1) / np.sqrt(size))
        wanted = max(float(np.quantile(t, 0.95)), student(20))
        assert studentised(sums)[item] == pytest.approx(wanted, rel=0.1)
    assert studentised(sums).tolist() == studentised(sums).tolist()
    assert studentised(rng.normal(size=(FEW, 2))).tolist() == [student(FEW)] * 2


@pytest.mark.parametrize("count", [8, 16])
def test_prompts_that_are_all_alike_have_no_interval(count: int) -> None:
    same = clustered_mean(np.ones(count), np.arange(count), unit="", method="")
    assert "too much alike" in same.reason
    one = np.eye(count)[0]
    lone = clustered_mean(one, np.arange(count), unit="", method="")
    assert not lone.reliable
    assert (lone.low, lone.high) == (-INF, INF)
    assert not lone.resolved
    few = clustered_mean(np.arange(7.0), np.arange(7), unit="", method="")
    assert "7 prompts" in few.reason


def test_paired_rows_are_judged_by_their_difference() -> None:
    rng = np.random.default_rng(0)
    level, ones = rng.normal(size=60), np.ones(60)
    change = 0.1 + 0.05 * rng.normal(size=60)
    before, after = (clustered_mean(x, np.arange(60), unit="", method="") for x in (level, level + change))
    assert before.high > after.low
    paired = paired_ratio_difference((level, ones), (level + change, ones), np.arange(60), unit="", method="")
    assert paired.resolved


def test_a_proportion_stays_open_where_all_agree() -> None:
    low, high = proportion(np.ones(256))
    assert high == 1.0
    assert low == pytest.approx(scipy_stats.beta.ppf(0.025, 256.5, 0.5), abs=5e-4)
    assert proportion(np.zeros(16)) == pytest.approx((0.0, 1 - proportion(np.ones(16))[0]))
    rng = np.random.default_rng(2)
    shares = rng.beta(2.0, 2.0, size=2000)
    wide = student(2000) * shares.std(ddof=1) / np.sqrt(2000)
    assert proportion(shares) == pytest.approx((shares.mean() - wide, shares.mean() + wide), abs=5e-4)
    assert np.isnan(proportion(np.ones(1))).all()

"""Statistics of scores against truths: scipy on the batch itself, and on resamples written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau, mannwhitneyu, pearsonr, spearmanr

from stepscope.measure.criteria.statistics import LARGE, SHARES, Comparison, compare, left_out

NUM, PROMPTS = 60, 6


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores (a noisy one, one with ties, a mask), which are signed, truths with ties, and prompts."""
    rng = np.random.default_rng(0)
    truths = rng.standard_t(3, (2, NUM))
    truths[1] = np.round(truths[1])
    noisy = truths[0] + rng.normal(size=NUM)
    scores = np.stack([noisy, np.round(noisy), (np.abs(noisy) > 1).astype(float)])
    return scores, np.array([True, True, False]), truths, rng.permutation(np.arange(NUM) % PROMPTS)


COUNTS = np.concatenate(
    [
        left_out(np.arange(PROMPTS)),
        np.random.default_rng(3).multinomial(PROMPTS, np.full(PROMPTS, 1 / PROMPTS), size=4),
    ]
)
"""The batch, then without each of the six prompts, then four draws with repeats."""


@pytest.fixture(scope="module")
def found(case) -> Comparison:
    return compare(*case, counts=COUNTS)


def test_what_differs_by_round_off_is_a_tie(case, found):
    scores, signed, truths, prompts = case
    rng = np.random.default_rng(1)
    noise = [1e-14 * rng.normal(size=values.shape) for values in (scores, truths)]
    shaken = compare(scores + noise[0], signed, truths + noise[1], prompts, counts=COUNTS)
    for name in ("spearman", "kendall", "auc", "captured"):
        np.testing.assert_allclose(getattr(shaken, name), getattr(found, name), atol=1e-12)


def written_out(case, resample: int) -> np.ndarray:
    """Items of a resample, with repeats."""
    return np.repeat(np.arange(NUM), COUNTS[resample].astype(int)[case[3]])


def test_each_prompt_is_left_out_once_and_many_in_groups():
    np.testing.assert_array_equal(
        left_out(np.array([0, 2, 1, 1])), [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]
    )
    np.testing.assert_array_equal(left_out(np.zeros(3, dtype=int)), [[1]])
    many = left_out(np.arange(150))
    assert many.shape == (65, 150)
    np.testing.assert_array_equal((1 - many).sum(0), 1)
    assert set((1 - many[1:]).sum(1)) == {2, 3}


@pytest.mark.parametrize("resample", [0, 1, 6, 7, 10])
def test_correlations_are_those_of_the_resample_written_out(case, found, resample):
    scores, signed, truths, _ = case
    items = written_out(case, resample)
    for c, score in enumerate(scores):
        for t, truth in enumerate(truths):
            x, y = score[items], (truth if signed[c] else np.abs(truth))[items]
            assert found.spearman[resample, c, t] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
            assert found.pearson[resample, c, t] == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
            assert found.kendall[resample, c, t] == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("resample", [0, 5, 8])
def test_auc_is_the_mann_whitney_statistic(case, found, resample):
    scores, _, truths, _ = case
    items = written_out(case, resample)
    for c, score in enumerate(scores):
        for t, truth in enumerate(truths):
            large = (np.abs(truth) >= np.quantile(np.abs(truth), 1 - LARGE))[items]
            size = np.abs(score[items])
            u = mannwhitneyu(size[large], size[~large]).statistic
            assert found.auc[resample, c, t] == pytest.approx(u / large.sum() / (~large).sum(), abs=1e-12)


def test_sign_agreement_counts_what_has_a_sign(case, found):
    scores, _, truths, _ = case
    known = (scores[1] != 0) & (truths[1] != 0)
    assert 0 < known.sum() < NUM
    expected = (np.sign(scores[1]) == np.sign(truths[1]))[known].mean()
    assert found.sign_agreement[0, 1, 1] == pytest.approx(expected)
    assert np.isnan(found.sign_agreement[:, 2]).all()


def test_captured_shares_by_hand():
    truth = np.array([[8.0, -4.0, 2.0, -1.0, 1.0] * 2])
    scores = np.array([[0.0, 3.0, 0.0, 0.0, 0.0] * 2, [-9.0, 1.0, 2.0, 3.0, 4.0] * 2])
    found = compare(scores, np.array([True, True]), truth, np.arange(10) % 2)
    assert SHARES == (0.0002, 0.01, 0.1)
    total = 32.0
    # one of ten items in every case: half of each of the two tied at the edge
    np.testing.assert_allclose(found.captured[:, 0, 0, 0], 4 / total)
    np.testing.assert_allclose(found.captured[:, 0, 1, 0], 8 / total)
    np.testing.assert_allclose(found.best[:, 0, 0], 8 / total)


def test_ties_share_what_is_left():
    truth = np.arange(1.0, 41.0)[None]
    mask = (np.arange(40) >= 32).astype(float)[None]
    found = compare(mask, np.array([False]), truth, np.arange(40))
    assert found.captured[2, 0, 0, 0] == pytest.approx(0.5 * truth[0, 32:].sum() / truth.sum())


def test_captured_shares_of_a_resample(case, found):
    scores, _, truths, _ = case
    items = written_out(case, 9)
    size, value = np.abs(scores[0])[items], np.abs(truths[0])[items]
    wanted = 0.1 * len(items)
    left, share = wanted, 0.0
    for level in np.unique(size)[::-1]:
        tied = size == level
        part = min(1.0, left / tied.sum())
        share += part * value[tied].sum()
        left -= part * tied.sum()
        if left <= 0:
            break
    assert found.captured[2, 9, 0, 0] == pytest.approx(share / value.sum(), rel=1e-12)


def test_a_constant_score_has_no_correlation():
    rng = np.random.default_rng(1)
    found = compare(np.full((1, 30), 0.3), np.array([True]), rng.normal(size=(1, 30)), np.arange(30) % 3)
    assert np.isnan(found.spearman).all()
    assert np.isnan(found.pearson).all()
    assert found.auc[0, 0, 0] == 0.5


def test_many_items_are_resampled_in_blocks(monkeypatch, case, found):
    monkeypatch.setattr("stepscope.measure.criteria.statistics.BLOCK", 5 * NUM)
    again = compare(*case, counts=COUNTS)
    np.testing.assert_array_equal(again.spearman, found.spearman)
    np.testing.assert_allclose(again.captured, found.captured, rtol=1e-14)

"""Reliability of rankings against closed forms: items with a known share of signal, folds of known noise."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import spearmanr

import cases
from stepscope.measure.influence.attribution import InfluenceOptions, influence, influences
from stepscope.measure.influence.reliability import (
    halvings,
    implied_gain,
    prompts_for,
    reliabilities,
    spearman_brown,
    split_half,
)
from stepscope.measure.influence.shrinkage import shrink, shrunk_influence
from stepscope.measure.quantity.base import make_quantity

EQUAL = np.full(8, 1 / 8)


def drawn(
    rng: np.random.Generator, items: int, noise: float, folds: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """A standard normal signal, and what folds say of it; the mean of all has noise of variance ``noise``."""
    signal = rng.standard_normal(items)
    return signal, signal + math.sqrt(noise * folds) * rng.standard_normal((folds, items))


def test_spearman_brown_is_the_variance_ratio() -> None:
    """With signal variance 1 and noise q/n the reliability of n prompts is 1 / (1 + q/n)."""
    for n, more in ((10, 40), (256, 128)):
        assert spearman_brown(1 / (1 + 50 / n), more / n) == pytest.approx(1 / (1 + 50 / more))
    needed = prompts_for(1 / (1 + 50 / 10), 10)
    assert 1 / (1 + 50 / needed) == pytest.approx(0.9)
    assert spearman_brown(-0.4, 8.0) == -0.4
    assert math.isnan(prompts_for(-0.1, 10))


def test_halves_are_all_and_each_once() -> None:
    for count, ways in ((2, 1), (4, 3), (7, 35), (8, 35)):
        found = {frozenset(map(int, half)) for half in halvings(count)}
        assert len(found) == ways
        if count % 2 == 0:
            assert not any(set(range(count)) - half in found for half in found)


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_the_stepped_up_correlation_is_that_of_two_probes(noise: float) -> None:
    """Mean over simulated probes against r = 1/(1 + noise), and the jackknife's error against the spread."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(60):
        _, values = drawn(rng, 200, noise)
        found.append(split_half(values, EQUAL, rank=False).whole)
    values = np.array([e.value for e in found])
    assert values.mean() == pytest.approx(1 / (1 + noise), abs=3 * values.std() / math.sqrt(60) + 0.01)
    # the items are given: only what differs between probes of the same items is error
    signal, _ = drawn(rng, 200, noise)
    again = [
        split_half(signal + math.sqrt(8 * noise) * rng.standard_normal((8, 200)), EQUAL).whole
        for _ in range(60)
    ]
    spread = np.std([e.value for e in again])
    assert 0.6 < np.mean([e.stderr for e in again]) / spread < 1.7
    assert all(e.reliable for e in again)


def test_prediction_and_truth_on_other_halves_do_not_share_noise() -> None:
    """The same noise in both: 1 on the same probe, the reliability across halves."""
    rng = np.random.default_rng(4)
    _, values = drawn(rng, 5000, 1.0)
    assert split_half(values, EQUAL, values, rank=False).whole.value == pytest.approx(0.5, abs=0.04)
    alone = rng.standard_normal((8, 5000))
    across = split_half(alone, EQUAL, alone)
    assert abs(across.halves.value) < 0.03


def test_no_signal_is_flagged_and_not_stepped_up() -> None:
    values = np.random.default_rng(6).standard_normal((8, 40))
    values -= values.mean(0)
    found = split_half(values, EQUAL)
    assert found.halves.value < 0
    assert found.whole.value == found.halves.value
    assert "do not agree" in found.whole.reason
    few = split_half(values[:2], np.array([0.5, 0.5]))
    assert "2 folds" in few.whole.reason
    assert not few.whole.reliable


def test_shrinking_the_noisy_part_is_james_stein() -> None:
    """Signal known, rest pure noise: nothing of it is kept; rest without noise: all of it."""
    rng = np.random.default_rng(7)
    prior = np.tile(rng.standard_normal(4000), (8, 1))
    noise = rng.standard_normal((8, 4000))
    tokens, kept = shrink(prior + noise, prior, EQUAL)
    assert kept < 0.05
    np.testing.assert_allclose(tokens, prior[0] + kept * noise.mean(0))
    rest = rng.standard_normal(4000)
    tokens, kept = shrink(prior + rest, prior, EQUAL)
    assert kept == pytest.approx(1.0)
    np.testing.assert_allclose(tokens, prior[0] + rest)
    half, kept = shrink(prior + rest + math.sqrt(8) * noise, prior, EQUAL)
    assert kept == pytest.approx(0.5, abs=0.05), "signal and noise of variance 1"
    truth = prior[0] + rest
    plain = (prior + rest + math.sqrt(8) * noise).mean(0)
    assert ((half - truth) ** 2).mean() == pytest.approx(0.5, abs=0.05)
    assert ((plain - truth) ** 2).mean() == pytest.approx(1.0, abs=0.05)


def test_the_gain_is_the_factor_of_the_noise() -> None:
    """An estimator with a quarter of the noise variance takes a quarter of the prompts."""
    rng = np.random.default_rng(8)
    signal, values = drawn(rng, 4000, 1.0)
    better = signal + math.sqrt(8 * 0.25) * rng.standard_normal((8, 4000))
    found = implied_gain(values, better, EQUAL, lambda _, own, shares: shares @ own)
    assert found.value == pytest.approx(4.0, abs=3 * found.stderr + 0.2)
    assert found.stderr < 1.0
    assert implied_gain(values, values, EQUAL, lambda own, _, shares: shares @ own).value == pytest.approx(
        1.0
    )


@pytest.fixture
def case(tiny_policy):
    step = cases.step(tiny_policy, num_prompts=4, group_size=3)
    return tiny_policy, step, cases.batch(tiny_policy, num_prompts=16, group_size=2, seed=9)


def test_folds_are_influence_through_each_part_of_the_probe(case) -> None:
    """Per response nothing is shared between folds: each is the influence on its sequences alone."""
    policy, step, probe = case
    entropy = make_quantity("entropy", probe, normalisation="per_seq")
    options = InfluenceOptions(baseline="none")
    found = influence(policy, step, step.update, probe, quantity=entropy, options=options)
    options = replace(options, num_folds=1)
    tokens = np.concatenate(found.tokens)
    np.testing.assert_allclose(found.folds.shares @ found.fold_tokens, tokens, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.folds.shares @ found.fold_sequences, found.sequences, rtol=1e-9)
    for number in range(8):
        members = np.flatnonzero(found.folds.labels == number)
        assert len(members) == 4, "two prompts of two responses"
        part = probe.select(members)
        alone = influence(policy, step, step.update, part, quantity=entropy, options=options)
        np.testing.assert_allclose(
            found.fold_tokens[number], np.concatenate(alone.tokens), rtol=1e-7, atol=1e-12
        )
        assert np.isnan(alone.token_stderr).all()


def test_errors_of_tokens_are_those_of_a_clustered_mean(case) -> None:
    """With every prompt its own fold the error of a sequence is the one from the gradients' groups."""
    policy, step, probe = case
    found = influence(policy, step, step.update, probe, options=InfluenceOptions(num_folds=16))
    away = found.folds.shares[:, None] * (found.fold_sequences - found.sequences)
    np.testing.assert_allclose(np.sqrt(16 / 15 * (away**2).sum(0)), found.stderr, rtol=1e-7)
    assert found.token_stderr.shape == np.concatenate(found.tokens).shape
    assert (found.token_stderr[np.concatenate(step.token_weights) != 0] > 0).all()


def test_reliabilities_of_an_influence(case) -> None:
    policy, step, probe = case
    found = influence(policy, step, step.update, probe)
    tokens, sequences = reliabilities(found, probe.num_prompts)
    weighted = np.concatenate(step.token_weights) != 0
    assert tokens.num_items == weighted.sum(), "tokens without a weight have no influence to rank"
    values = found.fold_tokens[:, weighted]
    expected = [
        spearmanr(values[list(half)].mean(0), np.delete(values, half, axis=0).mean(0)).statistic
        for half in combinations(range(8), 4)
        if 0 in half
    ]
    assert tokens.halves.value == pytest.approx(np.mean(expected))
    assert tokens.whole.value == pytest.approx(spearman_brown(float(np.mean(expected)), 2))
    assert {point.prompts: point.correlation for point in tokens.curve}[16] == pytest.approx(
        tokens.whole.value
    )
    assert sequences.level == "sequence"
    assert sequences.num_items <= len(step.update)
    assert set(tokens.top) == {"0.01", "0.1"}
    assert 0 <= tokens.top["0.1"].value <= 1


def test_shrunken_influence_lies_between_the_versions(case) -> None:
    policy, step, probe = case
    (found,) = influences(policy, step, step.update, probe, throughs=("optimizer",))
    own = shrunk_influence(policy, step, probe, found)
    fixed = influence(
        policy,
        step,
        step.update,
        probe,
        through="optimizer",
        quantity=make_quantity("entropy", probe, version="fixed_prefix"),
    )
    prior, plain = np.concatenate(fixed.tokens), np.concatenate(found.tokens)
    assert 0 <= own.shrinkage.kept <= 1
    np.testing.assert_allclose(
        own.tokens, prior + own.shrinkage.kept * (plain - prior), rtol=1e-7, atol=1e-12
    )
    assert shrunk_influence(policy, step, probe, replace(found, version="fixed_prefix")) is None
    reward = influence(
        policy, step, step.update, probe, quantity=make_quantity("reward", probe, normalisation="per_seq")
    )
    assert shrunk_influence(policy, step, probe, reward, quantity="reward") is None

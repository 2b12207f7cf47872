"""The regression against its closed form written out cluster by cluster."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import linregress

from stepscope.errors import MeasurementError
from stepscope.measure.criteria.regression import property_study, regress
from stepscope.rules import TokenFacts


def sandwich(design: np.ndarray, residual: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Standard errors of Liang & Zeger, with Stata's small-sample factor."""
    n, k = design.shape
    bread = np.linalg.inv(design.T @ design)
    meat = np.zeros((k, k))
    labels = np.unique(clusters)
    for label in labels:
        own = clusters == label
        score = design[own].T @ residual[own]
        meat += np.outer(score, score)
    g = len(labels)
    return np.sqrt(np.diag(bread @ meat @ bread) * g / (g - 1) * (n - 1) / (n - k))


def test_coefficients_and_clustered_errors_in_raw_units():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 12, 80)
    x = {"a": rng.normal(size=80), "b": 50 + 7 * rng.normal(size=80)}
    y = 3 + 0.5 * x["a"] - 0.2 * x["b"] + rng.normal(size=12)[clusters] + rng.normal(size=80)
    found = regress(y, x, clusters, name="y", level="token", unit="nats")
    design = np.column_stack([np.ones(80), x["a"], x["b"]])
    beta, *_ = np.linalg.lstsq(design, y, rcond=None)
    errors = sandwich(design, y - design @ beta, clusters)
    for i, name in enumerate(("a", "b"), 1):
        raw, standard = found.coefficients[name], found.standardised[name]
        assert raw.value == pytest.approx(beta[i], rel=1e-9)
        assert raw.stderr == pytest.approx(errors[i], rel=1e-9)
        assert raw.n == 12
        assert raw.reliable
        assert standard.value == pytest.approx(beta[i] * x[name].std() / y.std(), rel=1e-9)
        assert standard.value / standard.stderr == pytest.approx(raw.value / raw.stderr, rel=1e-9)
    assert found.r2 == pytest.approx(1 - (y - design @ beta).var() / y.var(), rel=1e-9)


def test_one_property_is_a_plain_straight_line():
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(2, 40))
    found = regress(2 * x + noise, {"x": x}, np.arange(40), name="y", level="token", unit="nats")
    line = linregress(x, 2 * x + noise)
    assert found.coefficients["x"].value == pytest.approx(line.slope)
    assert found.r2 == pytest.approx(line.rvalue**2)


def test_what_has_no_coefficient_of_its_own_is_named():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 30))
    table = {"a": a, "same": np.full(30, 4.0), "b": b, "sum": a + 2 * b}
    found = regress(a + rng.normal(size=30), table, np.arange(30) % 10, name="y", level="token", unit="nats")
    assert set(found.coefficients) == {"a", "b"}
    assert found.left_out == {"same": "the same for all", "sum": "determined by a, b"}
    assert found.to_plain()["left_out"] == found.left_out


def test_few_prompts_are_flagged_and_few_items_refused():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 20))
    few = regress(y, {"x": x}, np.arange(20) % 2, name="y", level="token", unit="nats").coefficients["x"]
    assert not few.reliable
    assert "2 prompts for 2 coefficients" in few.reason
    with pytest.raises(MeasurementError, match="2 sequences for 2 coefficients"):
        regress(y[:2], {"x": x[:2]}, np.arange(2), name="y", level="sequence", unit="nats")


def test_study_finds_what_influence_was_made_of():
    rng = np.random.default_rng(4)
    lengths = rng.integers(3, 9, 60)
    sequence = np.repeat(np.arange(60), lengths)
    advantages = rng.normal(size=60)
    advantages[:4] = 0.0
    facts = TokenFacts(
        sequence=sequence,
        position=np.concatenate([np.arange(n) for n in lengths]),
        logprob=-rng.exponential(size=len(sequence)),
        old_logprob=np.zeros(len(sequence)),
        entropy=rng.exponential(size=len(sequence)),
        collision=np.zeros(len(sequence)),
        discriminator=np.zeros(len(sequence)),
        advantages=advantages,
        rewards=np.zeros(60),
        correct=rng.integers(0, 2, 60).astype(float),
        prompt=np.arange(60) // 3,
    )
    made = np.where(facts.advantage != 0, 0.3 * facts.advantage + 0.1 * facts.entropy - 2, 0.0)
    norms = rng.random(60)
    studies = property_study(facts, made, kernel_norm=norms, unit="nats/lr")
    assert [(s.level, s.outcome) for s in studies] == [
        ("token", "influence"), ("token", "abs_influence"),
        ("sequence", "influence"), ("sequence", "abs_influence"),
    ]  # fmt: skip
    tokens, _, sequences, _ = studies
    assert tokens.num_items == int((facts.advantage != 0).sum())
    assert sequences.num_items == 56
    assert tokens.r2 == pytest.approx(1)
    for name, estimate in tokens.coefficients.items():
        expected = {"advantage": 0.3, "entropy": 0.1}.get(name, 0.0)
        assert estimate.value == pytest.approx(expected, abs=1e-9), name
    assert "kernel_norm" in sequences.coefficients
    assert "position" not in sequences.coefficients

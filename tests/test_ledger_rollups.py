"""Sums of a ledger's entries by class: against the plain sums, and intervals that cover."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from stepscope.errors import MeasurementError
from stepscope.reading.rollups import Entries
from stepscope.results.two_way import class_sums
from stepscope.rules.token_classes import QUADRANTS, WAYS, kinds
from stepscope.stats import student

FOLDS = 8


def invented(generator: np.random.Generator, rows: int = 400) -> Entries:
    """A table with every column that the ways look at."""
    shares = generator.dirichlet(np.full(FOLDS, 20.0))
    folds = generator.normal(0.3, 1.0, (FOLDS, rows))
    prompt = generator.integers(0, 12, rows)
    table = pd.DataFrame(
        {
            "step": generator.integers(1, 6, rows),
            "position": generator.integers(0, 40, rows),
            "token": generator.choice(["1", "+", "wait", "</think>", "<b>"], rows),
            "kind": generator.choice(["digits", "operators"], rows),
            "logprob": -generator.exponential(0.5, rows),
            "entropy": generator.exponential(0.5, rows),
            "advantage": generator.choice([-1.0, 0.0, 1.0], rows),
            "pass_rate": generator.choice([0.0, 0.25, 0.6, 1.0, np.nan], rows),
            "prompt": prompt.astype(str),
            "prompt_number": prompt,
            "context": generator.integers(0, 90, rows),
            "influence": shares @ folds,
            "own_step": generator.normal(size=rows),
        }
    )
    return Entries("entropy", table, folds, shares)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_way_adds_up_to_all_tokens_and_is_the_plain_sum(way: str) -> None:
    entries = invented(np.random.default_rng(0))
    found, table = entries.by(way), entries.table
    labels = [str(label) for label in WAYS[way](table)]
    plain = table.groupby(labels).influence.agg(["sum", "size"])
    assert set(found.label) == set(plain.index)
    assert len(found) == len(plain)
    np.testing.assert_allclose(found.influence, plain["sum"][found.label], rtol=1e-12)
    np.testing.assert_array_equal(found.tokens, plain["size"][found.label])
    assert found.influence.sum() == pytest.approx(table.influence.sum(), rel=1e-12)
    assert found.share.sum() == pytest.approx(1.0, rel=1e-12)
    by_fold = pd.DataFrame(entries.folds.T).groupby(labels).sum().loc[list(found.label)].to_numpy().T
    away = entries.shares[:, None] * (by_fold - found.influence)
    np.testing.assert_allclose(found.stderr, np.sqrt(FOLDS / (FOLDS - 1) * (away**2).sum(0)), rtol=1e-9)
    assert (found.stderr_over_prompts >= found.stderr).all()
    assert (found.low < found.influence).all()
    assert (found.influence < found.high).all()


def test_ways_say_what_they_say() -> None:
    table = invented(np.random.default_rng(1)).table
    quadrant = pd.Series(WAYS["quadrant"](table))
    likely = table.logprob + table.entropy >= 0
    assert set(quadrant) == set(QUADRANTS)
    assert (table.advantage[quadrant == "wrong, rare"] < 0).all()
    assert not likely[quadrant == "wrong, rare"].any()
    assert likely[quadrant == "right, likely"].all()
    for label, part in np.exp(table.logprob).groupby(WAYS["rarity"](table)):
        low, high = map(float, label.split(" to "))
        assert part.between(low, high).all()
    for label, part in table.groupby(WAYS["position"](table)).position:
        low, *rest = map(int, label.split(" to "))
        assert part.between(low, (rest or [low])[0]).all()
    rates = table.groupby(WAYS["pass_rate"](table), dropna=False).pass_rate.unique()
    assert {k: list(v) for k, v in rates.items() if k != "unknown"} == {
        "0": [0.0],
        "above 0 to 0.25": [0.25],
        "above 0.5 to 0.75": [0.6],
        "1": [1.0],
    }


def test_kinds_of_tokens_however_a_tag_is_cut() -> None:
    texts = ["<", "think", ">", " Wait", ",", " 12", " + ", "x", "\n", "", "</answer>", ""]
    assert kinds(texts, ended=True) == [
        *["format tags"] * 3,
        "reasoning markers",
        "punctuation",
        "digits",
        "operators",
        "words",
        "white space",
        "parts of characters",
        "format tags",
        "end of sequence",
    ]
    assert kinds(["a", "b"], ended=False) == ["words", "words"]
    assert kinds([], ended=True) == []


def test_a_function_of_the_table_divides_it_too() -> None:
    entries = invented(np.random.default_rng(2))

    def long(table: Any) -> Any:
        return table.token.str.len() > 2

    found = entries.by(long)
    assert list(found.label) == ["False", "True"]
    assert set(found.by) == {"long"}
    own = entries.table.influence[entries.table.token.str.len() > 2].sum()
    assert found.influence[1] == pytest.approx(own, rel=1e-12)
    assert list(entries.by(lambda table: table.pass_rate).label)[-1] == "unknown"
    with pytest.raises(MeasurementError, match="3 labels for 400 tokens"):
        entries.by(lambda table: [1, 2, 3])
    with pytest.raises(MeasurementError, match="no way 'colour'"):
        entries.by("colour")


def test_top_tokens_are_merged_over_one_context() -> None:
    entries = invented(np.random.default_rng(3))
    found = entries.top(10)
    plain = entries.table.groupby("context").influence.sum()
    best = plain.abs().nlargest(10).index
    assert list(found.context) == list(best)
    np.testing.assert_allclose(found.influence, plain[best], rtol=1e-12)
    assert found.times.sum() == entries.table.context.isin(best).sum()
    assert (found.stderr > 0).all()


def test_two_way_errors_are_the_plain_double_sum() -> None:
    """Against cells of all folds, prompts and classes, written out."""
    generator = np.random.default_rng(4)
    entries = invented(generator)
    classes = generator.integers(0, 5, len(entries.table))
    prompts, shares, folds = entries.table.prompt_number.to_numpy(), entries.shares, entries.folds
    sums, parts = class_sums(folds, shares, classes, prompts, 5)
    count = int(prompts.max()) + 1
    cells = np.zeros((FOLDS, count, 5))
    for tok, (p, c) in enumerate(zip(prompts, classes, strict=True)):
        cells[:, p, c] += folds[:, tok]
    whole = cells.sum(2)
    total = float(shares @ whole.sum(1))
    for c in range(5):
        share = float(shares @ cells[:, :, c].sum(1)) / total
        for found, x in ((sums, cells[:, :, c]), (parts, (cells[:, :, c] - share * whole) / total)):
            by_prompt, by_fold = shares @ x, x.sum(1)
            value = float(by_prompt.sum())
            few, many = FOLDS / (FOLDS - 1), count / (count - 1)
            probe = few * (shares**2 * (by_fold - value) ** 2).sum()
            train = many * ((by_prompt - value / count) ** 2).sum()
            rest = x - by_prompt - ((by_fold - value) / count)[:, None]
            both = few * many * (shares[:, None] ** 2 * rest**2).sum()
            expected = np.sqrt(max(probe, probe + train - both))
            assert found.both[c] == pytest.approx(expected, rel=1e-9)


def test_intervals_cover_sums_and_shares() -> None:
    """A probe and a training drawn again and again: errors shared by tokens, by prompts, and by neither.

    Errors added up in quadrature over the tokens would be a fifth of these and cover less than half.
    """
    generator = np.random.default_rng(5)
    prompts, each, runs = 40, 6, 600
    prompt = np.repeat(np.arange(prompts), each)
    classes = np.tile(np.arange(each) % 2, prompts)
    slopes = np.array([-1.0, -0.4])
    truth = prompts * each / 2 * slopes
    shares = np.full(FOLDS, 1 / FOLDS)
    hit = np.zeros((2, 2))
    narrow = 0
    for _ in range(runs):
        drawn = generator.normal(0, 0.8, (prompts, 2))
        shared = generator.lognormal(0, 1, (FOLDS, 32, 2)).mean(1) - np.exp(0.5)
        noise = generator.normal(0, 0.5, (FOLDS, prompts, 2))
        loud = slopes + drawn + shared[:, None] + noise
        entries = loud[:, prompt, classes] + generator.normal(0, 0.5, (FOLDS, len(prompt)))
        sums, parts = class_sums(entries, shares, classes, prompt, 2)
        true_batch = np.bincount(classes, weights=(slopes + drawn)[prompt, classes])
        near, far = sums.over_probe(0), sums.over_both(0)
        hit[0] += [near.low < true_batch[0] < near.high, far.low < truth[0] < far.high]
        near, far = parts.over_probe(0), parts.over_both(0)
        hit[1] += [
            near.low < true_batch[0] / true_batch.sum() < near.high,
            far.low < truth[0] / truth.sum() < far.high,
        ]
        token_errors = entries.std(0, ddof=1) / np.sqrt(FOLDS)
        narrow += abs(sums.values[0] - true_batch[0]) < student(FOLDS) * np.sqrt(
            (token_errors[classes == 0] ** 2).sum()
        )
    assert ((hit / runs > 0.92) & (hit / runs < 0.995)).all(), hit / runs
    assert narrow / runs < 0.5

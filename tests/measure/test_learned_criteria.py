"""Learned criteria: what they look at, what they are judged by, and that they learn what there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

import cases
from stepscope.measure.criteria import learned as learned_module
from stepscope.measure.criteria.ground_truth import GroundTruth
from stepscope.measure.criteria.leaderboard import RankingOptions, rank_criteria
from stepscope.measure.criteria.learned import MACHINES, crossed, learned_criteria, learned_scores
from stepscope.measure.criteria.statistics import compare, left_out
from stepscope.measure.kernel.machines import MachineOptions
from stepscope.policy.state import Policy
from stepscope.results import FloatArray
from stepscope.rules import TokenFacts

QUICK = MachineOptions(steps=2, inducing=5)
LINEAR = {"learned_linear": None}
PROMPTS, TOKENS, FOLDS = 8, 30, 8


def made(noise: float, seed: int = 0) -> tuple[TokenFacts, dict[str, FloatArray], GroundTruth]:
    """Influence that is a product of advantage and a function of entropy, seen by folds with noise."""
    rng = np.random.default_rng(seed)
    count = PROMPTS * TOKENS
    sequence = np.repeat(np.arange(PROMPTS * 2), TOKENS // 2)
    entropy = rng.uniform(0.1, 2.0, count)
    facts = TokenFacts(
        sequence=sequence,
        position=np.tile(np.arange(TOKENS // 2), PROMPTS * 2),
        logprob=-rng.exponential(size=count),
        old_logprob=np.zeros(count),
        entropy=entropy,
        collision=np.exp(-entropy),
        discriminator=np.zeros(count),
        advantages=rng.choice([-1.0, 1.0], PROMPTS * 2) * rng.uniform(0.5, 1.5, PROMPTS * 2),
        rewards=np.zeros(PROMPTS * 2),
        correct=np.zeros(PROMPTS * 2),
        prompt=np.repeat(np.arange(PROMPTS), 2),
    )
    signal = facts.advantage * (entropy - 1.0) ** 3
    folds = signal + noise * rng.standard_normal((FOLDS, count))
    truth = GroundTruth(
        kind="column",
        preconditioner="adamw",
        version="on_policy",
        values=folds.mean(0),
        chosen=np.arange(count),
        method="made",
        folds=folds,
        probe_fold=np.repeat(np.arange(FOLDS), 4),
    )
    scores = {"neg_A": -facts.advantage, "neg_A_H": -facts.advantage * entropy}
    return facts, scores, truth


def test_machines_learn_what_a_line_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_module, "FOLDS", 2)
    facts, scores, truth = made(noise=0.02)
    found = learned_scores(facts, scores, truth, MachineOptions(steps=50, inducing=15))
    assert set(found) == set(MACHINES)
    order = {n: spearmanr(own.mean(0), truth.values).statistic for n, own in found.items()}
    assert order["learned_gaussian_process"] > 0.8
    assert order["learned_deep_kernel"] > 0.8
    assert min(order["learned_gaussian_process"], order["learned_deep_kernel"]) > order["learned_linear"]


def test_scores_look_neither_at_their_own_prompt_nor_at_the_other_half() -> None:
    facts, scores, truth = made(noise=0.5)
    found = learned_scores(facts, scores, truth, QUICK)
    assert truth.folds is not None
    odd = truth.folds.copy()
    odd[1::2] = 7.0
    others = learned_scores(facts, scores, replace(truth, folds=odd), QUICK)
    owner = facts.prompt[facts.sequence]
    own = truth.folds.copy()
    own[:, owner == 3] *= -5.0
    spoilt = learned_scores(facts, scores, replace(truth, folds=own), QUICK)
    for name, values in found.items():
        np.testing.assert_array_equal(values[0], others[name][0])
        assert not np.allclose(values[1], others[name][1])
        changed = [
            not np.allclose(values[:, owner == g], spoilt[name][:, owner == g]) for g in range(PROMPTS)
        ]
        assert not changed[3]
        assert sum(changed) >= PROMPTS / 2


def test_noise_that_is_learned_is_not_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but noise: a score fitted to the whole probe would follow its noise, crossed ones do not."""
    monkeypatch.setattr(learned_module, "MACHINES", LINEAR)
    figures = []
    for seed in range(6):
        facts, scores, truth = made(noise=300.0, seed=seed)
        learned = learned_scores(facts, scores, truth, QUICK)["learned_linear"]
        assert truth.halves is not None
        assert truth.halves_without_folds is not None
        owner = facts.prompt[facts.sequence]
        counts = left_out(owner)
        table = np.stack([scores["neg_A"], learned.mean(0)])
        both = np.array([True, True])
        found = compare(table, both, truth.values[None], owner, counts=counts)
        folded = compare(table, both, truth.without_folds, owner)
        met, parts = crossed(
            found,
            folded,
            {1: learned},
            truth.halves[None],
            truth.halves_without_folds[None],
            owner,
            counts=counts,
            seed=0,
        )
        np.testing.assert_array_equal(met.spearman[:, 0], found.spearman[:, 0])
        first, second = truth.halves
        expected = (spearmanr(learned[0], second).statistic + spearmanr(learned[1], first).statistic) / 2
        assert met.spearman[0, 1, 0] == pytest.approx(expected)
        without = truth.halves_without_folds[3]
        expected = (
            spearmanr(learned[0], without[1]).statistic + spearmanr(learned[1], without[0]).statistic
        ) / 2
        assert parts.spearman[0, 1, 3] == pytest.approx(expected)
        np.testing.assert_allclose(without[0], first)
        figures.append(met.spearman[0, 1, 0])
    assert abs(np.mean(figures)) < 3 * np.std(figures, ddof=1) / np.sqrt(6)


def test_what_differs_between_prompts_is_not_guessed_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A truth that features know nothing of, alike within prompts: without the others' mean, which is low for
    the prompts that are high (correlations of -.23 here), the score is on neither side."""
    monkeypatch.setattr(learned_module, "MACHINES", LINEAR)
    figures = []
    for seed in range(60):
        facts, scores, truth = made(noise=1.0, seed=seed)
        assert truth.folds is not None
        rng = np.random.default_rng(1000 + seed)
        unknown = rng.normal(size=PROMPTS)[facts.prompt[facts.sequence]] + rng.normal(size=len(facts))
        folds = unknown + 0.1 * rng.normal(size=truth.folds.shape)
        own = replace(truth, folds=folds, values=folds.mean(0))
        learned = learned_scores(facts, scores, own, QUICK)["learned_linear"]
        assert own.halves is not None
        pairs = zip(learned, own.halves[::-1], strict=True)
        figures.append(np.mean([spearmanr(s, t).statistic for s, t in pairs]))
    error = np.std(figures, ddof=1) / 60**0.5
    assert abs(np.mean(figures)) < 3 * error < 0.08


def test_a_learned_criterion_on_the_board(monkeypatch: pytest.MonkeyPatch, tiny_policy: Policy) -> None:
    """Its rows about columns are of crossed halves, those about rows and diagonals of the mean score."""
    monkeypatch.setattr(learned_module, "MACHINES", LINEAR)
    step = cases.step(tiny_policy, num_prompts=4, group_size=3)
    probe = cases.batch(tiny_policy, num_prompts=8, group_size=1, seed=9)
    options = RankingOptions(baseline="none", max_diagonal=6, learned=True)
    board = rank_criteria(tiny_policy, step, probe, options=options)
    truth = board.truth("column", "adamw", "on_policy")
    own = learned_scores(board.facts, board.scores, truth)["learned_linear"]
    np.testing.assert_allclose(board.scores["learned_linear"], own.mean(0))
    assert truth.halves is not None
    chosen = truth.chosen
    pairs = ((own[0], truth.halves[1]), (own[1], truth.halves[0]))
    crossed_rho = np.mean([spearmanr(s[chosen], t[chosen]).statistic for s, t in pairs])
    row = board.row("learned_linear", truth)
    assert row.spearman.value == pytest.approx(crossed_rho)
    assert row.kind == "model"
    sums = [[board.facts.per_sequence(v) for v in pair] for pair in pairs]
    by_sequence = board.row("learned_linear", truth, level="sequence").spearman.value
    assert by_sequence == pytest.approx(np.mean([spearmanr(s, t).statistic for s, t in sums]))
    diagonal = board.truth("diagonal", "sgd")
    plain = spearmanr(own.mean(0)[diagonal.chosen], diagonal.values[diagonal.chosen]).statistic
    assert board.row("learned_linear", diagonal).spearman.value == pytest.approx(plain)


def test_too_little_to_learn_from() -> None:
    facts, scores, truth = made(noise=0.1)
    assert truth.folds is not None
    assert truth.probe_fold is not None
    two = replace(truth, folds=truth.folds[:2], probe_fold=truth.probe_fold % 2)
    assert two.halves_without_folds is None
    assert learned_scores(facts, scores, two, QUICK) == {}
    assert learned_scores(facts, scores, replace(truth, folds=None), QUICK) == {}
    (one,) = learned_criteria({"learned_linear": np.arange(len(facts), dtype=float)})
    np.testing.assert_array_equal(one(facts), np.arange(len(facts)))
    assert one.kind == "model"

"""Steps without some tokens: equal to steps of a batch in which those tokens have no weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.criteria.leaderboard import RankingOptions, rank_criteria
from stepscope.measure.criteria.pareto import AblationOptions, drop_rules, drop_tokens
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.step.reconstruct import assemble_step, weighted_logprobs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.results.criteria import Pareto


@pytest.fixture
def case(tiny_policy):
    step = cases.step(tiny_policy, num_prompts=3, group_size=3)
    return tiny_policy, step, cases.batch(tiny_policy, num_prompts=6, group_size=2, seed=9)


def test_the_step_without_tokens_is_that_of_the_others(case):
    policy, step, probe = case
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    count = int(step.update.num_tokens.sum())
    scores = np.where(np.arange(count) % 3 == 0, -1.0 - np.arange(count), 1.0)
    found = drop_tokens(
        policy, step, probe, {"mine": scores}, options=AblationOptions(shares=(0.2, 0.9), baseline="none")
    )
    few, many = found.points
    assert many.num_dropped == int((scores < 0).sum()), "scores above zero are never dropped"
    assert few.num_dropped == int(0.2 * count)
    dropped = np.isin(np.arange(count), np.argsort(scores)[: few.num_dropped])
    masks = np.split(dropped, np.cumsum(step.update.num_tokens)[:-1])
    kept = tuple(np.where(m, 0.0, w) for m, w in zip(masks, step.token_weights, strict=True))
    ascent = gradient(policy, step.update, weighted_logprobs(kept))
    other = assemble_step(policy, step.update, kept, ascent, {})
    for quantity, normalisation, point, full, sign, paired in (
        ("entropy", "per_token", few.entropy_change, found.full_entropy_change, 1, few.entropy_kept),
        ("reward", "per_seq", few.reward_change, found.full_reward_change, -1, few.reward_given_up),
    ):
        how = {
            "quantity": make_quantity(quantity, probe, normalisation=normalisation),
            "options": ChangeOptions(baseline="none"),
        }
        without = measure_change(policy, other, probe, lrs=[step.lr], **how).at(step.lr).true
        with_them = measure_change(policy, step, probe, lrs=[step.lr], **how).at(step.lr).true
        assert point.value == pytest.approx(without.value, rel=1e-8)
        assert point.stderr == pytest.approx(without.stderr, rel=1e-8)
        assert full.value == pytest.approx(with_them.value, rel=1e-8)
        assert paired.value == pytest.approx(sign * (without.value - with_them.value), rel=1e-6, abs=1e-13)
        assert paired.n == 6
    assert all(torch.equal(p, before[n]) for n, p in policy.parameters.items())


def test_dropping_what_lowers_the_entropy_keeps_entropy(case):
    """At a small rate, and with a second moment that one batch hardly moves, influence says what is kept."""
    policy, step, probe = case
    state = policy.optimizer
    slow = replace(
        state,
        steps=dict.fromkeys(state.steps, 10_000),
        exp_avg_sq={n: 1e3 * v for n, v in state.exp_avg_sq.items()},
    )
    policy = replace(policy, optimizer=slow, settings=replace(policy.settings, max_grad_norm=0.0))
    step = assemble_step(
        policy,
        step.update,
        step.token_weights,
        gradient(policy, step.update, weighted_logprobs(step.token_weights)),
        {},
    )
    board = rank_criteria(policy, step, probe, options=RankingOptions(baseline="none"))
    truth = board.truth("column", "adamw", "on_policy")
    exact = truth.values
    rules = drop_rules(board, reward_influence=-truth.halves, criteria=("disc_v", "top_ent_mask"))
    assert list(rules) == [
        "influence",
        "influence_fixed_prefix",
        "influence_no_reward",
        "random",
        "disc_v",
        "top_ent_mask",
    ]
    np.testing.assert_array_equal(rules["influence"], truth.halves)
    np.testing.assert_array_equal(rules["influence_no_reward"], np.maximum(truth.halves, 0))
    assert (rules["random"] < 0).all()
    np.testing.assert_array_equal(rules["top_ent_mask"], -board.scores["top_ent_mask"])
    rules["influence"] = exact
    half = truth.probe_half
    found = drop_tokens(
        policy,
        step,
        probe,
        rules,
        probe_half=half,
        options=AblationOptions(shares=(0.2,), lr=1e-7, baseline="none"),
    )
    points = {p.rule: p for p in found.points}
    assert [p.cross_fitted for p in found.points] == [s.ndim == 2 for s in rules.values()]
    best = points["influence"]
    lowest = np.sort(exact[exact < 0])[: best.num_dropped]
    assert best.entropy_kept.value == pytest.approx(-1e-7 * lowest.sum(), rel=0.02)
    assert best.entropy_kept.value == max(p.entropy_kept.value for p in found.points)
    assert [p.rule for p in found.points] == list(rules)
    assert Pareto.from_json(found.to_json(), "pareto.json").to_json() == found.to_json()


def test_a_rule_that_saw_half_the_probe_is_judged_on_the_other(case):
    """Per response nothing is shared between halves: either choice measured on the other half alone."""
    policy, step, probe = case
    count = int(step.update.num_tokens.sum())
    scores = -np.random.default_rng(5).uniform(0.5, 1.0, (2, count))
    half = np.asarray(probe.prompt_index) % 2
    how = {"options": AblationOptions(shares=(0.3,), baseline="none")}
    (both,) = drop_tokens(policy, step, probe, {"mine": scores}, probe_half=half, **how).points
    one_by_one = [
        drop_tokens(policy, step, probe.select(np.flatnonzero(half != h)), {"mine": scores[h]}, **how).points[
            0
        ]
        for h in range(2)
    ]
    for name in ("reward_change", "reward_given_up"):
        expected = np.mean([getattr(point, name).value for point in one_by_one])
        assert getattr(both, name).value == pytest.approx(expected, rel=1e-9)
    assert both.cross_fitted
    assert "the other half" in both.entropy_kept.method
    assert both.entropy_kept.n == 6
    same = np.stack([scores[0], scores[0]])
    (twice,) = drop_tokens(policy, step, probe, {"mine": same}, probe_half=half, **how).points
    (once,) = drop_tokens(policy, step, probe, {"mine": scores[0]}, **how).points
    assert twice.entropy_kept.value == pytest.approx(once.entropy_kept.value, rel=1e-9, abs=1e-15)
    assert twice.entropy_kept.stderr == pytest.approx(once.entropy_kept.stderr, rel=1e-9)
    with pytest.raises(MeasurementError, match="pass probe_half="):
        drop_tokens(policy, step, probe, {"mine": scores}, **how)


def test_refusals(case):
    policy, step, probe = case
    scores = np.zeros(int(step.update.num_tokens.sum()))
    with pytest.raises(MeasurementError, match="learning rate above 0"):
        drop_tokens(policy, replace(step, lr=0.0), probe, {"mine": scores})
    with pytest.raises(MeasurementError, match="rule mine"):
        drop_tokens(policy, step, probe, {"mine": scores[1:]})
    with pytest.raises(MeasurementError, match="expected between 0 and 1"):
        drop_tokens(policy, step, probe, {"mine": scores}, options=AblationOptions(shares=(1.5,)))

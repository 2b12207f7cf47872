"""Re-made steps against steps of batches that really lack the sequence; scores of influence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.influence.validation import RemovalOptions, compare, remake_steps
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.loss.advantages import advantages
from stepscope.results.validation import Validation


def validate_influence(policy, step, probe, found, **how) -> Validation:
    return compare(remake_steps(policy, step, probe, found, options=RemovalOptions(**how)), found)


INFLUENCE, CHANGE = InfluenceOptions(baseline="position"), ChangeOptions(baseline="position")


@pytest.fixture
def case():
    policy = cases.policy(max_grad_norm=0.0)
    step = cases.step(policy, num_prompts=4, group_size=3)
    probe = cases.batch(policy, num_prompts=8, group_size=2, seed=9)
    return policy, step, probe, influence(policy, step, step.update, probe, options=INFLUENCE)


def test_zeroed_is_the_step_with_that_advantage_at_zero(case) -> None:
    policy, step, probe, found = case
    checked = validate_influence(policy, step, probe, found, num_subsets=3, num_single=2)
    full = measure_change(policy, step, probe, lrs=[step.lr], options=CHANGE).at(step.lr).true.value
    for index, truth in zip(checked.single_index, checked.single.true, strict=True):
        weights = step.update.advantages.copy()
        weights[index] = 0.0
        other = reconstruct_step(policy, replace(step.update, advantages=weights))
        change = measure_change(policy, other, probe, lrs=[step.lr], options=CHANGE).at(step.lr).true.value
        assert full - change == pytest.approx(truth, rel=1e-7, abs=1e-13)


def test_recomputed_uses_the_advantages_of_those_who_stay(case) -> None:
    policy, step, probe, found = case
    checked = validate_influence(
        policy, step, probe, found, removal="recomputed", num_subsets=2, num_single=1
    )
    update = step.update
    for kept, truth in zip(checked.subsets, checked.half.true, strict=True):
        weights = np.zeros(len(update))
        chosen = list(kept)
        weights[chosen] = advantages(update.rewards[chosen], update.prompt_index[chosen], "none")
        other = reconstruct_step(policy, replace(update, advantages=weights))
        change = measure_change(policy, other, probe, lrs=[step.lr], options=CHANGE).at(step.lr).true.value
        assert change == pytest.approx(truth, rel=1e-7, abs=1e-13)
    assert checked.removal == "recomputed"


def test_influence_predicts_small_steps(case) -> None:
    """At a small learning rate, with a second moment that one batch hardly moves, prediction is exact."""
    policy, _, probe, _ = case
    state = policy.optimizer
    slow = replace(
        state,
        steps=dict.fromkeys(state.steps, 10_000),
        exp_avg_sq={n: 1e3 * v for n, v in state.exp_avg_sq.items()},
    )
    policy = replace(policy, optimizer=slow)
    step = reconstruct_step(policy, case[1].update)
    found = influence(policy, step, step.update, probe, options=INFLUENCE)
    checked = validate_influence(policy, step, probe, found, lr=1e-7, num_subsets=24, num_single=12)
    assert checked.lds.value > 0.99
    assert checked.leave_one_out.value > 0.99
    assert checked.lds.n == 24
    assert checked.lds.stderr < 0.05
    assert Validation.from_plain(checked.to_plain(), "").to_plain() == checked.to_plain()


def test_folds_of_the_probe_make_the_truth(case) -> None:
    """Per response a fold's truth is the change on its sequences alone, and their mean is that on all."""
    policy, step, probe, _ = case
    entropy = make_quantity("entropy", probe, normalisation="per_seq")
    options = InfluenceOptions(baseline="none")
    found = influence(policy, step, step.update, probe, quantity=entropy, options=options)
    remade = remake_steps(policy, step, probe, found, options=RemovalOptions(num_subsets=3, num_single=2))
    np.testing.assert_allclose(found.folds.shares @ remade.subset_folds, remade.subset_true, rtol=1e-9)
    np.testing.assert_allclose(found.folds.shares @ remade.single_folds, remade.single_true, rtol=1e-9)
    fold = probe.select(np.flatnonzero(found.folds.labels == 3))
    options = InfluenceOptions(baseline="none", num_folds=1)
    alone = influence(policy, step, step.update, fold, quantity=entropy, options=options)
    expected = remake_steps(policy, step, fold, alone, options=RemovalOptions(num_subsets=3, num_single=2))
    np.testing.assert_allclose(remade.subset_folds[3], expected.subset_true, rtol=1e-7)
    np.testing.assert_allclose(remade.single_folds[3], expected.single_true, rtol=1e-7, atol=1e-13)


def test_shuffled_influence_is_found_out(case) -> None:
    policy, step, probe, found = case
    wrong = replace(found, sequences=np.roll(found.sequences, 5))
    checked = validate_influence(policy, step, probe, wrong, lr=1e-7, num_subsets=24, num_single=12)
    assert checked.lds.value < 0.8
    assert checked.leave_one_out.value < 0.8


def test_policy_is_restored(case) -> None:
    policy, step, probe, found = case
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    validate_influence(policy, step, probe, found, num_subsets=2, num_single=0)
    assert all(torch.equal(p, before[n]) for n, p in policy.parameters.items())


def test_refusals(case) -> None:
    policy, step, probe, found = case
    with pytest.raises(MeasurementError, match="unknown removal"):
        validate_influence(policy, step, probe, found, removal="deleted")
    with pytest.raises(MeasurementError, match="learning rate above 0"):
        validate_influence(policy, replace(step, lr=0.0), probe, found)
    odd = replace(step, token_weights=tuple(w + 0.1 for w in step.token_weights))
    with pytest.raises(MeasurementError, match="not proportional"):
        validate_influence(policy, odd, probe, found, removal="recomputed")
    logged = replace(step.update, advantages=2 * step.update.advantages)  # of the run's, not of the rewards
    with pytest.raises(MeasurementError, match="from those of its rewards by the settings"):
        validate_influence(policy, reconstruct_step(policy, logged), probe, found, removal="recomputed")

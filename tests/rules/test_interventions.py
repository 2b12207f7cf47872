"""Interventions token by token, against values worked out by hand and against their own losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stepscope.errors import CheckpointError, ConfigError, MeasurementError
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import policy_loss
from stepscope.rules import (
    UNCLIPPED,
    ClipCov,
    DiscriminatorClipping,
    EntropyBonus,
    InfluenceClipping,
    Intervention,
    KlCov,
    Reweighting,
    Steer,
    Tokens,
    TopEntropy,
    intervention_from_record,
    token_advantages,
)


def table(**changes: Any) -> Tokens:
    """Two sequences of three and two tokens with log-probs of -1, -2, -3 | -1, -3 and advantages 1 | -1."""
    logprob = np.array([-1.0, -2, -3, -1, -3])
    made = Tokens(
        sequence=np.array([0, 0, 0, 1, 1]),
        logprob=logprob,
        old_logprob=logprob,
        entropy=np.array([0.5, 1, 2, 0.1, 1.5]),
        advantages=np.array([1.0, -1]),
    )
    return replace(made, **changes)


def shaped(intervention: Intervention, made: Tokens, *, step: int = 0) -> list[float]:
    found: list[float] = token_advantages(intervention, made, seed=0, step=step).tolist()
    return found


def test_clip_cov_drops_tokens_of_high_covariance() -> None:
    """mean l = -2, mean A = 0.2: Cov = 0.8, 0, -0.8 | -1.2, 1.2."""
    assert shaped(ClipCov(fraction=1.0, low=0.5), table()) == [0, 1, 1, -1, 0]
    assert shaped(ClipCov(fraction=1.0, low=0.5, high=1.0), table()) == [0, 1, 1, -1, -1]
    assert shaped(ClipCov(fraction=1.0, low=2.0), table()) == [1, 1, 1, -1, -1]


def test_clip_cov_draws_at_least_one_token_by_seed_and_step() -> None:
    """int(2e-4 x 5) = 0, so one of the two candidates leaves, each for some step."""
    dropped = set()
    for step in range(8):
        one = shaped(ClipCov(low=0.5), table(), step=step)
        assert one == shaped(ClipCov(low=0.5), table(), step=step)
        (gone,) = np.flatnonzero(np.array(one) == 0)
        dropped.add(int(gone))
    assert dropped == {0, 4}


def test_clip_cov_leaves_tokens_that_ppo_clips_alone() -> None:
    """l - l_old = 1 on the first token, whose advantage is positive: it is clipped already."""
    old = table().logprob - np.array([1.0, 0, 0, 0, 0])
    found = shaped(ClipCov(fraction=1.0, low=0.5), table(old_logprob=old))
    assert found == [1, 1, 1, -1, 0]


def test_covariance_of_a_micro_batch_of_one_sequence_is_zero() -> None:
    assert shaped(ClipCov(fraction=1.0, low=0.01, scope=1), table()) == [1, 1, 1, -1, -1]


def unclipped(**changes: Any) -> Tokens:
    return table(epsilon_low=1.0, epsilon_high=UNCLIPPED, **changes)


def test_kl_cov_has_the_gradient_of_its_penalty() -> None:
    """The covariance is highest on the last and the first token; there the loss is -r A + 2 |log r|."""
    made = unclipped(old_logprob=table().logprob + np.array([0.3, 0, 0.1, 0, -0.2]))
    found = torch.tensor([shaped(KlCov(fraction=0.5, coefficient=2.0), made)], dtype=torch.float64)
    old = torch.from_numpy(made.old_logprob)[None]
    leaves = torch.from_numpy(made.logprob)[None].clone().requires_grad_(True)
    loss = (-torch.exp(leaves - old) * torch.from_numpy(made.advantage)).sum()
    loss = loss + 2 * (leaves - old).abs()[0, [0, 4]].sum()
    (published,) = torch.autograd.grad(loss, leaves)
    settings = StepSettings(loss_type="dapo", epsilon_low=1.0, epsilon_high=UNCLIPPED)
    inside = torch.ones_like(old, dtype=torch.bool)
    (ours,) = torch.autograd.grad(policy_loss(leaves, old, found, inside, settings), leaves)
    torch.testing.assert_close(5 * ours, published)


def test_kl_cov_does_nothing_on_policy_and_needs_clipping_off() -> None:
    everything = KlCov(fraction=1.0, coefficient=2.0)
    assert shaped(everything, unclipped()) == [1, 1, 1, -1, -1]
    with pytest.raises(ConfigError, match=r"ratio is clipped to 0\.8 \.\.\. 1\.2"):
        shaped(everything, table())


def test_top_entropy_keeps_the_uncertain_tokens() -> None:
    """The 0.6-quantile of 0.1, 0.5, 1, 1.5, 2 is 1.2."""
    assert shaped(TopEntropy(fraction=0.4), table()) == [0, 0, 1, 0, -1]


def test_reweighting_plays_improbable_tokens_down() -> None:
    expected = [0.25 * np.exp(x) + 0.75 for x in (-1.0, -2.0, -3.0)]
    found = shaped(Reweighting(alpha=0.25), table())
    np.testing.assert_allclose(found, [*expected, -expected[0], -expected[2]])


def steer_change(p: float, entropy: float) -> float:
    return abs(p * (1 - p) * (np.log(p) + entropy))


def test_steer_weighs_by_the_tabular_entropy_change() -> None:
    """Probabilities 0.5, 0.25 with entropies 0.2, 0.3, one sequence, ratio 2 on the second token."""
    logprob = np.log([0.5, 0.25])
    made = Tokens(
        sequence=np.array([0, 0]),
        logprob=logprob,
        old_logprob=logprob - np.array([0.0, np.log(2)]),
        entropy=np.array([0.2, 0.3]),
        advantages=np.array([2.0]),
        epsilon_high=2.0,
    )
    small, large = steer_change(0.5, 0.2), steer_change(0.25, 0.3)
    theorem = shaped(Steer(), made)
    np.testing.assert_allclose(theorem, [2 * 0.7 ** (small / (2 * large)), 2 * 0.7])
    released = shaped(Steer(form="released"), made)
    np.testing.assert_allclose(released, [2 * 0.7 ** (small / 0.5 / (large / 0.125)), 2 * 0.7])
    clipped = shaped(Steer(), replace(made, epsilon_high=0.5))
    np.testing.assert_allclose(clipped, [2 * 0.7, 2.0])


def test_released_steer_does_not_magnify_small_changes() -> None:
    sure = np.full(5, -1e-4)
    certain = table(logprob=sure, old_logprob=sure, entropy=np.zeros(5))
    np.testing.assert_allclose(np.abs(shaped(Steer(form="released"), certain)), 1, atol=1e-5)
    np.testing.assert_allclose(np.abs(shaped(Steer(), certain)), 0.7)


def discriminated() -> Tokens:
    """p = 0.5, 0.05 | 0.5, 0.05 of distributions over two tokens."""
    p = np.array([0.5, 0.05, 0.5, 0.05])
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return Tokens(
        sequence=np.array([0, 0, 1, 1]),
        logprob=np.log(p),
        old_logprob=np.log(p),
        entropy=entropy,
        advantages=np.array([1.0, -1.0]),
        discriminator=p**2 * (np.log(p) + entropy) + (1 - p) ** 2 * (np.log(1 - p) + entropy),
    )


def test_discriminator_drops_negative_tokens_that_lower_entropy() -> None:
    """S = p (l + H) is 0 at p = 0.5 and negative at 0.05: only the improbable token lowers entropy."""
    made = discriminated()
    assert shaped(DiscriminatorClipping(form="vocabulary", threshold=0.9), made) == [1, 1, -1, 0]
    assert shaped(DiscriminatorClipping(form="batch", threshold=0.9), made) == [1, 1, -1, 0]
    assert shaped(DiscriminatorClipping(threshold=9.0), made) == [1, 1, -1, -1]
    assert shaped(DiscriminatorClipping(threshold=0.9, max_fraction=0.2), made) == [1, 1, -1, -1]


def test_discriminator_of_the_vocabulary_says_what_it_lacks() -> None:
    with pytest.raises(MeasurementError, match="score_discriminators"):
        shaped(DiscriminatorClipping(), table())


def test_influence_takes_the_tokens_that_cost_more_entropy_than_their_reward_is_worth() -> None:
    """Costs -I_H - price I_R: at price 0 they are 3, 1, -2 | 2, 0; at price 1 they are 0, 0.5, -2 | 3, 4."""
    measured = table(
        entropy_influence=np.array([-3.0, -1, 2, -2, 0]), reward_influence=np.array([3.0, 0.5, 0, -1, -4])
    )
    assert shaped(InfluenceClipping(fraction=1.0), measured) == [0, 0, 1, 0, -1]
    assert shaped(InfluenceClipping(fraction=0.4), measured) == [0, 1, 1, 0, -1]
    assert shaped(InfluenceClipping(fraction=0.1), measured) == [1, 1, 1, -1, -1]
    assert shaped(InfluenceClipping(fraction=1.0, price=1.0), measured) == [1, 0, 1, 0, -1]
    weighted = InfluenceClipping(fraction=1.0, price=1.0, weight=0.25)
    assert shaped(weighted, measured) == [1, 0.25, 1, -0.25, -1]
    with pytest.raises(MeasurementError, match="influence on entropy and reward"):
        shaped(InfluenceClipping(), table())


def test_an_entropy_bonus_is_a_component_and_leaves_the_advantages_alone() -> None:
    bonus = EntropyBonus(coefficient=0.1)
    assert shaped(bonus, table()) == table().advantage.tolist()
    assert (bonus.shapes_advantages, bonus.entropy_weight) == (False, 0.1)
    others = (ClipCov(), Reweighting(), InfluenceClipping())
    assert all(i.shapes_advantages and i.entropy_weight == 0.0 for i in others)


def test_micro_batches_are_cut_in_the_order_given() -> None:
    """Three sequences of one, two and one tokens, two to a micro-batch; the highest entropy of each stays."""
    made = Tokens(
        sequence=np.array([0, 1, 1, 2]),
        logprob=np.full(4, -1.0),
        old_logprob=np.full(4, -1.0),
        entropy=np.array([1.0, 2, 3, 4]),
        advantages=np.array([1.0, 2, 3]),
    )
    highest = TopEntropy(fraction=1e-9, scope=2)
    found = token_advantages(highest, made, seed=0, step=0)
    assert found.tolist() == [0, 0, 2, 3]
    found = token_advantages(highest, made, seed=0, step=0, order=np.array([2, 1, 0]))
    assert found.tolist() == [1, 0, 0, 3]
    with pytest.raises(ConfigError, match="set scope to a number"):
        token_advantages(TopEntropy(scope="micro_batch"), made, seed=0, step=0)


def test_records_are_read_back_and_what_is_not_understood_is_refused() -> None:
    good = {"name": "top_entropy", "fraction": 0.2, "micro_batch_size": None}
    assert TopEntropy().to_record() == good
    assert intervention_from_record(good) == TopEntropy()
    cut = TopEntropy(scope="micro_batch").over(8)
    assert intervention_from_record(cut.to_record()) == cut == TopEntropy(scope=8)
    for wrong, message in (
        ({"name": "qae"}, "unknown name 'qae'"),
        ({"name": "top_entropy", "micro_batch_size": None}, "needs a parameter fraction"),
        ({**good, "share": 1.0}, "has no parameter share"),
        ({**good, "fraction": 2.0}, "fraction: Input should be less than or equal to 1, got 2.0"),
        ({**good, "micro_batch_size": 0}, "scope: Input should be"),
        ({"name": "reweighting", "alpha": 0.3, "micro_batch_size": 4}, "no statistics over micro-batches"),
    ):
        with pytest.raises(ConfigError, match=message):
            intervention_from_record(wrong)
    with pytest.raises(CheckpointError, match="objective: top_entropy has no parameter share"):
        StepSettings.from_plain({"objective": {**good, "share": 1.0}}, where="stepscope.json")
    assert StepSettings.from_plain({"objective": good}, where="here").objective == TopEntropy()

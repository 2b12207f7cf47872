"""Objectives token by token, against values worked out by hand and against TRL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepscope.errors import CheckpointError, ConfigError, MeasurementError
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import policy_loss
from stepscope.policy.loss.token_objectives import UNCLIPPED, TokenTable, objective_problem, token_advantages


def table(**changes: Any) -> TokenTable:
    """Two sequences of three and two tokens with log-probs of -1, -2, -3 | -1, -3 and advantages 1 | -1."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -3.0, 0.0]], dtype=torch.float64)
    made = TokenTable(
        logprobs=logprobs,
        old_logprobs=logprobs,
        entropies=torch.tensor([[0.5, 1.0, 2.0], [0.1, 1.5, 9.0]], dtype=torch.float64),
        advantages=torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=torch.float64),
        mask=torch.tensor([[True] * 3, [True, True, False]]),
        epsilon_low=0.2,
        epsilon_high=0.2,
    )
    return replace(made, **changes)


def shaped(
    name: str, made: TokenTable, *, step: int = 0, size: int | None = None, **parameters: Any
) -> Tensor:
    return token_advantages({"name": name, "micro_batch_size": size, **parameters}, made, seed=0, step=step)


def test_clip_cov_drops_tokens_of_high_covariance() -> None:
    """mean l = -2, mean A = 0.2: Cov = 0.8, 0, -0.8 | -1.2, 1.2."""
    everything = shaped("clip_cov", table(), fraction=1.0, low=0.5, high=5.0)
    torch.testing.assert_close(everything, torch.tensor([[0.0, 1, 1], [-1, 0, 0]], dtype=torch.float64))
    bounded = shaped("clip_cov", table(), fraction=1.0, low=0.5, high=1.0)
    torch.testing.assert_close(bounded, torch.tensor([[0.0, 1, 1], [-1, -1, 0]], dtype=torch.float64))
    none = shaped("clip_cov", table(), fraction=1.0, low=2.0, high=5.0)
    torch.testing.assert_close(none, torch.tensor([[1.0, 1, 1], [-1, -1, 0]], dtype=torch.float64))


def test_clip_cov_draws_at_least_one_token_by_seed_and_step() -> None:
    """int(2e-4 x 5) = 0, so one of the two candidates leaves, each for some step."""
    dropped = set()
    for step in range(8):
        one = shaped("clip_cov", table(), step=step, fraction=2e-4, low=0.5, high=5.0)
        again = shaped("clip_cov", table(), step=step, fraction=2e-4, low=0.5, high=5.0)
        torch.testing.assert_close(one, again)
        gone = (one == 0) & table().mask
        assert int(gone.sum()) == 1
        dropped.add(tuple(torch.nonzero(gone)[0].tolist()))
    assert dropped == {(0, 0), (1, 1)}


def test_clip_cov_leaves_tokens_that_ppo_clips_alone() -> None:
    """l - l_old = 1 on the first token, whose advantage is positive: it is clipped already."""
    made = table()
    old = made.logprobs.clone()
    old[0, 0] -= 1
    found = shaped("clip_cov", replace(made, old_logprobs=old), fraction=1.0, low=0.5, high=5.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 1], [-1, 0, 0]], dtype=torch.float64))


def test_covariance_of_a_micro_batch_of_one_sequence_is_zero() -> None:
    found = shaped("clip_cov", table(), size=1, fraction=1.0, low=0.01, high=5.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 1], [-1, -1, 0]], dtype=torch.float64))


def unclipped(**changes: Any) -> TokenTable:
    return table(epsilon_low=1.0, epsilon_high=UNCLIPPED, **changes)


def test_kl_cov_has_the_gradient_of_its_penalty() -> None:
    """The covariance is highest at (1, 1) and (0, 0); there the loss is -r A + 2 |log r|."""
    old = table().logprobs + torch.tensor([[0.3, 0, 0.1], [0, -0.2, 0]], dtype=torch.float64)
    made = unclipped(old_logprobs=old)
    found = shaped("kl_cov", made, fraction=0.5, coefficient=2.0)
    leaves = made.logprobs.clone().requires_grad_(True)
    ratio = torch.exp(leaves - old)
    loss = (-ratio * made.advantages)[made.mask].sum()
    loss = loss + 2 * (leaves - old).abs()[0, 0] + 2 * (leaves - old).abs()[1, 1]
    (published,) = torch.autograd.grad(loss, leaves)
    settings = StepSettings(loss_type="dapo", epsilon_low=1.0, epsilon_high=UNCLIPPED)
    (ours,) = torch.autograd.grad(policy_loss(leaves, old, found, made.mask, settings), leaves)
    torch.testing.assert_close(5 * ours, published)


def test_kl_cov_does_nothing_on_policy_and_needs_clipping_off() -> None:
    found = shaped("kl_cov", unclipped(), fraction=1.0, coefficient=2.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 1], [-1, -1, 0]], dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"ratio is clipped to 0\.8 \.\.\. 1\.2"):
        shaped("kl_cov", table(), fraction=1.0, coefficient=2.0)


def test_top_entropy_keeps_the_uncertain_tokens() -> None:
    """The 0.6-quantile of 0.1, 0.5, 1, 1.5, 2 is 1.2."""
    found = shaped("top_entropy", table(), fraction=0.4)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 1], [0, -1, 0]], dtype=torch.float64))


def test_reweighting_plays_improbable_tokens_down() -> None:
    found = shaped("reweighting", table(), alpha=0.25)
    expected = [0.25 * np.exp(x) + 0.75 for x in (-1.0, -2.0, -3.0)]
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64))
    assert float(found[1, 0]) == pytest.approx(-expected[0])


def steer_change(p: float, entropy: float) -> float:
    return abs(p * (1 - p) * (np.log(p) + entropy))


def test_steer_weighs_by_the_tabular_entropy_change() -> None:
    """Probabilities 0.5, 0.25 with entropies 0.2, 0.3, one sequence, ratio 2 on the second token."""
    logprobs = torch.log(torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    made = TokenTable(
        logprobs=logprobs,
        old_logprobs=logprobs - torch.tensor([[0.0, np.log(2)]], dtype=torch.float64),
        entropies=torch.tensor([[0.2, 0.3]], dtype=torch.float64),
        advantages=torch.tensor([[2.0, 2.0]], dtype=torch.float64),
        mask=torch.ones(1, 2, dtype=torch.bool),
        epsilon_low=0.2,
        epsilon_high=2.0,
    )
    small, large = steer_change(0.5, 0.2), steer_change(0.25, 0.3)
    theorem = shaped("steer", made, form="theorem", min_weight=0.7)
    expected = [2 * 0.7 ** (small / (2 * large)), 2 * 0.7]
    torch.testing.assert_close(theorem, torch.tensor([expected], dtype=torch.float64))
    released = shaped("steer", made, form="released", min_weight=0.7)
    expected = [2 * 0.7 ** (small / 0.5 / (large / 0.125)), 2 * 0.7]
    torch.testing.assert_close(released, torch.tensor([expected], dtype=torch.float64))
    clipped = shaped("steer", replace(made, epsilon_high=0.5), form="theorem", min_weight=0.7)
    torch.testing.assert_close(clipped, torch.tensor([[2 * 0.7, 2.0]], dtype=torch.float64))


def test_released_steer_does_not_magnify_small_changes() -> None:
    certain = table(logprobs=torch.full((2, 3), -1e-4, dtype=torch.float64), entropies=torch.zeros(2, 3))
    certain = replace(certain, old_logprobs=certain.logprobs)
    weak = shaped("steer", certain, form="released", min_weight=0.7)
    assert float((weak.abs()[certain.mask] - 1).abs().max()) < 1e-5
    strong = shaped("steer", certain, form="theorem", min_weight=0.7)
    torch.testing.assert_close(strong.abs()[certain.mask], torch.full((5,), 0.7, dtype=torch.float64))


def discriminated(**changes: Any) -> TokenTable:
    """p = 0.5, 0.05 | 0.5, 0.05 of distributions over two tokens and a deviation worked out below."""
    p = torch.tensor([[0.5, 0.05], [0.5, 0.05]], dtype=torch.float64)
    entropies = -(p * p.log() + (1 - p) * (1 - p).log())
    means = p**2 * (p.log() + entropies) + (1 - p) ** 2 * ((1 - p).log() + entropies)
    return TokenTable(
        logprobs=p.log(),
        old_logprobs=p.log(),
        entropies=entropies,
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64),
        mask=torch.ones(2, 2, dtype=torch.bool),
        epsilon_low=0.2,
        epsilon_high=0.2,
        discriminators=means,
        **changes,
    )


def test_discriminator_drops_negative_tokens_that_lower_entropy() -> None:
    """S = p (l + H) is 0 at p = 0.5 and negative at 0.05: only the improbable token lowers entropy."""
    expected = torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for form in ("vocabulary", "batch"):
        found = shaped("discriminator", discriminated(), form=form, threshold=0.9, max_fraction=1.0)
        torch.testing.assert_close(found, expected)
    for threshold, most in ((9.0, 1.0), (0.9, 0.2)):
        kept = shaped(
            "discriminator", discriminated(), form="vocabulary", threshold=threshold, max_fraction=most
        )
        torch.testing.assert_close(kept, discriminated().advantages)


def test_discriminator_is_the_entropy_change_of_a_tabular_policy() -> None:
    """dH along the gradient of A log pi(a) is -A (S_a - M) for free logits."""
    logits = torch.tensor([0.3, -0.4, 1.2, 0.0], dtype=torch.float64, requires_grad=True)
    distribution = torch.log_softmax(logits, 0)
    entropy = -(distribution.exp() * distribution).sum()
    (towards,) = torch.autograd.grad(distribution[1], logits, retain_graph=True)
    (slope,) = torch.autograd.grad(entropy, logits)
    scores = (distribution.exp() * (distribution + entropy)).detach()
    mean = (distribution.exp().detach() * scores).sum()
    torch.testing.assert_close(slope @ towards, mean - scores[1])


def test_discriminator_of_the_vocabulary_says_what_it_lacks() -> None:
    with pytest.raises(MeasurementError, match="score_discriminators"):
        shaped(
            "discriminator",
            replace(discriminated(), discriminators=None),
            form="vocabulary",
            threshold=1.0,
            max_fraction=1.0,
        )


def test_influence_takes_the_tokens_that_cost_more_entropy_than_their_reward_is_worth() -> None:
    """Costs -I_H - price I_R: at price 0 they are 3, 1, -2 | 2, 0; at price 1 they are 0, 0.5, -2 | 3, 4."""
    measured = table(
        entropy_influence=torch.tensor([[-3.0, -1.0, 2.0], [-2.0, 0.0, -9.0]], dtype=torch.float64),
        reward_influence=torch.tensor([[3.0, 0.5, 0.0], [-1.0, -4.0, -9.0]], dtype=torch.float64),
    )

    def found(**changes: float) -> list[list[float]]:
        usual = {"fraction": 1.0, "price": 0.0, "weight": 0.0, "num_prompts": 2}
        return shaped("influence", measured, **(usual | changes)).tolist()

    assert found() == [[0, 0, 1], [0, -1, 0]]
    assert found(fraction=0.4) == [[0, 1, 1], [0, -1, 0]]
    assert found(fraction=0.1) == [[1, 1, 1], [-1, -1, 0]]
    assert found(price=1.0) == [[1, 0, 1], [0, -1, 0]]
    assert found(price=1.0, weight=0.25) == [[1, 0.25, 1], [-0.25, -1, 0]]
    with pytest.raises(MeasurementError, match="influence on entropy and reward"):
        shaped("influence", table(), fraction=1.0, price=0.0, weight=0.0, num_prompts=2)


def test_records_that_are_not_understood_are_refused() -> None:
    good = {"name": "top_entropy", "micro_batch_size": None, "fraction": 0.2}
    assert objective_problem(good) == ""
    assert "unknown name 'qae'" in objective_problem({"name": "qae"})
    assert "needs a parameter fraction" in objective_problem(
        {"name": "top_entropy", "micro_batch_size": None}
    )
    assert "has no parameter share" in objective_problem({**good, "share": 1.0})
    with pytest.raises(CheckpointError, match="objective: top_entropy has no parameter share"):
        StepSettings.from_dict({"objective": {**good, "share": 1.0}}, where="stepscope.json")
    with pytest.raises(ConfigError, match="changes no advantage"):
        shaped("entropy_bonus", table(), coefficient=0.1)
    assert StepSettings.from_dict({"objective": good}, where="here").objective == good

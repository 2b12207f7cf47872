"""Token weights of a batch of responses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cases
from stepscope.errors import BatchError, ConfigError
from stepscope.policy.loss.advantages import advantages
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import token_weights
from stepscope.results import Rollouts

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]
RESPONSES = [[10, 11, 12, 1], [13, 1], [14, 15, 16, 17, 18], [3, 4, 1]]
REWARDS = np.array([1.0, 0.25, 0.0, 2.0])


def make_rollouts(rewards: np.ndarray = REWARDS, **changes: Any) -> Rollouts:
    rng = np.random.default_rng(0)
    known: dict[str, Any] = {
        "prompt_ids": ("a", "a", "b", "b"),
        "rewards": rewards,
        "truncated": np.array([False, False, True, False]),
        "logprobs": tuple(-rng.random(len(r)) for r in RESPONSES),
        "entropies": tuple(rng.random(len(r)) for r in RESPONSES),
        "max_response_tokens": 6,
        "advantages": advantages(rewards, np.array([0, 0, 1, 1]), "none"),
    }
    return cases.rollouts(PROMPTS, RESPONSES, **(known | changes))


def test_on_policy_weights_are_the_closed_form_of_each_loss() -> None:
    rollouts = make_rollouts()
    lengths, adv = rollouts.num_tokens, rollouts.advantages
    assert adv is not None
    expected = {
        "dr_grpo": adv / (4 * 6),
        "grpo": adv / (4 * lengths),
        "bnpo": adv / lengths.sum(),
        "dapo": adv / lengths.sum(),
    }
    for loss_type, per_token in expected.items():
        found = token_weights(rollouts, StepSettings(loss_type=loss_type, max_response_tokens=6))
        for i, weights in enumerate(found):
            np.testing.assert_allclose(weights, np.full(lengths[i], per_token[i]), rtol=1e-12)


def test_truncated_responses_leave_the_loss_on_request() -> None:
    rollouts = make_rollouts()
    kept = token_weights(rollouts, StepSettings(loss_type="dapo", mask_truncated=True))
    assert not kept[2].any()
    assert rollouts.advantages is not None
    np.testing.assert_allclose(kept[0], rollouts.advantages[0] / (4 + 2 + 3))


def test_clipped_tokens_have_no_weight_off_policy() -> None:
    rollouts = make_rollouts()
    now = [row + 1.0 for row in rollouts.logprobs]
    weights = token_weights(rollouts, StepSettings(max_response_tokens=6), logprobs=now)
    assert rollouts.advantages is not None
    for w, a in zip(weights, rollouts.advantages, strict=True):
        expected = 0.0 if a > 0 else a * np.e / 24
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_kl_penalty_pulls_towards_the_reference() -> None:
    rollouts = make_rollouts(np.zeros(4))
    ref = [row + 0.5 for row in rollouts.logprobs]
    for correction, pull in ((True, 0.5), (False, np.exp(0.5) - 1)):
        settings = StepSettings(beta=0.2, max_response_tokens=6, bias_correction_kl=correction)
        weights = token_weights(rollouts, settings, ref_logprobs=ref)
        np.testing.assert_allclose(weights[0], 0.2 * pull / 24, rtol=1e-12)
    with pytest.raises(ConfigError, match="pass ref_logprobs"):
        token_weights(rollouts, StepSettings(beta=0.2))


def test_batch_without_signal_is_refused_with_the_cure() -> None:
    with pytest.raises(BatchError, match=r"all 4 advantages are zero .* resample"):
        token_weights(make_rollouts(np.ones(4)), StepSettings())
    with pytest.raises(BatchError, match="no advantages"):
        token_weights(make_rollouts(advantages=None), StepSettings())


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="'reinforce'"):
        token_weights(make_rollouts(), StepSettings(loss_type="reinforce"))

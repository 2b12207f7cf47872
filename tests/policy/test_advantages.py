"""Advantages against what TRL computes while it trains, and against verl's formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import cases
from stepscope.errors import BatchError, ConfigError
from stepscope.policy.loss.advantages import advantages
from stepscope.policy.loss.estimators import ESTIMATORS, with_advantages
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts


def trained(folder: Path, kind: Any, config: Any, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and advantages of a step of a real training, in their order before it is shuffled."""
    seen: list[torch.Tensor] = []

    class Recording(kind):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            seen.append(found["advantages"])
            return found

    rewards: list[list[float]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        rewards.append([0.1 * sum(ids) for ids in completion_ids])
        return rewards[-1]

    trainer = Recording(
        model=cases.model(),
        reward_funcs=reward,
        args=config(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            shuffle_dataset=False,
            disable_tqdm=True,
            beta=0.0,
            **changes,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        processing_class=cases.tokenizer(),
    )
    trainer.train()
    return np.array(rewards[0]), seen[0].double().numpy()


@pytest.mark.parametrize(
    ("kind", "config", "changes", "settings"),
    [
        (GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}, {"scale_rewards": "none"}),
        (GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}, {"scale_rewards": "group"}),
        (GRPOTrainer, GRPOConfig, {"scale_rewards": "batch"}, {"scale_rewards": "batch"}),
        (
            GRPOTrainer,
            GRPOConfig,
            {"multi_objective_aggregation": "normalize_then_sum"},
            {"advantage_estimator": "normalize_then_sum"},
        ),
        (RLOOTrainer, RLOOConfig, {}, {"advantage_estimator": "rloo"}),
        (
            RLOOTrainer,
            RLOOConfig,
            {"normalize_advantages": True},
            {"advantage_estimator": "rloo", "advantage_parameters": {"normalize_advantages": True}},
        ),
    ],
)
def test_advantages_equal_what_trl_computes_while_training(
    tmp_path: Path, kind: Any, config: Any, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    rewards, theirs = trained(tmp_path, kind, config, **changes)
    batch = graded(rewards, np.repeat([0, 1], 4))
    ours = with_advantages(batch, StepSettings(**settings)).advantages
    assert ours is not None
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0


def test_a_kl_penalty_comes_off_the_rewards_as_in_trls_rloo(tmp_path: Path) -> None:
    """On a real trainer whose reference policy is another one."""
    cases.model().save_pretrained(tmp_path / "model")
    cases.tokenizer().save_pretrained(tmp_path / "model")
    trainer = RLOOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=lambda completion_ids, **kwargs: [0.1 * sum(ids) for ids in completion_ids],
        args=RLOOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            use_cpu=True,
            bf16=False,
            report_to=[],
            beta=0.3,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.ref_model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    made = trainer._generate_and_score_completions([{"prompt": p} for p in ["1+1="] * 4 + ["2+2="] * 4])
    owner = Policy(trainer.model.eval(), None, StepSettings(max_response_tokens=6))
    batch = cases.scored(owner, cases.from_trl([made]))
    rewards = np.array([0.1 * sum(ids) for ids in batch.response_token_ids])
    batch = replace(batch, rewards=rewards, prompt_ids=("a",) * 4 + ("b",) * 4)
    settings = StepSettings(advantage_estimator="rloo", kl_in_reward=0.3)
    ref = score_rollouts(replace(owner, model=trainer.ref_model.eval()), batch)[0]
    ours = with_advantages(batch, settings, ref).advantages
    assert ours is not None
    np.testing.assert_allclose(ours, made["advantages"].double().numpy(), rtol=1e-4, atol=1e-5)
    plain = with_advantages(batch, replace(settings, kl_in_reward=0.0)).advantages
    assert plain is not None
    assert np.abs(ours - plain).max() > 1e-3
    with pytest.raises(ConfigError, match=r"kl_in_reward = 0\.3: advantages need the reference"):
        with_advantages(batch, settings)


def test_penalties_of_tokens_come_off_the_returns_before_them() -> None:
    """REINFORCE++ with KL in the reward (verl: token_level_rewards less beta times kld), by its recursion."""
    rng = np.random.default_rng(0)
    masks = [np.array([True, False, True, True]), np.array([True, True])]
    old, ref = ([-rng.random(len(m)) * m for m in masks] for _ in range(2))
    batch = replace(graded(np.array([1.0, -2.0]), np.array([0, 0]), masks), logprobs=tuple(old))
    for gamma in (1.0, 0.7):
        settings = StepSettings(
            advantage_estimator="verl:reinforce_plus_plus",
            advantage_parameters={"gamma": gamma},
            kl_in_reward=0.5,
            kl_penalty="mse",
        )
        returns = []
        for i, mask in enumerate(masks):
            rewards = -0.5 * 0.5 * (old[i] - ref[i]) ** 2 * mask
            rewards[-1] += batch.rewards[i]
            running, row = 0.0, np.zeros(len(mask))
            for t in reversed(range(len(mask))):
                new = rewards[t] + gamma * running
                row[t], running = new * mask[t], new if mask[t] else running
            returns.append(row[mask])
        flat = np.concatenate(returns)
        white = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
        found = with_advantages(batch, settings, ref)
        assert found.token_advantages is not None
        np.testing.assert_allclose(found.flat(found.token_advantages), white, rtol=1e-6)


def graded(rewards: np.ndarray, group: np.ndarray, masks: Sequence[np.ndarray] | None = None) -> Rollouts:
    lengths = [2] * len(rewards) if masks is None else [len(mask) for mask in masks]
    return cases.rollouts(
        [[5]] * len(rewards),
        [[6] * n for n in lengths],
        prompt_ids=tuple(f"p{g}" for g in group),
        rewards=rewards,
        response_masks=None if masks is None else tuple(masks),
    )


def whitened(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``masked_whiten`` of ``verl/utils/torch_functional.py``."""
    flat = np.repeat(values, counts)
    return (values - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)


def transcribed(
    name: str, rewards: np.ndarray, group: np.ndarray, counts: np.ndarray, scaled: bool
) -> np.ndarray:
    """``compute_NAME_outcome_advantage`` of verl 0.9.1's ``core_algos.py``, one response after the other."""
    found = np.zeros(len(rewards))
    for i, (r, g) in enumerate(zip(rewards, group, strict=True)):
        own = rewards[group == g]
        alone = len(own) == 1
        mean, std = (0.0, 1.0) if alone else (own.mean(), own.std(ddof=1))
        match name:
            case "grpo" | "gdpo":
                found[i] = (r - mean) / (std + 1e-6) if scaled else r - mean
            case "reinforce_plus_plus_baseline":
                found[i] = r - mean
            case "reinforce_plus_plus":
                found[i] = r
            case "rloo":
                found[i] = r if alone else r - (own.sum() - r) / (len(own) - 1)
            case "rloo_vectorized":
                found[i] = 0.0 if alone else r - (own.sum() - r) / (len(own) - 1)
            case "opo":
                weights = counts[group == g]
                found[i] = r if alone else r - (weights * own).sum() / weights.sum()
            case "gpg":
                found[i] = (r - mean) * len(rewards) / max(1, np.count_nonzero(rewards))
            case "grpo_passk":
                best = np.flatnonzero((group == g) & (rewards == own.max()))[0]
                gap = 0.0 if alone else np.sort(own)[-1] - np.sort(own)[-2]
                found[i] = (i == best) * (gap / (std + 1e-6) if scaled else gap)
    return (
        whitened(found, counts)
        if name in ("gdpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
        else found
    )


@pytest.mark.parametrize("name", [n.removeprefix("verl:") for n in ESTIMATORS if n.startswith("verl:")])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_those_of_verls_formulas(name: str, scale: str) -> None:
    """Groups of one to four, rewards with ties, tokens of tools."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        group = rng.permutation(np.repeat(np.arange(4), [1, 2, 3, 4]))
        rewards = rng.integers(0, 3, len(group)) / 2.0
        masks = [np.append(rng.random(rng.integers(1, 6)) > 0.3, True) for _ in group]
        counts = np.array([mask.sum() for mask in masks])
        found = with_advantages(
            graded(rewards, group, masks),
            StepSettings(advantage_estimator=f"verl:{name}", scale_rewards=scale),
        )
        assert found.token_advantages is None
        expected = transcribed(name, rewards, group, counts, scale == "group")
        np.testing.assert_allclose(found.advantages, expected, rtol=1e-6, atol=1e-9)


def test_discounted_returns_are_advantages_per_token() -> None:
    """REINFORCE++ with gamma below 1: tokens of tools take no step of the discount and have no advantage."""
    masks = [np.array([True, False, True, True]), np.array([True, True])]
    settings = StepSettings(
        advantage_estimator="verl:reinforce_plus_plus", advantage_parameters={"gamma": 0.5}
    )
    found = with_advantages(graded(np.array([1.0, -2.0]), np.array([0, 0]), masks), settings)
    returns = np.array([0.25, 0.5, 1.0, -1.0, -2.0])
    white = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
    assert found.token_advantages is not None
    np.testing.assert_allclose(found.token_advantages[0], [white[0], 0.0, white[1], white[2]], rtol=1e-6)
    np.testing.assert_allclose(found.token_advantages[1], white[3:], rtol=1e-6)
    update = replace(found, truncated=np.zeros(2, dtype=bool))
    weights = token_weights(update, StepSettings(loss_type="dapo"))
    np.testing.assert_allclose(weights[0], found.token_advantages[0] / 5, rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_estimator": "verl:gae"}, "verl:gae needs a critic's values; give a batch that brings"),
        ({"advantage_estimator": "verl:remax"}, "needs the reward of a greedy response"),
        ({"advantage_estimator": "gae"}, "got 'gae', expected one of rloo"),
        (
            {"advantage_estimator": "rloo", "advantage_parameters": {"gamma": 1.0}},
            r"parameters\.gamma of rloo",
        ),
        ({"advantage_estimator": "verl:grpo", "scale_rewards": "batch"}, "scales by the group or not at all"),
    ],
)
def test_estimators_that_need_more_than_rewards_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_advantages(graded(np.array([0.0, 1.0]), np.array([0, 0])), StepSettings(**changes))


def test_groups_are_found_by_prompt_not_by_position() -> None:
    shuffled = advantages(np.array([1.0, 5.0, 3.0, 7.0]), np.array([0, 1, 0, 1]), "none")
    np.testing.assert_array_equal(shuffled, [-1, -1, 1, 1])


def test_equal_rewards_give_exactly_zero() -> None:
    values = np.full(7, 0.1)
    for scale in ("none", "group", "batch"):
        assert not advantages(values, np.zeros(7, dtype=np.int64), scale).any()


def test_non_finite_reward_and_unknown_scaling_are_refused() -> None:
    with pytest.raises(BatchError, match="sequence 1: reward is nan"):
        advantages(np.array([0.0, np.nan]), np.array([0, 0]), "none")
    with pytest.raises(ConfigError, match="scale_rewards"):
        advantages(np.array([0.0, 1.0]), np.array([0, 0]), "std")

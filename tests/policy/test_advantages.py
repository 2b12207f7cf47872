"""Advantages against what TRL computes while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import cases
from stepscope.errors import BatchError, ConfigError
from stepscope.policy.loss.advantages import advantages


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_equal_what_trl_computes_while_training(tmp_path: Path, scale: str) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Recording(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = super()._generate_and_score_completions(inputs)
            seen.append(found)
            return found

    rewards: list[list[float]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        rewards.append([0.1 * sum(ids) for ids in completion_ids])
        return rewards[-1]

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        scale_rewards=scale,
        shuffle_dataset=False,
        disable_tqdm=True,
    )
    trainer = Recording(
        model=cases.model(),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        processing_class=cases.tokenizer(),
    )
    trainer.train()
    ours = advantages(np.array(rewards[0]), np.array([0] * 4 + [1] * 4), scale)
    theirs = seen[0]["advantages"].numpy()
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0


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

"""Advantages from rewards."""

from __future__ import annotations

import numpy as np

from stepscope.errors import BatchError, ConfigError
from stepscope.results import FloatArray, IntArray

SCALINGS = ("none", "group", "batch")
"""Ways to scale advantages, under TRL's names."""

STD_EPSILON = 1e-4
"""TRL divides by the standard deviation plus this."""


def advantages(rewards: FloatArray, prompt_index: IntArray, scale: str) -> FloatArray:
    """Advantages of GRPO: A_i = r_i - mean of the rewards of its group, optionally scaled.

    ``none`` leaves A as it is (Dr. GRPO), ``group`` divides by the group's standard deviation + 1e-4,
    ``batch`` by that of the whole batch + 1e-4 (both with Bessel's correction). In a group whose rewards are
    all equal the advantages are exactly zero.

    Args:
        rewards: (seq,) total rewards.
        prompt_index: (seq,) equal numbers form a group; groups may differ in size.
        scale: ``none``, ``group`` or ``batch``.

    Returns:
        (seq,) advantages.

    Raises:
        BatchError: a reward is not finite.
        ConfigError: ``scale`` is unknown.

    Source: TRL's ``GRPOTrainer._generate_and_score_completions``; Shao et al. 2024 (arXiv:2402.03300), Liu et
    al. 2025 (arXiv:2503.20783). Pinned by ``tests/policy/test_advantages.py``.
    """
    if scale not in SCALINGS:
        raise ConfigError(
            f"scale_rewards: got {scale!r}, expected one of {', '.join(SCALINGS)}; use one of these"
        )
    rewards = np.asarray(rewards, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(rewards))
    if len(broken):
        raise BatchError(
            f"sequence {broken[0]}: reward is {rewards[broken[0]]}, expected a finite number; mend the "
            "task's score"
        )
    result = np.zeros_like(rewards)
    for group in np.unique(prompt_index):
        members = prompt_index == group
        values = rewards[members]
        if np.ptp(values) == 0:
            continue
        centred = values - values.mean()
        result[members] = centred / (values.std(ddof=1) + STD_EPSILON) if scale == "group" else centred
    if scale == "batch" and len(rewards) > 1:
        result = result / (rewards.std(ddof=1) + STD_EPSILON)
    return result

"""Figures of an evaluation as ratios of sums over each prompt's responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from stepscope.results import FloatArray
from stepscope.results.evaluation import UNITS, PromptResult
from stepscope.stats import pass_at_k

RATIOS: Mapping[str, tuple[str, str, str]] = {
    "mean_reward": ("reward", "num_samples", UNITS["mean_reward"]),
    "format_rate": ("num_formatted", "num_samples", UNITS["format_rate"]),
    "truncated_rate": ("num_truncated", "num_samples", UNITS["truncated_rate"]),
    "mean_length": ("num_tokens", "num_samples", UNITS["mean_length"]),
    "mean_length_correct": ("num_tokens_correct", "num_correct", UNITS["mean_length_correct"]),
    "entropy_per_token": ("entropy", "num_tokens", UNITS["entropy_per_token"]),
    "surprisal": ("surprisal", "num_tokens", UNITS["surprisal"]),
}
"""Figures that are ratios of sums over responses: numerator and denominator in PromptResult, and unit."""


def prompt_ratios(
    prompts: Sequence[PromptResult], ks: Sequence[int]
) -> dict[str, tuple[FloatArray, FloatArray, str]]:
    """Every figure that is a ratio of sums over prompts: numerators and denominators per prompt, and unit.

    Args:
        prompts: the sums.
        ks: numbers of samples k for ``pass_at_k``, whose numerators are the unbiased estimates per prompt.
    """
    columns = {
        f.name: np.array([getattr(p, f.name) for p in prompts], dtype=np.float64)
        for f in fields(PromptResult)
        if f.name != "prompt_id"
    }
    ones = np.ones(len(prompts))
    found = {
        f"pass_at_{k}": (pass_at_k(columns["num_samples"], columns["num_correct"], k), ones, "fraction")
        for k in ks
    }
    return found | {name: (columns[x], columns[y], unit) for name, (x, y, unit) in RATIOS.items()}

"""One evaluation: its figures, and the sums over each prompt's responses that they are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from stepscope.results import FloatArray
from stepscope.stats import pass_at_k

NAN = float("nan")

RATIOS: Mapping[str, tuple[str, str, str]] = {
    "mean_reward": ("reward", "num_samples", "reward"),
    "format_rate": ("num_formatted", "num_samples", "fraction"),
    "truncated_rate": ("num_truncated", "num_samples", "fraction"),
    "mean_length": ("num_tokens", "num_samples", "tokens"),
    "mean_length_correct": ("num_tokens_correct", "num_correct", "tokens"),
    "entropy_per_token": ("entropy", "num_tokens", "nats/token"),
    "surprisal": ("surprisal", "num_tokens", "nats/token"),
}
"""Figures that are ratios of sums over responses: numerator and denominator in PromptResult, and unit."""

PASS_AT = re.compile(r"pass_at_(\d+)")
"""Column of a pass@k."""


@dataclass(frozen=True)
class PromptResult:
    """What the responses to one prompt add up to.

    Attributes:
        prompt_id: of the prompt.
        num_samples: responses.
        num_correct: correct ones among them.
        num_formatted: those that keep the format.
        num_truncated: those cut at the longest length.
        num_tokens: their tokens.
        num_tokens_correct: tokens of the correct ones.
        reward: sum of the rewards.
        entropy: sum of the position entropies, nats.
        surprisal: sum of -log pi(y_k|s_k), nats.
    """

    prompt_id: str
    num_samples: int
    num_correct: int
    num_formatted: int
    num_truncated: int
    num_tokens: int
    num_tokens_correct: int
    reward: float
    entropy: float
    surprisal: float


@dataclass(frozen=True)
class EvaluationRow:
    """One checkpoint's evaluation; each ``*_stderr`` belongs to the field before it (nan with one prompt).

    Attributes:
        step: optimizer steps of the checkpoint.
        checkpoint: name of its folder; empty for a policy built in code.
        checkpoint_digest: SHA-256 over its files; empty where it was not taken.
        task: specification of the task.
        split: its split.
        temperature: sampling temperature.
        top_p: nucleus of the sampling; entropy and surprisal are those of the whole policy all the same.
        seed: of prompts and samples.
        num_prompts: prompts asked.
        samples_per_prompt: responses per prompt.
        num_tokens: response tokens in all.
        mean_reward: mean total reward.
        format_rate: fraction of responses that keep the format.
        truncated_rate: fraction of responses cut at the longest length.
        mean_length: tokens per response, the end-of-sequence token among them.
        mean_length_correct: the same over correct responses; nan where there is none.
        entropy_per_token: sum of the position entropies over the number of tokens, nats.
        surprisal: -log pi(y_k|s_k) of the sampled tokens, mean over tokens, nats; its expectation is the
            entropy.
        surprisal_q50: median of that over tokens; the errors of quantiles are Woodruff's (1952).
        surprisal_q90: its 0.9 quantile.
        surprisal_q99: its 0.99 quantile.
        pass_at: k to (unbiased pass@k, standard error); k = 1, always there, is mean@k for every k: the mean
            over all samples.
        prompts: sums over the responses of each prompt.
        intervals: figure to the ends of its 95 % interval.
    """

    step: int
    checkpoint: str
    checkpoint_digest: str
    task: str
    split: str
    temperature: float
    top_p: float
    seed: int
    num_prompts: int
    samples_per_prompt: int
    num_tokens: int
    mean_reward: float
    mean_reward_stderr: float
    format_rate: float
    format_rate_stderr: float
    truncated_rate: float
    truncated_rate_stderr: float
    mean_length: float
    mean_length_stderr: float
    mean_length_correct: float
    mean_length_correct_stderr: float
    entropy_per_token: float
    entropy_per_token_stderr: float
    surprisal: float
    surprisal_stderr: float
    surprisal_q50: float
    surprisal_q50_stderr: float
    surprisal_q90: float
    surprisal_q90_stderr: float
    surprisal_q99: float
    surprisal_q99_stderr: float
    pass_at: Mapping[int, tuple[float, float]]
    prompts: tuple[PromptResult, ...]
    intervals: Mapping[str, tuple[float, float]]

    @property
    def pass_at_1(self) -> float:
        """Unbiased pass@1."""
        return self.pass_at[1][0]

    @property
    def pass_at_1_stderr(self) -> float:
        """Standard error of pass@1."""
        return self.pass_at[1][1]

    @property
    def pass_at_8(self) -> float:
        """Unbiased pass@8; nan where k = 8 was not asked for."""
        return self.pass_at.get(8, (NAN, NAN))[0]

    @property
    def pass_at_8_stderr(self) -> float:
        """Standard error of pass@8."""
        return self.pass_at.get(8, (NAN, NAN))[1]

    @property
    def key(self) -> tuple[Any, ...]:
        """What was evaluated and how; two rows with the same key answer the same question."""
        return (
            *(self.step, self.checkpoint, self.task, self.split),
            *(self.temperature, self.top_p, self.seed, self.num_prompts, self.samples_per_prompt),
        )

    def to_columns(self) -> dict[str, Any]:
        """The row of ``eval.parquet``: all fields but ``prompts``, mappings spread over columns."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in SCALARS}
        for k, (value, stderr) in sorted(self.pass_at.items()):
            columns |= {f"pass_at_{k}": value, f"pass_at_{k}_stderr": stderr}
        for name, (low, high) in self.intervals.items():
            columns |= {f"{name}_low": low, f"{name}_high": high}
        return columns


SCALARS = tuple(f.name for f in fields(EvaluationRow) if f.name not in ("pass_at", "prompts", "intervals"))
"""Fields of an evaluation that are a column each."""


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

"""How good a checkpoint is: pass@k, format, length, entropy and surprisal, each with its error.

Every standard error is clustered by prompt: samples of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepscope.errors import MeasurementError, RunFolderError
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts, read_table, write_table
from stepscope.stats import Estimate, clustered_mean, clustered_ratio, pass_at_k
from stepscope.tasks import Task

NAN = float("nan")


@dataclass(frozen=True)
class PromptRate:
    """How often one prompt was solved."""

    prompt_id: str
    num_samples: int
    num_correct: int


@dataclass(frozen=True)
class EvaluationRow:
    """One checkpoint's evaluation; each ``*_stderr`` belongs to the field before it (nan with one prompt).

    Attributes:
        step: optimizer steps of the checkpoint.
        checkpoint: name of its folder; empty for a policy built in code.
        task: specification of the task.
        split: its split.
        temperature: sampling temperature.
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
        pass_at: k to (unbiased pass@k, standard error); k = 1 is also mean@n, the mean over all samples.
        prompts: solved samples per prompt.
    """

    step: int
    checkpoint: str
    task: str
    split: str
    temperature: float
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
    prompts: tuple[PromptRate, ...]

    @property
    def pass_at_1(self) -> float:
        """Unbiased pass@1; nan where k = 1 was not asked for."""
        return self.pass_at.get(1, (NAN, NAN))[0]

    @property
    def pass_at_1_stderr(self) -> float:
        """Standard error of pass@1."""
        return self.pass_at.get(1, (NAN, NAN))[1]

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
            *(self.temperature, self.seed, self.num_prompts, self.samples_per_prompt),
        )

    def to_columns(self) -> dict[str, Any]:
        """The row of ``eval.parquet``: all fields but ``prompts``, with ``pass_at_k`` spread over columns."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in _SCALARS}
        for k, (value, stderr) in sorted(self.pass_at.items()):
            columns |= {f"pass_at_{k}": value, f"pass_at_{k}_stderr": stderr}
        return columns


_SCALARS = tuple(f.name for f in fields(EvaluationRow) if f.name not in ("pass_at", "prompts"))


def evaluate(
    policy: Policy,
    task: Task,
    *,
    num_prompts: int,
    samples_per_prompt: int,
    seed: int,
    ks: Sequence[int] = (1, 8),
    split: str = "test",
    temperature: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> EvaluationRow:
    """Sample responses and evaluate them.

    Args:
        policy: with a tokenizer.
        task: asked and scored.
        num_prompts: prompts, drawn by ``seed``: the same for every checkpoint, so that changes are paired.
        samples_per_prompt: responses per prompt.
        seed: of prompts and samples.
        ks: numbers of samples k for pass@k.
        split: split of the task.
        temperature: sampling temperature; None means the settings' own.
        batch_size: sequences generated at a time.
        progress: show a progress bar.

    Raises:
        MeasurementError: a k is larger than ``samples_per_prompt``.
        BatchError: the split has fewer prompts.
    """
    _require_samples(ks, samples_per_prompt)
    if temperature is not None:
        policy = replace(policy, settings=replace(policy.settings, temperature=temperature))
    rollouts = sample_rollouts(
        policy,
        task,
        num_prompts=num_prompts,
        group_size=samples_per_prompt,
        seed=seed,
        split=split,
        batch_size=batch_size,
        progress=progress,
    )
    return evaluate_rollouts(
        rollouts,
        task,
        ks=ks,
        step=policy.step,
        checkpoint="" if policy.path is None else policy.path.name,
        split=split,
        seed=seed,
    )


def evaluate_rollouts(
    rollouts: Rollouts,
    task: Task,
    *,
    ks: Sequence[int] = (1, 8),
    step: int = 0,
    checkpoint: str = "",
    split: str = "test",
    seed: int = 0,
) -> EvaluationRow:
    """Evaluate responses that are already there; the arithmetic of :func:`evaluate`.

    Args:
        rollouts: the same number of responses to every prompt.
        task: whose format the responses should keep.
        ks: numbers of samples k for pass@k.
        step: optimizer steps of the checkpoint.
        checkpoint: its name.
        split: where the prompts come from; recorded.
        seed: with which they were sampled; recorded.

    Raises:
        MeasurementError: prompts with different numbers of responses, or a k larger than that number.
    """
    clusters = rollouts.prompt_index
    counts = np.bincount(clusters)
    if counts.min() != counts.max():
        raise MeasurementError(
            f"evaluation: between {counts.min()} and {counts.max()} responses per prompt, expected the same "
            "number for all; sample them with one group size"
        )
    samples = int(counts[0])
    _require_samples(ks, samples)
    num_correct = np.bincount(clusters, weights=rollouts.correct).astype(np.int64)
    pass_at = {}
    for k in ks:
        rates = pass_at_k(counts, num_correct, k)
        pass_at[int(k)] = _pair(clustered_mean(rates, np.arange(len(rates)), unit="", method=""))

    def mean(values: npt.ArrayLike) -> tuple[float, float]:
        return _pair(clustered_mean(values, clusters, unit="", method=""))

    def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> tuple[float, float]:
        return _pair(clustered_ratio(numerator, denominator, clusters, unit="", method=""))

    lengths = rollouts.num_tokens
    formatted = np.array([task.formatted(text) for text in rollouts.responses], dtype=np.float64)
    surprisals = [-logprobs for logprobs in rollouts.logprobs]
    correct_lengths = (
        ratio(lengths * rollouts.correct, rollouts.correct) if rollouts.correct.any() else (NAN, NAN)
    )
    estimates = {
        "mean_reward": mean(rollouts.rewards),
        "format_rate": mean(formatted),
        "truncated_rate": mean(rollouts.truncated),
        "mean_length": mean(lengths),
        "mean_length_correct": correct_lengths,
        "entropy_per_token": ratio(rollouts.entropy_per_seq, lengths),
        "surprisal": ratio([float(s.sum()) for s in surprisals], lengths),
        **{f"surprisal_q{q}": _quantile(surprisals, clusters, q / 100) for q in (50, 90, 99)},
    }
    numbers = {name: value for name, (value, _) in estimates.items()}
    numbers |= {f"{name}_stderr": stderr for name, (_, stderr) in estimates.items()}
    ids = list(dict.fromkeys(rollouts.prompt_ids))
    return EvaluationRow(
        step=step,
        checkpoint=checkpoint,
        task=task.spec,
        split=split,
        temperature=rollouts.temperature,
        seed=seed,
        num_prompts=len(ids),
        samples_per_prompt=samples,
        num_tokens=int(lengths.sum()),
        pass_at=pass_at,
        prompts=tuple(
            PromptRate(prompt_id, samples, int(c)) for prompt_id, c in zip(ids, num_correct, strict=True)
        ),
        **numbers,
    )


@dataclass(frozen=True)
class Transitions:
    """How prompts moved between two evaluations.

    Attributes:
        counts: (before, after) numbers of prompts solved never, sometimes, always.
        gained: prompts solved never before and at least once after.
        lost: prompts solved at least once before and never after.
        change: mean change of the solved fraction, paired over prompts.
    """

    counts: npt.NDArray[np.int64]
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    change: Estimate


def transitions(before: EvaluationRow, after: EvaluationRow) -> Transitions:
    """Compare two evaluations prompt by prompt, over the prompts they share.

    Raises:
        MeasurementError: they share no prompt.
    """
    old = {p.prompt_id: p for p in before.prompts}
    pairs = [(old[p.prompt_id], p) for p in after.prompts if p.prompt_id in old]
    if not pairs:
        raise MeasurementError(
            f"transitions: the evaluations of step {before.step} and step {after.step} share no prompt; "
            "evaluate both with the same task, split and seed"
        )
    counts = np.zeros((3, 3), dtype=np.int64)
    for first, second in pairs:
        counts[_state(first), _state(second)] += 1
    changes = [b.num_correct / b.num_samples - a.num_correct / a.num_samples for a, b in pairs]
    return Transitions(
        counts=counts,
        gained=tuple(b.prompt_id for a, b in pairs if not a.num_correct and b.num_correct),
        lost=tuple(b.prompt_id for a, b in pairs if a.num_correct and not b.num_correct),
        change=clustered_mean(
            changes, [b.prompt_id for _, b in pairs], unit="fraction solved", method="paired over prompts"
        ),
    )


def prompts_path(path: Path) -> Path:
    """The table of per-prompt rates beside an evaluation: ``eval.parquet`` has ``eval_prompts.parquet``."""
    return path.with_name(f"{path.stem}_prompts{path.suffix}")


def write_eval(rows: Sequence[EvaluationRow], path: Path) -> None:
    """Write ``eval.parquet``, one row per evaluation, and the per-prompt rates beside it.

    A ``pass_at_k`` that one row has and another has not is null there. Each file appears whole or not at all;
    the rates are written first.

    Raises:
        MeasurementError: there is no row.
    """
    if not rows:
        raise MeasurementError(f"{path}: no evaluations to write; evaluate at least one checkpoint")
    columns = [row.to_columns() for row in rows]
    names = list(dict.fromkeys(name for row in columns for name in row))
    solved = [(i, row.step, p) for i, row in enumerate(rows) for p in row.prompts]
    rates = pa.table(
        {
            "row": pa.array([i for i, _, _ in solved], pa.int64()),
            "step": pa.array([step for _, step, _ in solved], pa.int64()),
            "prompt_id": pa.array([p.prompt_id for _, _, p in solved], pa.string()),
            "num_samples": pa.array([p.num_samples for _, _, p in solved], pa.int64()),
            "num_correct": pa.array([p.num_correct for _, _, p in solved], pa.int64()),
        }
    )
    write_table(rates, prompts_path(path))
    write_table(pa.table({name: [row.get(name) for row in columns] for name in names}), path)


def read_eval(path: Path) -> list[EvaluationRow]:
    """Read back what :func:`write_eval` wrote.

    Raises:
        RunFolderError: a file is missing, damaged, or lacks a column.
    """
    table = read_table(path)
    rates = read_table(prompts_path(path))
    missing = [name for name in _SCALARS if name not in table.column_names]
    if missing:
        raise RunFolderError(f"{path}: no column {', '.join(missing)}; evaluate again")
    solved: dict[int, list[PromptRate]] = {}
    for rate in rates.to_pylist():
        solved.setdefault(rate["row"], []).append(
            PromptRate(rate["prompt_id"], rate["num_samples"], rate["num_correct"])
        )
    rows = []
    for i, found in enumerate(table.to_pylist()):
        pass_at = {
            int(name.removeprefix("pass_at_")): (value, found[f"{name}_stderr"])
            for name, value in found.items()
            if name.startswith("pass_at_") and not name.endswith("_stderr") and value is not None
        }
        scalars = {name: found[name] for name in _SCALARS}
        rows.append(EvaluationRow(**scalars, pass_at=pass_at, prompts=tuple(solved.get(i, ()))))
    return rows


def _require_samples(ks: Sequence[int], samples: int) -> None:
    if not ks or min(ks) < 1 or max(ks) > samples:
        raise MeasurementError(
            f"evaluation: pass@k for k in {list(ks)} needs k between 1 and the {samples} samples per prompt; "
            "take more samples or smaller k"
        )


def _pair(estimate: Estimate) -> tuple[float, float]:
    return estimate.value, estimate.stderr


def _state(rate: PromptRate) -> int:
    """0 never, 1 sometimes, 2 always."""
    return 0 if rate.num_correct == 0 else 2 if rate.num_correct == rate.num_samples else 1


def _quantile(values: Sequence[FloatArray], clusters: npt.ArrayLike, level: float) -> tuple[float, float]:
    """Quantile over all tokens, with half the width of Woodruff's one-sigma interval as its error.

    The error s of the fraction of tokens at or below the quantile is that of a clustered ratio; the quantiles
    at level - s and level + s bound the interval.
    """
    pooled = np.sort(np.concatenate(values))
    quantile = float(np.quantile(pooled, level))
    below = [int((v <= quantile).sum()) for v in values]
    share = clustered_ratio(below, [len(v) for v in values], clusters, unit="", method="")
    if not np.isfinite(share.stderr):
        return quantile, NAN
    low, high = np.quantile(pooled, [max(level - share.stderr, 0.0), min(level + share.stderr, 1.0)])
    return quantile, float(high - low) / 2

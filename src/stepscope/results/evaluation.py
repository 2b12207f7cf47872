"""Evaluations on disk: a row per checkpoint, one per checkpoint and prompt, what changed between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from stepscope.errors import MeasurementError, RunFolderError
from stepscope.results.records import Record
from stepscope.results.tables import read_table, write_table
from stepscope.stats import Estimate

NAN = float("nan")

PASS_AT = re.compile(r"pass_at_(\d+)")
"""Column of a pass@k."""

UNITS: Mapping[str, str] = {
    "mean_reward": "reward",
    "format_rate": "fraction",
    "truncated_rate": "fraction",
    "mean_length": "tokens",
    "mean_length_correct": "tokens",
    "entropy_per_token": "nats/token",
    "surprisal": "nats/token",
    "surprisal_q50": "nats/token",
    "surprisal_q90": "nats/token",
    "surprisal_q99": "nats/token",
}
"""Figures of an evaluation beside pass@k, a fraction, and their units."""

_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}


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
    def estimates(self) -> dict[str, Estimate]:
        """The figures with their errors, by name."""
        found = {f"pass_at_{k}": (*self.pass_at[k], "fraction") for k in sorted(self.pass_at)}
        found |= {n: (getattr(self, n), getattr(self, f"{n}_stderr"), unit) for n, unit in UNITS.items()}
        method = f"{self.samples_per_prompt} responses to each prompt"
        return {
            name: Estimate(value, stderr, self.num_prompts, unit, method, low=low, high=high)
            for name, (value, stderr, unit) in found.items()
            for low, high in [self.intervals.get(name, (NAN, NAN))]
        }

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


@dataclass(frozen=True)
class Transitions(Record):
    """How prompts moved between two evaluations.

    Attributes:
        counts: (before, after) numbers of prompts solved never, sometimes, always.
        gained: prompts solved never before and at least once after.
        lost: prompts solved at least once before and never after.
    """

    counts: tuple[tuple[int, int, int], ...]
    gained: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Evaluated(Record):
    """Which evaluation is meant.

    Attributes:
        step: optimizer steps of the checkpoint.
        checkpoint: name of its folder.
    """

    step: int
    checkpoint: str


@dataclass(frozen=True)
class EvaluationChange(Record):
    """How two evaluations of a run differ.

    Attributes:
        before: the first.
        after: the second.
        transitions: how prompts moved.
        differences: after minus before of every figure that both have, over the same prompts.
    """

    before: Evaluated
    after: Evaluated
    transitions: Transitions
    differences: Mapping[str, Estimate]


@dataclass(frozen=True, repr=False)
class EvaluationChanges(Record):
    """``eval_changes.json``.

    Attributes:
        changes: of neighbouring checkpoints in order of step, then of the first against the last.
    """

    changes: tuple[EvaluationChange, ...]


def companion(table: Path, name: str) -> Path:
    """What belongs to an evaluation and stands beside its table: ``eval_NAME`` for ``eval.parquet``."""
    return table.with_name(f"{table.stem}_{name}")


def prompts_path(table: Path) -> Path:
    """The table of per-prompt results beside an evaluation: ``eval_prompts.parquet`` for ``eval.parquet``."""
    return companion(table, f"prompts{table.suffix}")


def law_path(table: Path) -> Path:
    """Where the entropy law of an evaluation is: ``entropy_law.json`` beside ``eval.parquet``."""
    law = "entropy_law.json"
    return table.with_name(law) if table.stem == "eval" else companion(table, law)


def write_eval(rows: Sequence[EvaluationRow], path: Path) -> None:
    """Write ``eval.parquet``, one row per evaluation, and the per-prompt results beside it.

    A ``pass_at_k`` that one row has and another has not is null there. Each file appears whole or not at all;
    the per-prompt results are written first.

    Raises:
        MeasurementError: there is no row.
    """
    if not rows:
        raise MeasurementError(f"{path}: no evaluations to write; evaluate at least one checkpoint")
    columns = [row.to_columns() for row in rows]
    names = list(dict.fromkeys(name for row in columns for name in row))
    results = [(i, row.step, p) for i, row in enumerate(rows) for p in row.prompts]
    own = {
        f.name: pa.array([getattr(p, f.name) for _, _, p in results], _TYPES[str(f.type)])
        for f in fields(PromptResult)
    }
    where = {
        "row": pa.array([i for i, _, _ in results], pa.int64()),
        "step": pa.array([step for _, step, _ in results], pa.int64()),
    }
    write_table(pa.table(where | own), prompts_path(path))
    write_table(pa.table({name: [row.get(name) for row in columns] for name in names}), path)


def read_eval(path: Path) -> list[EvaluationRow]:
    """Read back what :func:`write_eval` wrote.

    Raises:
        RunFolderError: a file is missing, damaged, or lacks a column.
    """
    table = read_table(path)
    results = read_table(prompts_path(path))
    own = [f.name for f in fields(PromptResult)]
    for file, found, needed in ((path, table, SCALARS), (prompts_path(path), results, ("row", *own))):
        if missing := [name for name in needed if name not in found.column_names]:
            raise RunFolderError(f"{file}: no column {', '.join(missing)}; evaluate again")
    prompts: dict[int, list[PromptResult]] = {}
    for entry in results.to_pylist():
        prompts.setdefault(entry["row"], []).append(PromptResult(**{name: entry[name] for name in own}))
    rows = []
    for i, entry in enumerate(table.to_pylist()):
        pass_at = {
            int(match[1]): (value, entry[f"{name}_stderr"])
            for name, value in entry.items()
            if (match := PASS_AT.fullmatch(name)) and value is not None
        }
        intervals = {
            figure: (low, entry[f"{figure}_high"])
            for name, low in entry.items()
            if (figure := name.removesuffix("_low")) != name and low is not None
        }
        scalars = {name: entry[name] for name in SCALARS}
        rows.append(
            EvaluationRow(**scalars, pass_at=pass_at, intervals=intervals, prompts=tuple(prompts.get(i, ())))
        )
    return rows

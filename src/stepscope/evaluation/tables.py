"""Evaluations on disk: a row per checkpoint, and a row per checkpoint and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pyarrow as pa

from stepscope.errors import MeasurementError, RunFolderError
from stepscope.evaluation.rows import PASS_AT, SCALARS, EvaluationRow, PromptResult
from stepscope.results import Rollouts, read_table, write_table
from stepscope.tasks import Task

_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}


def prompts_path(path: Path) -> Path:
    """The table of per-prompt results beside an evaluation: ``eval_prompts.parquet`` for ``eval.parquet``."""
    return path.with_name(f"{path.stem}_prompts{path.suffix}")


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


def write_responses(rollouts: Rollouts, task: Task, path: Path) -> None:
    """Write what was sampled, a row per response, so that every count can be checked and read.

    Columns: prompt_id, prompt, response, reward, correct, formatted, truncated, num_tokens, and the sums over
    the response of its log-probs (``logprob``) and position entropies (``entropy``), in nats.
    """
    write_table(
        pa.table(
            {
                "prompt_id": list(rollouts.prompt_ids),
                "prompt": list(rollouts.prompts),
                "response": list(rollouts.responses),
                "reward": rollouts.rewards,
                "correct": rollouts.correct,
                "formatted": [task.formatted(text) for text in rollouts.responses],
                "truncated": rollouts.truncated,
                "num_tokens": rollouts.num_tokens,
                "logprob": [float(v.sum()) for v in rollouts.logprobs],
                "entropy": rollouts.entropy_per_seq,
            }
        ),
        path,
    )

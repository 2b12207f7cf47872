"""The tables of the probes: rows are added probe by probe and taken back with the steps they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stepscope.policy.check.health.entropy import far_apart
from stepscope.results import read_table, write_table
from stepscope.stats import Estimate


def columns_of(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    """Six columns for every estimate: value, error, ends of its 95 % interval, verdict, reason."""
    row: dict[str, Any] = {}
    for name, estimate in figures.items():
        row |= {
            name: estimate.value,
            f"{name}_stderr": estimate.stderr,
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
            f"{name}_reliable": estimate.reliable,
            f"{name}_reason": estimate.reason,
        }
    return row


def doubt(entropy: Estimate, logged: float, *, prompts_per_step: float) -> str:
    """How the probe's entropy differs from the training's own; empty where it does not, beyond its error.

    The logged entropy is an average over ``prompts_per_step`` prompts; its error is taken to be that of as
    many of the probe's.

    Args:
        entropy: the probe's, nats per token.
        logged: what the trainer logs for the step; nan where it logs none.
        prompts_per_step: prompts behind it.
    """
    error = entropy.stderr * math.sqrt(1 + entropy.n / prompts_per_step)
    if not far_apart(entropy.value, logged, error):
        return ""
    return (
        f"the probe's entropy is {entropy.value:.3g} +- {entropy.stderr:.2g} nats per token, the trainer "
        f"logs {logged:.3g}"
    )


def tokens_path(path: Path) -> Path:
    """The table of tokens that belongs to a table of probes."""
    return path.with_name(f"{path.stem}_tokens.parquet")


def append(path: Path, columns: dict[str, list[Any]]) -> None:
    """Add rows to a table; it is replaced as a whole."""
    rows = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(
        pa.concat_tables([read_table(path), rows], promote_options="default") if path.exists() else rows, path
    )


def forget(path: Path, step: int) -> None:
    """Drop rows of steps that will be taken again."""
    if not path.exists():
        return
    table = read_table(path)
    kept = table.filter(pc.less_equal(table["step"], step))
    if kept.num_rows < table.num_rows:
        write_table(kept, path)

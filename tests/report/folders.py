"""Folders for tests of the page: real artifacts, with values put into their records where tests need them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stepscope import runs
from stepscope.results import Record
from stepscope.stats import Estimate

HOSTILE = "<script>document.title='owned'</script>"
STEPS = [0, 10, 20, 30, 40]


def estimate(value: float, stderr: float, unit: str = "nats/token", n: int = 64) -> Estimate:
    return Estimate(value, stderr, n, unit, "given")


def changed(path: Path, kind: type[Record], **changes: Any) -> None:
    """Put values into a record's file."""
    path.write_text(replace(runs.read_record(kind, path), **changes).to_json())


def recolumned(path: Path, **columns: Callable[[list[Any]], list[Any]]) -> None:
    """Put other values into columns of a table."""
    table = pq.read_table(path)
    for name, change in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(change(table[name].to_pylist()), table[name].type))
    pq.write_table(table, path)


def hostile(folder: Path) -> Path:
    """Text of the run that would be markup, a right and a wrong response, and no digests."""
    recolumned(
        folder / "update.parquet",
        response=lambda old: [HOSTILE, *old[1:]],
        correct=lambda old: [True, False, *old[2:]],
    )
    recolumned(folder / "update_tokens.parquet", token=lambda old: [HOSTILE] * 2 + old[2:])
    provenance = json.loads((folder / "provenance.json").read_text())
    for stage in provenance["stages"].values():
        stage["sha256"] = {}
    (folder / "provenance.json").write_text(json.dumps({**provenance, "sealed": {}}))
    return folder


def write_log(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The trainer's file of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))


def make_run(folder: Path, measurement: Path) -> Path:
    rng = np.random.default_rng(7)
    history = [
        {"step": step, "reward": 0.55 + 0.01 * rng.standard_normal(), "entropy": 0.4, "loss": 0.0}
        for step in range(1, 41)
    ]
    for step in STEPS:
        write_log(folder / f"checkpoints/step-{step}", [row for row in history if row["step"] <= step])
    figures = {
        "pass_at_1": [0.52, 0.66, 0.74, 0.78, 0.81],
        "pass_at_8": [0.88, 0.90, 0.91, 0.91, 0.90],
        "format_rate": [0.93, 0.97, 0.98, 0.99, 0.99],
        "entropy_per_token": [0.43, 0.30, 0.21, 0.15, 0.12],
    }
    errors = {f"{name}_stderr": [0.021] * len(STEPS) for name in figures}
    sizes = {"num_prompts": [256] * len(STEPS), "samples_per_prompt": [8] * len(STEPS)}
    columns = {"step": STEPS, "checkpoint": [f"step-{step}" for step in STEPS], **figures, **errors, **sizes}
    runs.write_table(folder / "eval.parquet", columns)
    for step in (10, 40):
        shutil.copytree(measurement, folder / f"measure/step-{step}")
    return folder


def many(folder: Path, tokens: int) -> Path:
    """A measurement's batch as often over as makes so many tokens, each with an influence of its own."""
    kept = {"summary.json", "change.json", "step.json", "config.yaml", "provenance.json", "update.parquet"}
    kept |= {"update_tokens.parquet", "influence_tokens.parquet"}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    sequences = pq.read_table(folder / "update.parquet")
    times = -(-tokens // pq.read_table(folder / "update_tokens.parquet").num_rows)
    rng = np.random.default_rng(3)
    for name in ("update.parquet", "update_tokens.parquet", "influence_tokens.parquet"):
        table = pq.read_table(folder / name)
        at = table.column_names.index("sequence_id")
        ids = table.column("sequence_id").to_numpy()
        copies = [
            table.set_column(at, "sequence_id", pa.array(ids + k * sequences.num_rows)) for k in range(times)
        ]
        found = pa.concat_tables(copies)
        if name.startswith("influence"):
            at = found.column_names.index("influence")
            spread = found.column("influence").to_numpy() * rng.lognormal(size=found.num_rows)
            found = found.set_column(at, "influence", pa.array(spread))
        pq.write_table(found.replace_schema_metadata(table.schema.metadata), folder / name)
    return folder

"""The tables of the probes: rows are added probe by probe and taken back with the steps they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stepscope.results import read_table, write_table


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

"""Changes to files that a reader does not expect, drawn by hypothesis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from stepscope import cli

ODD: list[Any] = [
    None, True, -1, 0, 3, 0.5, 10**6, 10**12, -(10**30), 2**63, 1e308, float("nan"), float("inf"),
    "", "x", "\ud800", "9" * 5000, [], {}, [1], [[[[1]]]], {"a": 1},
]  # fmt: skip
FILES: list[bytes] = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"x" * 100,
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"9" * 5000,
]


class Runs:
    """What opens a file for writing when it is unpickled by force."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.witness)!r}, 'w')",)


def few(examples: int) -> settings:
    """The same examples on every machine, without a clock."""
    return settings(
        derandomize=True,
        database=None,
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def ends_well(*args: object) -> tuple[int, str]:
    """Exit code and error output of a command that is done (0) or ends with one error line (2)."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code in (0, 2), (args, result.output, result.exc_info)
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == (1 if result.exit_code == 2 else 0), result.stderr
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in inner:
        yield (*path, key)
        yield from _places(value, (*path, key))


def change(content: Any, draw: Any, values: list[Any]) -> None:
    """Replace, rename or remove one value of nested data."""
    places = list(_places(content))
    if not places:
        return
    *above, last = draw(st.sampled_from(places))
    for key in above:
        content = content[key]
    kind = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
    if kind == "remove":
        del content[last]
    elif kind == "rename" and isinstance(content, dict):
        content[f"odd_{last}"] = content.pop(last)
    else:
        content[last] = draw(st.sampled_from(values))


def _change_bytes(file: Path, draw: Any) -> None:
    content = bytearray(file.read_bytes())
    place = draw(st.integers(0, max(0, len(content) - 1)))
    kind = draw(st.sampled_from(["flip", "cut", "other"]))
    if kind == "other" or not content:
        content = bytearray(draw(st.sampled_from(FILES)))
    elif kind == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(content)


def _change_table(file: Path, draw: Any) -> None:
    table = pq.read_table(file)
    name = draw(st.sampled_from(table.column_names))
    kind = draw(st.sampled_from(["remove", "rename", "replace", "shorten"]))
    if kind == "remove":
        table = table.drop_columns([name])
    elif kind == "rename":
        table = table.rename_columns([f"odd_{c}" if c == name else c for c in table.column_names])
    elif kind == "shorten":
        table = table.slice(0, draw(st.sampled_from([0, 1])))
    else:
        value = draw(st.sampled_from([None, "x", -1, float("nan"), 10**12, True, [1]]))
        table = table.set_column(table.column_names.index(name), name, pa.array([value] * len(table)))
    pq.write_table(table, file)


def damage(file: Path, draw: Any) -> None:
    """Change one file: by its content where its format is known, or its bytes."""
    by_content = draw(st.sampled_from([True, True, True, False]))
    if by_content and file.suffix == ".json":
        content = json.loads(file.read_text())
        change(content, draw, ODD)
        file.write_text(json.dumps(content))
    elif by_content and file.suffix == ".parquet":
        _change_table(file, draw)
    elif by_content and file.name == "optimizer.pt":
        content = torch.load(file, weights_only=True)
        tensors = [
            torch.zeros(0),
            torch.zeros(3),
            torch.tensor(float("nan")),
            torch.zeros(2, dtype=torch.long),
        ]
        change(content, draw, [*ODD, *tensors])
        torch.save(content, file)
    else:
        _change_bytes(file, draw)

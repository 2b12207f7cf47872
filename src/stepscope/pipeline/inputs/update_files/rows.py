"""The rows that a dump holds of one optimizer step, as plain values.

| file | of |
|---|---|
| ``completions/completions_00012.parquet`` | TRL, ``log_completions=True`` |
| ``12.jsonl`` | verl, ``trainer.rollout_data_dir`` |
| ``rollouts.bin`` | prime-rl, ``rollouts/step_N`` |
| ``data_12.pt`` | slime, ``--save-debug-rollout-data`` |
| any ``.parquet``, ``.jsonl`` | a table with token ids or text |

Both TRL and verl number a batch by the optimizer step that it makes: the checkpoint of step N takes the batch
of step N + 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from stepscope.errors import BatchError
from stepscope.policy.checkpoint.foreign import reads_foreign, refuse_packed

STEP = ("step", "global_step", "training_step")
"""Columns that may say which optimizer step a row belongs to."""

MAX_LINE_BYTES = 1 << 26
"""Longer lines are refused."""

_TRL = frozenset({"step", "prompt", "completion", "advantage"})
_VERL = frozenset({"input", "output", "score"})

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Dump:
    """What a file holds of one step.

    Attributes:
        path: of the file.
        kind: ``trl``, ``verl``, ``slime``, ``prime-rl`` or ``table``.
        step: the optimizer step that the rows say they made, None where they do not.
        rows: names and values, one mapping per response.
    """

    path: Path
    kind: str
    step: int | None
    rows: tuple[Row, ...]


def read_dump(source: Path, *, next_step: int, chosen: int | None) -> Dump:
    """The rows of the step that comes next, or of the one chosen.

    Args:
        source: a file, or a folder in which TRL or verl has one for each step.
        next_step: the optimizer step that the checkpoint takes next.
        chosen: another step, where one is wanted.

    Raises:
        BatchError: there is no such file or it cannot be read, or it holds no rows of that step.
    """
    wanted = next_step if chosen is None else chosen
    path = _file_of(source, wanted) if source.is_dir() else source
    if not path.is_file():
        raise BatchError(f"{path}: no such file; give the dump of a training (docs/FORMATS.md, Batches)")
    if path.suffix not in _READERS:
        raise BatchError(
            f"{path}: no dump that is known by its ending; give one of {', '.join(sorted(_READERS))}"
        )
    rows, names, steps = _READERS[path.suffix](path, wanted)
    if not sum(steps.values()):
        raise BatchError(f"{path}: holds no rows; give another file")
    if not rows:
        known = sorted(steps)
        listed = ", ".join(map(str, known[:8])) + (" ..." if len(known) > 8 else "")
        which = "the next one" if chosen is None else "which was asked for"
        raise BatchError(
            f"{path}: no rows of step {wanted}, {which}; it has {'step' if len(known) == 1 else 'steps'} "
            f"{listed}; give the checkpoint of the step before, or update.step={known[0]} if you know that "
            "this batch made the step"
        )
    kind = _KINDS.get(path.suffix, "trl" if names >= _TRL else "verl" if names >= _VERL else "table")
    return Dump(path, kind, None if None in steps else wanted, tuple(rows))


def is_own(path: Path) -> bool:
    """Whether a file is a batch that ``measure`` wrote, with its tokens beside it."""
    if path.suffix != ".parquet" or not path.with_name(f"{path.stem}_tokens.parquet").is_file():
        return False
    try:
        return b"stepscope.temperature" in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return True  # the reader of such batches says what is wrong with it


def _file_of(folder: Path, step: int) -> Path:
    """The file of a step, where TRL or verl put it."""
    places = (
        folder / f"completions_{step:05d}.parquet",
        folder / "completions" / f"completions_{step:05d}.parquet",
        folder / f"{step}.jsonl",
    )
    for place in places:
        if place.is_file():
            return place
    raise BatchError(
        f"{folder}: no file of step {step}; expected {places[0].name} (TRL) or {places[2].name} (verl); give "
        "the file itself, or update.step=N for another step"
    )


Found = tuple[list[Row], frozenset[str], Counter[Any]]
"""Rows of the step wanted (all where none is named), names of the columns, rows of each step."""


def _parquet(path: Path, wanted: int) -> Found:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise BatchError(
            f"{path}: cannot be read as parquet ({str(error).splitlines()[0][:120]}); copy it again"
        ) from error
    names = frozenset(table.column_names)
    column = next((name for name in STEP if name in names), None)
    if column is None:
        return table.to_pylist(), names, Counter({None: table.num_rows})
    steps = table.column(column)
    if not pa.types.is_integer(steps.type) or steps.null_count:
        raise BatchError(f"{path}: column {column} is {steps.type} with nulls or no integers; mend it")
    own = table.filter(pc.equal(steps, wanted))
    return own.to_pylist(), names, Counter(steps.to_pylist())


def _jsonl(path: Path, wanted: int) -> Found:
    rows: list[Row] = []
    names: set[str] = set()
    steps: Counter[Any] = Counter()
    for row in _lines(path):
        names |= row.keys()
        step = next((row[name] for name in STEP if name in row), None)
        if step is not None and type(step) is not int:
            raise BatchError(f"{path}: a row is of step {step!r}, expected an integer; mend it")
        steps[step] += 1
        if step in (None, wanted):
            rows.append(row)
    if len({step is None for step in steps}) > 1:
        raise BatchError(f"{path}: some rows name a step and others do not; mend it")
    return rows, frozenset(names), steps


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_LINE_BYTES else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise BatchError(f"{path}, line {number}: expected a JSON object; copy the file again")
            yield row


def _slime(path: Path, _: int) -> Found:
    held = _torch_load(path)
    samples = held.get("samples") if isinstance(held, dict) else None
    if not isinstance(samples, list) or not all(isinstance(s, dict) and "tokens" in s for s in samples):
        raise BatchError(f"{path}: no list of samples with tokens, as slime saves it; give another file")
    return list(samples), frozenset(samples[0] if samples else ()), Counter({None: len(samples)})


@reads_foreign
def _torch_load(path: Path) -> Any:
    refuse_packed(path)
    return torch.load(path, map_location="cpu", weights_only=True)


_SAMPLE = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logprobs")
"""First fields of prime-rl's ``TrainingSample``, an array in the file; its loss divides by the last."""


def _prime(path: Path, _: int) -> Found:
    try:
        import msgspec
    except ImportError as error:
        raise BatchError(
            f"{path}: prime-rl's rollouts are msgpack, which needs msgspec; pip install stepscope[prime-rl]"
        ) from error
    try:
        batch = msgspec.msgpack.decode(path.read_bytes())
    except (msgspec.DecodeError, RecursionError) as error:
        raise BatchError(f"{path}: cannot be read as msgpack ({error}); copy it again") from error
    samples = batch[0] if isinstance(batch, list) and batch else None
    if not isinstance(samples, list):
        raise BatchError(f"{path}: no batch of training samples, as prime-rl writes it; give another file")
    rows: list[Row] = []
    for i, sample in enumerate(samples):
        further = sample[len(_SAMPLE) :] if isinstance(sample, list) else []
        temperatures = further.pop(0) if further and isinstance(further[0], list) else None
        if not isinstance(sample, list) or len(sample) < len(_SAMPLE) or any(sample[1] or ()):
            raise BatchError(
                f"{path}: sample {i} is not laid out as prime-rl's training samples are known (prompt_ids, "
                "prompt_mask without a token in the loss, completion_ids, completion_mask, "
                "completion_logprobs, advantage); give a table with these columns"
            )
        row = dict(zip(_SAMPLE, sample, strict=False)) | {"temperatures": temperatures}
        if further and isinstance(further[0], int | float):
            row["advantage"] = further[0]
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows, frozenset(_SAMPLE), Counter({None: len(rows)})


_READERS: dict[str, Callable[[Path, int], Found]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".pt": _slime,
    ".bin": _prime,
}
_KINDS = {".pt": "slime", ".bin": "prime-rl"}

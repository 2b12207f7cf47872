"""Questions from the user's own file, and the reader of JSON lines that GSM8K shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.equality import equal
from stepscope.tasks.problem import SPLITS, Problem, Worked, require_split


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a JSON-lines file with the number of their line, counted from 0; empty lines are passed over.

    Raises:
        TaskError: the file cannot be read, a line is no JSON object, or one of ``fields`` is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{path} line {number + 1}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path} line {number + 1}: expected a JSON object, got {type(row).__name__}")
        missing = [f for f in fields if f not in row]
        if missing:
            raise TaskError(
                f"{path} line {number + 1}: no field {missing[0]!r} among {sorted(row)}; each row needs "
                f"{', '.join(fields)}"
            )
        yield number, row


@dataclass(frozen=True)
class JsonLines:
    """Rows with ``prompt`` and ``answer``; source of the tasks ``jsonl:FILE``.

    An optional ``solution`` is the thought of the demonstration. The split is that of the file in a folder
    with ``train.jsonl`` and ``test.jsonl``, else the row's own ``split``, else decided by a hash of the
    prompt (about one in eight is a test problem). A prompt's id holds the number of its line.
    """

    rows: dict[str, tuple[Problem, ...]]

    @classmethod
    def from_path(cls, path: Path) -> JsonLines:
        """Read a file, or a folder with ``train.jsonl`` and ``test.jsonl``.

        Raises:
            TaskError: nothing there, a row is damaged, or there is no problem at all.
        """
        rows: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        if path.is_dir():
            files = {split: path / f"{split}.jsonl" for split in SPLITS}
            for split, file in files.items():
                for number, row in read_rows(file, ("prompt", "answer")):
                    rows[split].append(_problem(path.name, split, number, row, file))
        elif path.is_file():
            for number, row in read_rows(path, ("prompt", "answer")):
                split = _split(row, path, number)
                rows[split].append(_problem(path.stem, split, number, row, path))
        else:
            raise TaskError(
                f"task 'jsonl:{path}': no such file or folder; give a .jsonl file with prompt and answer"
            )
        if not any(rows.values()):
            raise TaskError(f"task 'jsonl:{path}': the file holds no problems")
        return cls({split: tuple(found) for split, found in rows.items()})

    def problems(self, split: str) -> Sequence[Problem]:
        """The rows of a split in the order of the file."""
        require_split(split)
        return self.rows[split]

    def grade(self, problem: Problem, answer: str) -> float:
        """1 where the answer is verified equal to the reference."""
        return float(equal(problem.answer, answer))

    def worked(self, problem: Problem) -> Worked:
        """The row's ``solution`` (an empty thought where it has none) and its answer."""
        return Worked(str(problem.metadata.get("solution", "")), problem.answer)


def _problem(name: str, split: str, number: int, row: dict[str, Any], path: Path) -> Problem:
    prompt, answer = row["prompt"], row["answer"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f"{path} line {number + 1}: prompt must be a text that is not empty, got {prompt!r}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise TaskError(f"{path} line {number + 1}: answer must be a text or a number, got {answer!r}")
    metadata = {"solution": row["solution"]} if "solution" in row else {}
    return Problem(f"jsonl:{name}/{split}/{number}", prompt, str(answer).strip(), metadata)


def _split(row: dict[str, Any], path: Path, number: int) -> str:
    if "split" not in row:
        digest = (
            hashlib.blake2b(row["prompt"].encode(), digest_size=1) if isinstance(row["prompt"], str) else None
        )
        return "test" if digest is not None and digest.digest()[0] < 32 else "train"
    split = row["split"]
    if split not in SPLITS:
        raise TaskError(f"{path} line {number + 1}: split must be train or test, got {split!r}")
    return str(split)

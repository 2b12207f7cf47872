"""The prompts of a run: a file as TRL's trainers take it, each row a whole prompt and its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepscope.errors import TaskError
from stepscope.results import same_text
from stepscope.runs import sha256
from stepscope.tasks.equality import equal
from stepscope.tasks.problem import SPLITS, Problem, Worked, require_split
from stepscope.tasks.sources.rows import MAX_FILE_BYTES, Number, Row, kind_of, read_rows, row_has, shown

FIELD = "prompt"
RESERVED = ("prompts", "completions", "completion_ids")
"""Columns that no reward function could be called with: it is given these names by TRL itself."""

LINES, PARQUET, CSV = (".jsonl", ".json", ".ndjson"), (".parquet", ".pq"), (".csv",)


@dataclass(frozen=True)
class OwnPrompts:
    """Rows with ``prompt``, a text or a chat's list of messages, and any other columns.

    A column ``split`` says of every row whether it is ``train`` or ``test``. Without it all rows are in both
    splits: then nothing is held out, and a probe batch takes prompts that the update batch has left. An
    ``answer`` is what answers are held against where no function of the user's grades.

    Attributes:
        path: the file.
        rows: split to its problems; metadata ``columns`` (what a reward function gets), ``where``, and
            ``messages`` where prompts are chats.
    """

    path: Path
    rows: Mapping[str, tuple[Problem, ...]]

    @classmethod
    def from_path(cls, path: Path) -> OwnPrompts:
        """Read a file of JSON lines, parquet or CSV.

        Raises:
            TaskError: there is no such file, it is of another kind, or a row holds no prompt; or prompts are
                texts in some rows and messages in others.
        """
        read = list(_rows(path))
        if not read:
            raise TaskError(f"prompts {path}: the file holds no rows")
        names = dict.fromkeys(name for _, row in read for name in row.fields)
        if odd := [name for name in RESERVED if name in names]:
            raise TaskError(
                f"prompts {path}: a column is called {odd[0]}, which reward functions get from the trainer "
                "itself; rename it"
            )
        chats = isinstance(read[0][1].fields[FIELD], list)
        problems = [_problem(path.stem, number, row, names, chats=chats) for number, row in read]
        if "split" not in names:
            return cls(path, dict.fromkeys(SPLITS, tuple(problems)))
        found: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        for problem, (_, row) in zip(problems, read, strict=True):
            split = row.fields.get("split")
            if split not in SPLITS:
                raise row.refuse(
                    f"split must be train or test, got {shown(split)}; rename the column if it means "
                    "something else"
                )
            found[split].append(problem)
        return cls(path, {split: tuple(rows) for split, rows in found.items()})

    @property
    def in_messages(self) -> bool:
        """Whether prompts are chats."""
        return any("messages" in problem.metadata for rows in self.rows.values() for problem in rows[:1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256(self.path)

    @cached_property
    def shared(self) -> frozenset[str]:
        """Prompts of both splits where the file has splits."""
        if self.rows["train"] is self.rows["test"]:
            return frozenset()
        train, test = ({same_text(p.question) for p in self.rows[split]} for split in SPLITS)
        return frozenset(train & test)

    @property
    def without_answer(self) -> Problem | None:
        """The first row that has no answer to be graded by."""
        return next((p for split in SPLITS for p in self.rows[split] if not p.answer), None)

    def problems(self, split: str) -> Sequence[Problem]:
        """The rows of a split in the order of the file, copies included."""
        require_split(split)
        return self.rows[split]

    def grade(self, problem: Problem, answer: str) -> float:
        """1 where the answer is verified equal to that of the row."""
        return float(equal(problem.answer, answer))

    def worked(self, problem: Problem) -> Worked:
        """None: a file of prompts has no worked solutions.

        Raises:
            TaskError: always.
        """
        raise TaskError(f"{problem.metadata['where']}: prompts of a file have no worked solution")


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their number; each has a prompt."""
    if kind_of(path) != "file":
        raise TaskError(
            f"prompts {path}: no such file; give JSON lines, parquet or CSV with a column {FIELD}"
        )
    ending = path.suffix.lower()
    if ending in LINES:
        for number, row in read_rows(path, (FIELD,)):
            yield number, Row(row.where, {name: _plain(value) for name, value in row.fields.items()})
        return
    if ending not in PARQUET + CSV:
        raise TaskError(
            f"prompts {path}: the name ends in {ending or 'nothing'}, expected one of "
            f"{', '.join(LINES + PARQUET + CSV)}; write the prompts as one of these"
        )
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise TaskError(f"prompts {path}: {size} bytes, expected at most {MAX_FILE_BYTES}; take a part of it")
    for number, fields in enumerate(_parquet(path) if ending in PARQUET else _csv(path)):
        row = Row(f"{path} row {number + 1}", fields)
        row_has(row, (FIELD,))
        yield number, row


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: list[dict[str, Any]] = pq.read_table(path, memory_map=False).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise TaskError(
            f"prompts {path}: cannot be read as parquet ({str(error).splitlines()[0][:160]}); write it again"
        ) from error
    return found


def _csv(path: Path) -> list[dict[str, Any]]:
    """As the library ``datasets`` reads it, by pandas: numbers are numbers, what is empty is None."""
    import pandas as pd
    import pyarrow as pa

    try:
        frame = pd.read_csv(path, dtype={FIELD: str}, encoding="utf-8")
    except (OSError, ValueError) as error:  # a ParserError is a ValueError
        raise TaskError(
            f"prompts {path}: cannot be read as CSV ({' '.join(str(error).split())[:160]}); mend it"
        ) from error
    found: list[dict[str, Any]] = pa.Table.from_pandas(frame, preserve_index=False).to_pylist()
    return found


def _problem(stem: str, number: int, row: Row, names: Mapping[str, None], *, chats: bool) -> Problem:
    prompt = row.fields[FIELD]
    if isinstance(prompt, list) is not chats:
        raise row.refuse(
            f"{FIELD} is {shown(prompt)}, and in the first row it is {'messages' if chats else 'a text'}; "
            "give all as texts, or all as messages"
        )
    columns = {name: row.fields.get(name) for name in names if name != FIELD}
    metadata: dict[str, Any] = {"where": row.where, "columns": columns}
    if chats:
        metadata["messages"] = messages = _messages(row, prompt)
        question = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
        if [m["role"] for m in messages] == ["user"]:
            question = messages[0]["content"]
    else:
        question = row.text(FIELD)
        if question.lstrip().startswith("[{") and "'role'" in question.replace('"', "'"):
            raise row.refuse(
                f"{FIELD} is messages written out as a text ({shown(question)}); write them as a list, as "
                "JSON lines and parquet can hold it"
            )
    return Problem(f"prompts:{stem}/{number}", question, _answer(columns.get("answer")), metadata)


def _messages(row: Row, found: list[Any]) -> list[dict[str, Any]]:
    """Messages of text, without what a table fills in."""
    messages = [
        {k: v for k, v in m.items() if v is not None} if isinstance(m, Mapping) else {} for m in found
    ]
    fit = [isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages]
    if not messages or not all(fit):
        place = fit.index(False) if messages else 0
        odd = found[place] if messages else found
        raise row.refuse(
            f"message {place + 1} of the {FIELD} is {ascii(odd)[:80]}, expected a role and a content of "
            "text; images and other parts cannot be asked"
        )
    return messages


def _answer(found: Any) -> str:
    """A column as a reference answer; empty where it is none."""
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        return ""
    return str(found).strip()


def _plain(value: Any) -> Any:
    """JSON as Python has it: numbers that were kept as text become numbers."""
    if isinstance(value, Number):
        return int(value) if value.lstrip("-").isdigit() and len(value) < 4000 else float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value

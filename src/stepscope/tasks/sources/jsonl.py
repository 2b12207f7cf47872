"""Questions from the user's own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stepscope.errors import TaskError
from stepscope.results import same_text
from stepscope.tasks.equality import equal
from stepscope.tasks.problem import SPLITS, Problem
from stepscope.tasks.sources.rows import Row, kind_of, read_rows, shown
from stepscope.tasks.sources.stored import Stored

_FIELDS = ("prompt", "answer")


@dataclass(frozen=True)
class JsonLines(Stored):
    """Rows with ``prompt`` and ``answer``; source of the tasks ``jsonl:FILE``.

    An optional ``solution`` is the thought of the demonstration, or a whole response with its tags. The split
    is that of the file in a folder with ``train.jsonl`` and ``test.jsonl``, else the row's own ``split``,
    else decided by a hash of the prompt (about one in eight is a test problem). A prompt's id holds the
    number of its line.
    """

    @classmethod
    def from_path(cls, path: Path) -> JsonLines:
        """Read a file, or a folder with ``train.jsonl`` and ``test.jsonl``.

        Raises:
            TaskError: nothing there, a row is damaged, two rows contradict each other, or there is no problem
                at all.
        """
        rows: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        kind = kind_of(path)
        if kind == "folder":
            for split in SPLITS:
                for number, row in read_rows(path / f"{split}.jsonl", _FIELDS):
                    rows[split].append(_problem(path.name, split, number, row))
        elif kind == "file":
            for number, row in read_rows(path, _FIELDS):
                split = _split(row)
                rows[split].append(_problem(path.stem, split, number, row))
        else:
            raise TaskError(
                f"task 'jsonl:{path}': no such file or folder; give a .jsonl file with prompt and answer"
            )
        if not any(rows.values()):
            raise TaskError(f"task 'jsonl:{path}': the file holds no problems")
        found = cls({split: tuple(problems) for split, problems in rows.items()})
        found.refuse_contradictions()
        return found

    def grade(self, problem: Problem, answer: str) -> float:
        """1 where the answer is verified equal to the reference."""
        return float(equal(problem.answer, answer))


def _problem(name: str, split: str, number: int, row: Row) -> Problem:
    thought, answer = row.parted("solution", row.optional_text("solution") or "")
    metadata = {"where": row.where, "solution": thought} | ({} if answer is None else {"shown": answer})
    return Problem(f"jsonl:{name}/{split}/{number}", row.text("prompt"), row.answer("answer"), metadata)


def _split(row: Row) -> str:
    if "split" not in row.fields:
        digest = hashlib.blake2b(same_text(row.text("prompt")).encode(), digest_size=1)
        return "test" if digest.digest()[0] < 32 else "train"
    split = row.fields["split"]
    if split not in SPLITS:
        raise row.refuse(f"split must be train or test, got {shown(split)}")
    return str(split)

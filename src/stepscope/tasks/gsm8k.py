"""GSM8K, grade-school mathematics in words (Cobbe et al. 2021), from a folder or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.equality import equal
from stepscope.tasks.jsonl import read_rows
from stepscope.tasks.problem import SPLITS, Problem, Worked, require_split

HUB_ID = "openai/gsm8k"
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Gsm8k:
    """Source of the tasks ``gsm8k`` and ``gsm8k:DIR``; the ids are the same for both, numbered by row."""

    rows: dict[str, tuple[Problem, ...]]

    @classmethod
    def from_folder(cls, folder: Path) -> Gsm8k:
        """Read ``train.jsonl`` and ``test.jsonl`` with the fields question and answer.

        Raises:
            TaskError: a file is missing or damaged.
        """
        missing = [s for s in SPLITS if not (folder / f"{s}.jsonl").is_file()]
        if missing:
            raise TaskError(
                f"task 'gsm8k:{folder}': no file {folder / missing[0]}.jsonl; give a folder with train.jsonl "
                "and test.jsonl, or `gsm8k` for the hub"
            )
        return cls(
            {
                split: _problems(split, read_rows(folder / f"{split}.jsonl", ("question", "answer")))
                for split in SPLITS
            }
        )

    @classmethod
    def from_hub(cls) -> Gsm8k:
        """Read ``openai/gsm8k`` through `datasets`.

        Raises:
            TaskError: it is not in the cache and cannot be fetched.
        """
        import datasets

        try:
            data = datasets.load_dataset(HUB_ID, "main")
        except (OSError, ValueError) as error:
            raise TaskError(
                f"task 'gsm8k': cannot load {HUB_ID} from the hub ({type(error).__name__}); without a "
                "network give gsm8k:DIR with train.jsonl and test.jsonl"
            ) from error
        return cls({split: _problems(split, enumerate(data[split])) for split in SPLITS})

    def problems(self, split: str) -> Sequence[Problem]:
        """The rows of a split in the order of the published files."""
        require_split(split)
        return self.rows[split]

    def grade(self, problem: Problem, answer: str) -> float:
        """1 where the answer is verified equal to the number after ``####``."""
        return float(equal(problem.answer, answer))

    def worked(self, problem: Problem) -> Worked:
        """The published solution without its calculator annotations ``<<...>>``."""
        return Worked(str(problem.metadata["solution"]), problem.answer)


def _problems(split: str, rows: Iterator[tuple[int, dict[str, Any]]]) -> tuple[Problem, ...]:
    found = []
    for number, row in rows:
        solution, mark, answer = str(row["answer"]).rpartition("####")
        if not mark or not answer.strip():
            raise TaskError(f"gsm8k {split} row {number}: no answer after ####")
        thought = _ANNOTATION.sub("", solution).strip()
        gold = answer.strip().replace(",", "")
        found.append(Problem(f"gsm8k/{split}/{number}", str(row["question"]), gold, {"solution": thought}))
    return tuple(found)

"""GSM8K, grade-school mathematics in words (Cobbe et al. 2021), from a folder or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.equality import equal
from stepscope.tasks.problem import SPLITS, Problem
from stepscope.tasks.sources.rows import Row, kind_of, read_rows, row_has, shown
from stepscope.tasks.sources.stored import Stored

HUB_ID = "openai/gsm8k"
_FIELDS = ("question", "answer")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)


@dataclass(frozen=True)
class Gsm8k(Stored):
    """Source of the tasks ``gsm8k`` and ``gsm8k:DIR``; the ids are the same for both, numbered by row."""

    @classmethod
    def from_folder(cls, folder: Path) -> Gsm8k:
        """Read ``train.jsonl`` and ``test.jsonl`` with the fields question and answer.

        Raises:
            TaskError: a file is missing or damaged.
        """
        missing = [s for s in SPLITS if kind_of(folder / f"{s}.jsonl") != "file"]
        if missing:
            raise TaskError(
                f"task 'gsm8k:{folder}': no file {folder / missing[0]}.jsonl; give a folder with train.jsonl "
                "and test.jsonl, or `gsm8k` for the hub"
            )
        return cls._from_rows({split: read_rows(folder / f"{split}.jsonl", _FIELDS) for split in SPLITS})

    @classmethod
    def from_hub(cls) -> Gsm8k:
        """Read ``openai/gsm8k`` through `datasets`.

        Raises:
            TaskError: it is not in the cache and cannot be fetched, or a row is damaged.
        """
        import datasets

        try:
            data = datasets.load_dataset(HUB_ID, "main")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise TaskError(
                f"task 'gsm8k': cannot load {HUB_ID} from the hub ({type(error).__name__}); without a "
                "network give gsm8k:DIR with train.jsonl and test.jsonl"
            ) from error
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Gsm8k:
        """Rows of a data set with both splits.

        Raises:
            TaskError: a split is missing or a row is damaged.
        """
        missing = [split for split in SPLITS if split not in data]
        if missing:
            raise TaskError(
                f"{HUB_ID}: no {missing[0]} split; give gsm8k:DIR with train.jsonl and test.jsonl"
            )
        return cls._from_rows(
            {
                split: ((n, Row(f"{HUB_ID} {split} row {n}", row)) for n, row in enumerate(data[split]))
                for split in SPLITS
            }
        )

    @classmethod
    def _from_rows(cls, rows: dict[str, Iterable[tuple[int, Row]]]) -> Gsm8k:
        found = cls({s: tuple(_problem(s, number, row) for number, row in rows[s]) for s in SPLITS})
        found.refuse_contradictions()
        return found

    def grade(self, problem: Problem, answer: str) -> float:
        """1 where the answer is verified equal to the number after ``####``."""
        return float(equal(problem.answer, answer))


def _problem(split: str, number: int, row: Row) -> Problem:
    """A row; its solution is the published one without the calculator annotations ``<<...>>``."""
    row_has(row, _FIELDS)
    solution, mark, answer = row.text("answer").rpartition("####")
    gold = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), answer.strip())
    if not mark or not gold:
        raise row.refuse("no answer after ####")
    if not any(character.isdigit() for character in gold):
        raise row.refuse(f"the answer after #### must be a number, got {shown(gold)}")
    thought, response = row.parted("answer", _ANNOTATION.sub("", solution).strip())
    if response is not None:
        raise row.refuse("answer has an <answer> block and a number after ####; give the bare solution")
    return Problem(
        f"gsm8k/{split}/{number}", row.text("question"), gold, {"where": row.where, "solution": thought}
    )

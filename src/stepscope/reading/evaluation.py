"""An evaluation read back: what ``stepscope eval`` left beside its table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from stepscope import runs
from stepscope.results import read_table
from stepscope.results.brief import Brief
from stepscope.results.entropy_law import EntropyLaw
from stepscope.results.evaluation import (
    EvaluationChange,
    EvaluationChanges,
    EvaluationRow,
    companion,
    law_path,
    prompts_path,
    read_eval,
)
from stepscope.results.views import Plotted

if TYPE_CHECKING:
    import pandas as pd

TABLE = "eval.parquet"


@dataclass(frozen=True, repr=False)
class Evaluation(Plotted, Brief):
    """The evaluations of one or several checkpoints, read when first asked for.

    Attributes:
        table: file with a row per checkpoint.
    """

    table: Path

    @cached_property
    def rows(self) -> tuple[EvaluationRow, ...]:
        """One per checkpoint, in order of step."""
        return _rows(self.table)

    @cached_property
    def profiles(self) -> tuple[EvaluationRow, ...]:
        """One per checkpoint and other way of sampling; empty where none was asked for."""
        path = companion(self.table, "profiles.parquet")
        return _rows(path) if path.is_file() else ()

    @cached_property
    def changes(self) -> tuple[EvaluationChange, ...]:
        """How neighbouring checkpoints differ, then the first and the last."""
        path = companion(self.table, "changes.json")
        return runs.read_record(EvaluationChanges, path).changes if path.is_file() else ()

    @cached_property
    def law(self) -> EntropyLaw | None:
        """The entropy law over the checkpoints; None with too few."""
        path = law_path(self.table)
        return runs.read_record(EntropyLaw, path) if path.is_file() else None

    def to_pandas(self) -> pd.DataFrame:
        """The table as a data frame: a row per checkpoint."""
        return read_table(runs.verified(self.table)).to_pandas()


def _rows(table: Path) -> tuple[EvaluationRow, ...]:
    runs.verified(prompts_path(table))
    return tuple(read_eval(runs.verified(table)))


def load_evaluation(path: Path | str) -> Evaluation:
    """Read back what ``stepscope eval`` left.

    Args:
        path: the table, or a run folder with ``eval.parquet``.

    Raises:
        RunFolderError: there is no such table, or it is damaged.
    """
    given = Path(path)
    found = Evaluation(given / TABLE if given.is_dir() else given)
    assert found.rows
    return found

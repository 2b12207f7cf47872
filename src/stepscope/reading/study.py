"""A study read back: what ``stepscope study`` left in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.folder import Folder
from stepscope.reading.measurement import Measurement
from stepscope.results.study import StudyReport, StudyRows
from stepscope.results.views import Plotted

if TYPE_CHECKING:
    import pandas as pd

REPORT, TABLE = "study.json", "study.parquet"


@dataclass(frozen=True)
class Study(Plotted, Folder):
    """The artifacts of a study, each read when it is first asked for; see :class:`Folder`.

    Attributes:
        path: the folder.
    """

    path: Path

    @cached_property
    def report(self) -> StudyReport:
        """What the repeats say together."""
        return runs.read_record(StudyReport, self.path / REPORT)

    @cached_property
    def rows(self) -> StudyRows:
        """A row per cell, series and learning rate."""
        return runs.read_record(StudyRows, self.path / TABLE)

    @cached_property
    def cells(self) -> dict[str, Measurement]:
        """The measurements by the names of their folders."""
        return {folder.name: Measurement(folder) for folder in sorted((self.path / "cells").glob("[!.]*"))}

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a data frame."""
        return self.rows.to_pandas()


def load_study(path: Path | str) -> Study:
    """Read back what ``stepscope study`` left in a folder.

    Raises:
        RunFolderError: the study is not finished, or a file is damaged or of another version.
    """
    found = Study(Path(path))
    for name in (REPORT, TABLE):
        if not (found.path / name).is_file():
            raise RunFolderError(
                f"{found.path}: no {name}, so this is not a finished study; run `stepscope study`"
            )
    runs.check_version(found.path)
    assert found.report
    return found

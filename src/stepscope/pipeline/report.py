"""``stepscope report``: the page, from the artifacts."""

from __future__ import annotations

from pathlib import Path

from stepscope.pipeline.console import say
from stepscope.report import write_report


def run_report(run: Path) -> Path:
    """Rebuild ``report.html`` of a run folder and say where it is.

    Raises:
        RunFolderError: the folder holds nothing to report.
    """
    page = write_report(run)
    say(f"report: {page}")
    return page

"""``stepscope report``: the page, from the artifacts."""

from __future__ import annotations

from pathlib import Path

from stepscope.pipeline.console import say
from stepscope.report import write_comparison, write_report, write_study_report
from stepscope.report.study_load import STUDY_FIGURES


def run_report(run: Path) -> Path:
    """Rebuild ``report.html`` of a run folder, or ``study.html`` of a study folder, and say where it is.

    Raises:
        RunFolderError: the folder holds nothing to report.
    """
    page = write_study_report(run) if (run / STUDY_FIGURES).is_file() else write_report(run)
    say(f"report: {page}")
    return page


def run_comparison(run: Path, other: Path, out: Path | None = None) -> Path:
    """Write the page that compares two measurements and say where it is.

    Args:
        run: measure folder A.
        other: measure folder B.
        out: the page; None puts ``compare-NAME.html`` into ``run``, NAME being the name of ``other``.

    Raises:
        RunFolderError: one of the folders is no finished measurement, or they share no figure.
    """
    page = write_comparison(run, other, out or run / f"compare-{other.resolve().name}.html")
    say(f"report: {page}")
    return page

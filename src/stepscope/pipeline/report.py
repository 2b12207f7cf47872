"""``stepscope report``: the page, from the artifacts."""

from __future__ import annotations

from pathlib import Path

from stepscope.pipeline.console import say
from stepscope.report import write_comparison, write_report


def run_report(run: Path) -> Path:
    """Rebuild ``report.html`` of a run folder and say where it is.

    Raises:
        RunFolderError: the folder holds nothing to report.
    """
    page = write_report(run)
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

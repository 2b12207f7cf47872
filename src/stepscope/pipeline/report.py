"""``stepscope report``: the page, from the artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepscope.console import say, say_result
from stepscope.errors import RunFolderError
from stepscope.report import (
    evaluated,
    measured,
    studied,
    write_comparison,
    write_law_comparison,
    write_ledger_report,
    write_report,
    write_study_report,
)
from stepscope.results.ledger import LEDGER

_RUN = ("study.json", "summary.json", "checkpoints", "eval.parquet", "measure")
"""What there is to report of a folder beside its ledger."""


def run_report(run: Path) -> Path:
    """Rebuild ``report.html`` of a run folder, or ``study.html`` of a study folder, and say where it is.

    Where a ledger is, its ``ledger.html`` is rebuilt, too; alone, where there is nothing else.

    Raises:
        RunFolderError: the folder holds nothing to report.
    """
    has_ledger = (run / LEDGER).is_file()
    if not has_ledger or any((run / name).exists() for name in _RUN):
        page = write_study_report(run) if (run / "study.json").is_file() else write_report(run)
        say_result("report", _found(run), page)
    if has_ledger:
        page = write_ledger_report(run)
        say(f"report: {page}")
    return page


def _found(run: Path) -> list[str]:
    """What the artifacts of a folder say, in a sentence or two."""
    if (run / "study.json").is_file():
        return studied(run)
    if (run / "summary.json").is_file():
        return measured(run)
    return evaluated(run / "eval.parquet") if (run / "eval.parquet").is_file() else []


def run_comparison(run: Path, others: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page that compares two measurements, or the entropy laws of runs, and say where it is.

    Args:
        run: measure folder A, or a run folder with ``entropy_law.json``.
        others: measure folder B, or further such runs.
        out: the page; None puts ``compare-NAME.html`` into ``run``, NAME being the name of the last other.

    Raises:
        RunFolderError: one of the folders is no finished measurement, or they share no figure; or a run has
            no entropy law.
    """
    target = out or run / f"compare-{others[-1].resolve().name}.html"
    if any((folder / "summary.json").is_file() for folder in (run, *others)):
        if len(others) > 1:
            raise RunFolderError(f"{run}: a measurement is compared with one other, got {len(others)}")
        page = write_comparison(run, others[0], target)
    else:
        page = write_law_comparison([run, *others], target)
    say(f"report: {page}")
    return page

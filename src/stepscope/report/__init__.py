"""One self-contained page from the artifacts of a run."""

from __future__ import annotations

from stepscope.report.page import (
    evaluated,
    measured,
    studied,
    write_comparison,
    write_evaluation,
    write_law_comparison,
    write_ledger_report,
    write_report,
    write_study_report,
)

__all__ = [
    "evaluated",
    "measured",
    "studied",
    "write_comparison",
    "write_evaluation",
    "write_law_comparison",
    "write_ledger_report",
    "write_report",
    "write_study_report",
]

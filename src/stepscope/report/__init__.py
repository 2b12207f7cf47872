"""One self-contained page from the artifacts of a run."""

from __future__ import annotations

from stepscope.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]

"""Stage ``report``: the page, from what the other stages left."""

from __future__ import annotations

from stepscope.pipeline.stages.plan import PROBE, Figures, Plan
from stepscope.pipeline.stages.session import Session
from stepscope.policy.group import current
from stepscope.report import write_report

PAGE = "report.html"
"""The page of a measurement."""


def _report(session: Session) -> Figures:
    """The page shows whatever is there; all but the batches may be missing."""
    if current().is_main:
        write_report(session.run.path)
    return {}


report = Plan("report", _report, ("update.parquet", *PROBE), (PAGE,), (), needs_policy=False, shows_all=True)
"""The stage."""

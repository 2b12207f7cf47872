"""One function per verb: read artifacts, call the library, write artifacts.

Each verb loads on first use only what it needs: a report needs no torch, a measurement no TRL.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepscope.first_use import loading

if TYPE_CHECKING:
    from stepscope.pipeline.check.run import run_check
    from stepscope.pipeline.convert import run_convert
    from stepscope.pipeline.demo import run_demo
    from stepscope.pipeline.dry_run import run_dry
    from stepscope.pipeline.evaluate import run_eval
    from stepscope.pipeline.explain import run_explain, run_quick
    from stepscope.pipeline.export import run_export
    from stepscope.pipeline.ledger.run import run_ledger
    from stepscope.pipeline.measure import run_measure
    from stepscope.pipeline.report import run_comparison, run_report
    from stepscope.pipeline.study.run import run_study
    from stepscope.pipeline.train import run_train

__all__ = [
    "run_check",
    "run_comparison",
    "run_convert",
    "run_demo",
    "run_dry",
    "run_eval",
    "run_explain",
    "run_export",
    "run_ledger",
    "run_measure",
    "run_quick",
    "run_report",
    "run_study",
    "run_train",
    "run_what_if",
]

_HOME = {
    "run_check": "check.run",
    "run_comparison": "report",
    "run_convert": "convert",
    "run_demo": "demo",
    "run_dry": "dry_run",
    "run_eval": "evaluate",
    "run_explain": "explain",
    "run_export": "export",
    "run_ledger": "ledger.run",
    "run_measure": "measure",
    "run_quick": "explain",
    "run_report": "report",
    "run_study": "study.run",
    "run_train": "train",
    "run_what_if": "ledger.what_if",
}


def __getattr__(name: str) -> Any:
    """Load a verb on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'stepscope.pipeline' has no attribute {name!r}")
    home = f"stepscope.pipeline.{_HOME[name]}"
    if home not in sys.modules:
        with loading(to_stay=True):
            import_module(home)
    return getattr(sys.modules[home], name)

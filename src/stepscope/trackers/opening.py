"""Trackers for what is no training: evaluations and ledgers, which are logged once they are on disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from stepscope.errors import ConfigError
from stepscope.trackers.base import Tracker, Trackers
from stepscope.trackers.sent import Sent
from stepscope.trackers.tensorboard import TensorBoardTracker
from stepscope.trackers.trackio import TrackioTracker
from stepscope.trackers.wandb import WandbTracker

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of the trackers that coloured responses and histograms go to."""

FOLDER = "tensorboard"
"""Of a run, with the curves of its training."""


def require_installed(names: Sequence[str] | None) -> None:
    """Refuse a tracker that is not installed, before anything is computed.

    Raises:
        ConfigError: naming what to install.
    """
    for name in names or ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to: {name} is not installed; install it (pip install {name}), or take it out"
            )


def open_trackers(names: Sequence[str] | None, *, what: str, beside: Path, sent: Path) -> Trackers:
    """The trackers that a verb writes to.

    Args:
        names: of trackers; None for TensorBoard where the run has a folder ``tensorboard``, else none.
        what: is logged, ``eval`` or ``ledger``: the folder in ``tensorboard`` that belongs to it alone, and
            the end of the name of its run elsewhere.
        beside: folder of the results; ``tensorboard`` is in it.
        sent: file that says what has gone to trackers that take nothing back.
    """
    if names is None:
        names = ["tensorboard"] if (beside / FOLDER).is_dir() else []
    run_name = f"{beside.resolve().name}-{what}"

    @cache
    def told() -> Sent:
        return Sent(sent)

    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker.anew(beside / FOLDER / what),
        "wandb": lambda: WandbTracker.anew(told(), run_name),
        "trackio": lambda: TrackioTracker.anew(told(), run_name),
    }
    return Trackers(what, [(name, makers[name]) for name in dict.fromkeys(names)])

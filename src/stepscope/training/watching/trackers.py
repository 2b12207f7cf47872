"""The trackers that a trainer already writes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from stepscope.trackers import Sent, Tracker, Trackers
from stepscope.trackers.tensorboard import TensorBoardTracker
from stepscope.trackers.trackio import TrackioTracker
from stepscope.trackers.wandb import WandbTracker

CLOCK = "train/global_step"
"""Name under which the trainer's callbacks log the step."""


def trackers_of(callbacks: Sequence[Any], whose: str, sent: Path) -> Trackers:
    """The trackers of a trainer that is training: those of its own callbacks, as far as stepscope knows them.

    A resumed training takes steps again whose points a server has already; those that have gone there are not
    sent a second time. TensorBoard's own files are left to whoever resumes: ``stepscope train`` takes the
    points behind the checkpoint out.

    Args:
        callbacks: of the trainer.
        whose: who logs, for warnings.
        sent: file that says what has gone to trackers that take nothing back.
    """

    @cache
    def told() -> Sent:
        return Sent(sent)

    found: dict[str, Callable[[], Tracker]] = {}
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            found["tensorboard"] = partial(TensorBoardTracker, callback.tb_writer)
        elif isinstance(callback, WandbCallback):
            found["wandb"] = lambda: WandbTracker(_active_wandb(), told(), clock=CLOCK, waits=True)
        elif isinstance(callback, TrackioCallback):
            found["trackio"] = lambda: TrackioTracker(_active_trackio(), told(), clock=CLOCK)
    return Trackers(whose, found.items())


def _active_wandb() -> Any:
    import wandb

    assert wandb.run is not None, "no run of W&B is active"
    return wandb.run


def _active_trackio() -> Any:
    import trackio

    run = trackio.context_vars.current_run.get()
    assert run is not None, "no run of Trackio is active"
    return run

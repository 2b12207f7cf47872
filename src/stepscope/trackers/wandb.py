"""Weights & Biases."""

from __future__ import annotations

from typing import Any

from stepscope.trackers.entry import Entry
from stepscope.trackers.sent import Sent
from stepscope.trackers.values import values_of


class WandbTracker:
    """Logs numbers, ``wandb.Histogram``, ``wandb.Table`` and ``wandb.Html``.

    Args:
        run: an active run.
        sent: what has gone there.
        clock: name of the number that holds the step; None for one of the source's own.
        waits: whether somebody else logs the row right after, which this then belongs to.
        own: whether :meth:`close` ends the run.
    """

    name = "wandb"

    def __init__(
        self, run: Any, sent: Sent, *, clock: str | None = None, waits: bool = False, own: bool = False
    ) -> None:
        self.run, self.sent = run, sent
        self.clock, self.waits, self._own = clock, waits, own
        self._defined: set[str] = set()

    @classmethod
    def anew(cls, sent: Sent, run_name: str) -> WandbTracker:
        """In the run that is active, or the one that an earlier call began, or a new one.

        ``WANDB_PROJECT``, ``WANDB_MODE`` and the other variables of W&B are followed.
        """
        import os

        import wandb

        if wandb.run is not None:
            return cls(wandb.run, sent)
        project = os.environ.get("WANDB_PROJECT", "stepscope")
        earlier = sent.last_run(cls.name)
        run = wandb.init(project=project, name=run_name, id=earlier, resume="allow")
        return cls(run, sent, own=True)

    def log(self, entry: Entry) -> None:
        """Log an entry, unless this run has it."""
        import wandb

        if not self.sent.claim(self.name, self.run.id, entry.source, entry.step):
            return
        clock = self.clock or entry.name("step")
        if self.clock is None and entry.source not in self._defined:
            self._defined.add(entry.source)
            self.run.define_metric(clock)
            self.run.define_metric(entry.name("*"), step_metric=clock)
        # rows of one run have running numbers, in whichever call they are logged
        row = self.sent.count(self.name, self.run.id) - 1 if self._own else None
        self.run.log({**values_of(entry, wandb), clock: entry.step}, step=row, commit=not self.waits)

    def close(self) -> None:
        """End the run, where it is its own."""
        if self._own:
            self.run.finish()

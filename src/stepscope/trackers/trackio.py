"""Trackio."""

from __future__ import annotations

from typing import Any

from stepscope.trackers.entry import Entry
from stepscope.trackers.sent import Sent
from stepscope.trackers.values import values_of


class TrackioTracker:
    """Logs numbers, ``trackio.Histogram``, ``trackio.Table`` and ``trackio.Html``.

    Args:
        run: an active run.
        sent: what has gone there.
        clock: name of a number that holds the step, in a run whose steps somebody else counts; None to give
            the step itself.
        own: whether :meth:`close` ends the run.
    """

    name = "trackio"

    def __init__(self, run: Any, sent: Sent, *, clock: str | None = None, own: bool = False) -> None:
        self.run, self.sent, self.clock, self._own = run, sent, clock, own

    @classmethod
    def anew(cls, sent: Sent, run_name: str) -> TrackioTracker:
        """In the run that is active, or in one of its own, which further calls go on with.

        ``TRACKIO_PROJECT``, ``TRACKIO_SPACE_ID`` and ``TRACKIO_DIR`` are followed.
        """
        import os

        import trackio

        active = trackio.context_vars.current_run.get()
        if active is not None:
            return cls(active, sent)
        project = os.environ.get("TRACKIO_PROJECT", "stepscope")
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        return cls(trackio.init(project=project, name=run_name, resume="allow", **quiet), sent, own=True)

    def log(self, entry: Entry) -> None:
        """Log an entry, unless this run has it."""
        import trackio

        if not self.sent.claim(self.name, self.run.id, entry.source, entry.step):
            return
        values = values_of(entry, trackio)
        if self.clock is None:
            self.run.log(values, step=entry.step)
        else:
            self.run.log({**values, self.clock: entry.step})

    def close(self) -> None:
        """End the run, where it is its own."""
        if self._own:
            import trackio

            trackio.finish()

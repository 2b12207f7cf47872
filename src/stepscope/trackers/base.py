"""What a tracker is, and several of them that can fail without harm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol

from stepscope.trackers.entry import Entry


class Tracker(Protocol):
    """Shows entries: one class for each product."""

    @property
    def name(self) -> str:
        """As ``report_to`` has it."""

    def log(self, entry: Entry) -> None:
        """Show an entry; one that it has shown already is not shown twice."""

    def close(self) -> None:
        """Hand over what is still under way."""


class Trackers:
    """Trackers that never end what they look at: one that fails is warned of once and left alone.

    Args:
        whose: who logs, for the warning.
        opened: functions that open a tracker, by its name; they may fail like everything else.
    """

    def __init__(self, whose: str, opened: Iterable[tuple[str, Callable[[], Tracker]]]) -> None:
        self.whose = whose
        self.active: list[Tracker] = []
        for name, make in opened:
            with _Spared(self, name):
                self.active.append(make())

    def log(self, entry: Entry) -> None:
        """Show an entry on all that still work."""
        for tracker in list(self.active):
            with _Spared(self, tracker.name):
                tracker.log(entry)

    def close(self) -> None:
        """Hand over what is still under way."""
        for tracker in list(self.active):
            with _Spared(self, tracker.name):
                tracker.close()
        self.active = []

    def give_up(self, name: str, error: Exception) -> None:
        """Leave a tracker alone from here on, and say so."""
        self.active = [tracker for tracker in self.active if tracker.name != name]
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"{self.whose}: nothing more goes to {name}, all results are kept: "
            f"{type(error).__name__}: {reason}",
            stacklevel=4,
        )


class _Spared:
    """What goes wrong inside the block ends the tracker alone: its code and its network are others'."""

    def __init__(self, trackers: Trackers, name: str) -> None:
        self.trackers, self.name = trackers, name

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Give up on an exception; interrupts pass."""
        if not isinstance(error, Exception):
            return False
        self.trackers.give_up(self.name, error)
        return True

"""Trackers: what stepscope finds, where people already look at their runs.

An :class:`Entry` says what there is to see of one source (a probe, an evaluation, a ledger) at one step; a
:class:`Tracker` shows it, one class for each of TensorBoard, Weights & Biases and Trackio. Names are
``stepscope/SOURCE/NAME`` in all of them (docs/TRAINING.md has the table).
"""

from __future__ import annotations

from stepscope.trackers.base import Tracker, Trackers
from stepscope.trackers.entry import Entry, Responses, ShownResponse, strongest
from stepscope.trackers.opening import TRACKERS, open_trackers, require_installed
from stepscope.trackers.sent import Sent

__all__ = [
    "TRACKERS",
    "Entry",
    "Responses",
    "Sent",
    "ShownResponse",
    "Tracker",
    "Trackers",
    "open_trackers",
    "require_installed",
    "strongest",
]

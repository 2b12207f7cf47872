"""What counts as long, and what a machine does at the least."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stepscope.config import Stage

FLOORS: Mapping[Stage, float] = {
    "rollouts": 0.2,
    "step": 0.6,
    "change": 7.3,
    "influence": 13.2,
    "kernel": 3.1,
    "noise": 0.5,
    "criteria": 20.6,
    "report": 1.6,
}
"""Plain forward and backward passes over both batches that a stage takes (docs/RESULTS.md, a whole
measurement in floors); sampling comes on top. Of ``validation`` and ``curvature``, which depend on their own
settings, none is known."""

PILOT = (8, 32)
"""Prompts of the trial that tells the speed; the second where the first is done within a second."""

LONG = 3600.0
"""Seconds from which a run says beforehand that it is long."""

SLOWEST = {"cpu": 1e10, "cuda": 1e12}
"""Operations per second that a machine does at the least: what is not long by these needs no trial."""


def least_speed(device: torch.device) -> float:
    """Operations per second that a device does at the least."""
    return SLOWEST["cuda" if device.type == "cuda" else "cpu"]

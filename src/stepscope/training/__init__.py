"""Supervised warm-up and reinforcement learning with TRL; the only importer of it."""

from __future__ import annotations

from stepscope.training.run import last_checkpoint, train

__all__ = ["last_checkpoint", "train"]

"""Which of several processes this is, under torchrun or ``accelerate launch``."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this is the only process or the first of several: the one that keeps the run folder."""
    return os.environ.get("RANK", "0") == "0"

"""Which of several processes this is, under torchrun or ``accelerate launch``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stepscope.errors import StepscopeError

FAREWELL = 3.0
"""Seconds that a process that fails leaves the others, to say why or to put away what they have begun."""


def is_main_process() -> bool:
    """Whether this is the only process or the first of several: the one that keeps the run folder."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def said_once() -> Iterator[None]:
    """A block whose refusals come in all processes alike, and are said by the first one."""
    try:
        yield
    except StepscopeError as error:
        if is_main_process():
            raise
        time.sleep(FAREWELL)  # the launcher ends all as soon as one has ended
        raise SystemExit(2) from error

"""Loading libraries on first use: torch, transformers and PEFT take seconds, and some of them talk.

A quarter of those seconds Python's garbage collector went again and again through a million objects that are
made to stay, and later through the same ones in every full collection: a training of a tiny policy takes a
third less processor time once they are set apart (docs/RESULTS.md, the command line).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(*, to_stay: bool = False) -> Iterator[None]:
    """A block that imports libraries: the garbage collector rests, and nobody complains of what is missing.

    PEFT imports bitsandbytes where it is installed, which says on a processor that it lacks kernels nobody
    asked for.

    Args:
        to_stay: set what is there after the block apart from what is ever collected, as a process of a
            command may and a notebook may not, where it could be a user's.
    """
    talker, collects = logging.getLogger("bitsandbytes"), gc.isenabled()
    level = talker.level
    gc.disable()
    talker.setLevel(logging.ERROR)
    try:
        yield
        if to_stay:
            gc.freeze()
    finally:
        talker.setLevel(level)
        if collects:
            gc.enable()

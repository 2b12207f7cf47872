"""What a command says while it works: one line per finished stage, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def say_result(verb: str, sentences: Sequence[str], *files: Path) -> None:
    """What a command found and where it is to be read: the last that it says."""
    for sentence in sentences:
        say(sentence)
    if files:
        say(f"{verb}: {', '.join(map(str, files))}")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long the block took, once it is done."""
    begin = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - begin:.1f} s")

"""What a command says while it works: one line per finished stage, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    found = sys.modules.get("IPython")
    return found is not None and hasattr(found.get_ipython(), "kernel")


def bar_shown() -> bool:
    """Whether a progress bar would be seen: standard error is a terminal, or there is a cell to be below."""
    return in_notebook() or sys.stderr.isatty()


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items one after the other, with a progress bar that goes when it is done.

    Args:
        items: what to go through.
        what: title of the bar.
        total: how many there are, where they cannot be counted.
    """
    if in_notebook():
        from tqdm.auto import tqdm

        yield from tqdm(items, what, total=total, leave=False)
    else:
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, console=Console(stderr=True), transient=True)


def say_result(verb: str, sentences: Sequence[str], *files: Path) -> None:
    """What a command found and where it is to be read: the last that it says."""
    for sentence in sentences:
        say(sentence)
    if files:
        say(f"{verb}: {', '.join(map(str, files))}")


def in_words(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long the block took, once it is done."""
    begin = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - begin:.1f} s")

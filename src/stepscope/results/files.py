"""What stands in a file; files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self


class Stored(Protocol):
    """What knows how it stands in a file: records and tables."""

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote; anything else is a RunFolderError."""


_others: list[Path] = []  # folders that another process keeps


@contextmanager
def kept_by_another(folder: Path) -> Iterator[None]:
    """A block in which a folder is not written to: by a process that computes what another one writes."""
    _others.append(folder.resolve())
    try:
        yield
    finally:
        _others.pop()


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then rename it; see also :func:`kept_by_another`."""
    if any(path.resolve().is_relative_to(folder) for folder in _others):
        return
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def why_unreadable(path: Path, error: Exception) -> str:
    """A line on why a file cannot be read."""
    return " ".join(str(error).split()) or type(error).__name__ if path.exists() else "no such file"

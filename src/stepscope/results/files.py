"""What stands in a file; files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self


class Stored(Protocol):
    """What knows how it stands in a file: records and tables."""

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote; anything else is a RunFolderError."""


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then rename it."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def why_unreadable(path: Path, error: Exception) -> str:
    """A line on why a file cannot be read."""
    return " ".join(str(error).split()) or type(error).__name__ if path.exists() else "no such file"

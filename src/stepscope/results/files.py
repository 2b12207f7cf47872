"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then rename it."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def why_unreadable(path: Path, error: Exception) -> str:
    """A line on why a file cannot be read."""
    return " ".join(str(error).split()) or type(error).__name__ if path.exists() else "no such file"

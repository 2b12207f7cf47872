"""A path that is not there is refused before anything else is looked at, or imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stepscope.errors import CheckpointError, ConfigError, RunFolderError, StepscopeError


def alone() -> bool:
    """Whether this process is the only one of its command."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def need_path(path: str | Path, error: Callable[[str], StepscopeError], what: str, kind: str = "") -> None:
    """Refuse a path that is not there, for a process alone."""
    if alone() and not Path(path).expanduser().exists():
        raise error(f"{kind}{path}: {what}")


def need_checkpoint(path: str | Path | None) -> None:
    """Refuse a checkpoint that is not there; None, where a configuration file may name one, passes."""
    if path is not None:
        need_path(path, CheckpointError, "no such checkpoint folder; check the path")


def need_source(path: str | Path | None) -> None:
    """Refuse the folder of a checkpoint or a run that is not there; None passes."""
    if path is not None:
        need_path(path, CheckpointError, "no such folder; give a checkpoint or a run folder")


def need_run(path: str | Path) -> None:
    """Refuse the folder of a training that is not there."""
    need_path(path, RunFolderError, "no such folder; give the run folder of a recorded training")


def need_file(path: Path | None) -> None:
    """Refuse a configuration file that is not there; None passes."""
    if path is not None:
        need_path(path, ConfigError, "no such configuration file")

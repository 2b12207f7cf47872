"""The one rule by which artifacts of a folder are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from stepscope import runs
from stepscope.results.files import Stored
from stepscope.runs import CONFIG, PROVENANCE, RunFolder

S = TypeVar("S", bound=Stored)


class Folder:
    """A folder of results. An artifact that is not there is None; one that is damaged is an error.

    Attributes:
        path: of the folder.
    """

    path: Path

    def stored(self, kind: type[S], name: str) -> S | None:
        """The artifact of a name, or None where no stage wrote it.

        Raises:
            RunFolderError: it is not what its stage wrote, or of another version.
        """
        path = self.path / name
        return runs.read_record(kind, path) if path.is_file() else None

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The resolved configuration."""
        return RunFolder(self.path).config() if (self.path / CONFIG).is_file() else None

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """Versions, seeds, digests, command, and the finished stages."""
        return RunFolder(self.path).provenance() if (self.path / PROVENANCE).is_file() else None

"""Digests of a checkpoint's files, written beside them: damage is noticed before anything uses it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from stepscope.errors import RunFolderError
from stepscope.runs import read_json, sha256, write_json

MANIFEST = "manifest.json"
"""Name to SHA-256 of every other file of the folder."""


def write_manifest(folder: Path) -> None:
    """Record all files of a folder; the last thing that is written into it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / MANIFEST, {"sha256": digests})


def damage(folder: Path) -> str:
    """What is missing or changed since the manifest was written; empty where nothing is.

    Files that the manifest does not list are no damage. A folder without a manifest has to be asked for
    (:func:`has_manifest`) and counts as damaged here.
    """
    recorded = _recorded(folder)
    if recorded is None:
        return f"{MANIFEST} cannot be read"
    missing = (f"{name} is missing" for name in recorded if not (folder / name).is_file())
    return next(missing, "") or altered(folder, "*")


def altered(folder: Path, *patterns: str) -> str:
    """Which file of these names is there and not what was written; empty where none is known to be."""
    for name, digest in (_recorded(folder) or {}).items():
        path = folder / name
        if any(fnmatch(name, p) for p in patterns) and path.is_file() and sha256(path) != digest:
            return f"{name} is not what was written"
    return ""


def _recorded(folder: Path) -> dict[str, str] | None:
    """Name to digest; None where there is no manifest that can be read."""
    try:
        return {str(name): str(digest) for name, digest in read_json(folder / MANIFEST)["sha256"].items()}
    except (RunFolderError, AttributeError, KeyError, TypeError):
        return None


def has_manifest(folder: Path) -> bool:
    """Whether there is anything to verify the folder by."""
    return (folder / MANIFEST).exists()

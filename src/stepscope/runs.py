"""The run folder: its name, its configuration, where it came from, and which stages are finished.

Every file appears whole or not at all (written beside its place, then renamed). A stage counts as finished
once all its files are in place *and* recorded in ``provenance.json``; whatever a killed process left behind
is written again. What is recorded has the SHA-256 of every file, and what reads a file verifies it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import yaml
from filelock import FileLock, Timeout

from stepscope import results
from stepscope.errors import ConfigError, InUseError, RunFolderError
from stepscope.results.files import Stored, whole
from stepscope.results.records import VERSION
from stepscope.yaml_text import parse_yaml

S = TypeVar("S", bound=Stored)

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
LOCK = ".lock"
PROFILE, TRACE = "profile.json", "profile_trace.json"
"""Of the last call that was asked for them; nothing reads them."""
EXAMPLE = "example.json"
"""What a failed stage leaves for the user to look at; it makes no run of the folder."""
PARTS = "_parts"
"""End of the name of a run folder whose result is a file beside it: ``eval_parts`` for ``eval.parquet``."""
BESIDE = "beside"
"""Key of the provenance: digests of such files by name."""
FORMAT = 1
"""Version of run folders, and of the files in them that have none of their own; stands in the provenance."""

PACKAGES = ("stepscope", "torch", "transformers", "peft", "trl", "numpy", "safetensors", "pyarrow")
"""Packages whose versions are recorded."""


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears whole or not at all."""
    whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write strict JSON (nan and infinity become null); the file appears whole or not at all."""
    write_text(path, json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_record(path: Path, record: Stored) -> None:
    """Write an artifact; the file appears whole or not at all."""
    record.write(path)


def read_record(kind: type[S], path: Path) -> S:
    """Read an artifact of a run by the class that wrote it.

    Raises:
        RunFolderError: it is missing, damaged, not what its stage wrote, or of another version.
    """
    return kind.read(verified(path))


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as YAML; the file appears whole or not at all."""
    write_text(path, yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length as parquet; the file appears whole or not at all."""
    results.write_table(pa.table(dict(columns)), path)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run. A key that its objects lack is an error that names the file, too.

    Raises:
        RunFolderError: it is missing, damaged, or not what its stage wrote.
    """
    return _parse_json(verified(path))


def read_table(path: Path) -> pa.Table:
    """Read a parquet file of a run.

    Raises:
        RunFolderError: it is missing, damaged, or not what its stage wrote.
    """
    return results.read_table(verified(path))


def verified(path: Path) -> Path:
    """The path of an artifact, given that it is what a stage of its folder wrote; others pass.

    Raises:
        RunFolderError: its content has changed since.
    """
    digests = _digests(path.parent)
    if path.is_file() and path.name in digests and sha256(path) not in digests[path.name]:
        raise RunFolderError(
            f"{path}: damaged (its SHA-256 is not the one in {PROVENANCE}); delete it and run the stage that "
            "writes it again"
        )
    return path


def check_version(folder: Path) -> None:
    """Refuse a run folder of another version.

    Raises:
        RunFolderError: naming both.
    """
    if (folder / PROVENANCE).is_file():
        found = RunFolder(folder).provenance().get(VERSION)
        if found != FORMAT:
            raise RunFolderError(
                f"{folder}: a run folder of {VERSION} {found}, and this stepscope reads version {FORMAT}; "
                "measure the checkpoint again into another folder"
            )


def unsealed(folder: Path) -> list[Path]:
    """Data files in a folder and below whose content no record vouches for."""
    files = sorted(f for kind in ("json", "parquet", "safetensors") for f in folder.rglob(f"*.{kind}"))
    told = (PROVENANCE, PROFILE, TRACE, EXAMPLE)
    return [f for f in files if not f.name.endswith(told) and f.name not in _digests(f.parent)]


def _digests(folder: Path) -> dict[str, list[str]]:
    """Digests that the files of a run may have, by name; none outside of a run."""
    found: dict[str, list[str]] = {}
    for parts in folder.glob(f"*{PARTS}/{PROVENANCE}"):
        beside = RunFolder(parts.parent).provenance().get(BESIDE, {})
        found |= {name: [digest] for name, digest in beside.items()}
    if not (folder / PROVENANCE).is_file():
        return found
    provenance = RunFolder(folder).provenance()
    found |= provenance.get("sealed", {})
    for record in provenance["stages"].values():
        found |= {name: [digest] for name, digest in record.get("sha256", {}).items()}
    return found


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Object(dict[str, Any]):
    """A JSON object that knows its file, for the error about a key that is not there."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise RunFolderError(
            f"{self.path}: damaged (no {key!r} where it is expected; got {', '.join(self) or 'nothing'}); "
            "delete it and run the stage that writes it again"
        )


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_hook=lambda content: _Object(content, path)
        )
    except (OSError, ValueError, RecursionError) as error:
        reason = "no such file" if not path.exists() else str(error) or type(error).__name__
        raise RunFolderError(
            f"{path}: cannot be read as JSON ({reason}); run the stage that writes it"
        ) from error


def _plain(data: Any) -> Any:
    """Only what strict JSON knows."""
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(v) for v in data]
    if isinstance(data, float):  # numpy's float64 is one
        return float(data) if math.isfinite(data) else None
    if isinstance(data, Path):
        return str(data)
    if hasattr(data, "tolist"):  # numpy scalars and arrays
        return _plain(data.tolist())
    return data


def environment() -> dict[str, Any]:
    """Versions of what computes, and the machine; nothing is imported for it."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two plain configurations differ, with both values."""
    found: list[str] = []
    for key in dict.fromkeys([*a, *b]):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} ({left!r} there, {right!r} here)")
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a run folder to this process inside the block.

    The lock ends with the process that holds it, however that ends; what a killed one leaves is void.

    Raises:
        InUseError: another process is at work in the folder.
        RunFolderError: it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: is a file; choose another folder with --out")
    lock = FileLock(path / LOCK, timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError) as error:  # the second: whoever ended there has just removed it
        raise InUseError(
            f"{path}: another process is at work in this folder; wait for it, or choose another folder with "
            "--out"
        ) from error
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        yield
    finally:
        (path / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # it holds something, or has been renamed
            path.rmdir()


def _not_writable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path}: cannot be written ({error}); choose another folder with --out")


@dataclass(frozen=True)
class RunFolder:
    """One run on disk: ``config.yaml``, ``provenance.json`` and the artifacts of its stages.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def open(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        verb: str,
        resume: bool = False,
        ignore: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Start a run in an empty or new folder, or go on with the one that is there.

        Args:
            path: the folder; made with its parents.
            config: the resolved configuration, plain values only.
            verb: command that makes the run.
            resume: allow a folder that already holds a run of the same configuration.
            ignore: top-level keys that may differ on resuming (``stages``, ``out``).
            extra: more provenance, for example the checkpoint's digest.

        Raises:
            RunFolderError: the folder holds a run and ``resume`` is off; it holds one of another
                configuration; or it holds other files.
        """
        run = cls(path)
        if run.holds_this_run(config, verb=verb, resume=resume, ignore=ignore):
            return run
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_yaml(path / CONFIG, config)
        except OSError as error:
            raise _not_writable(path, error) from error
        started = {
            "command": " ".join(["stepscope", *sys.argv[1:]]),
            VERSION: FORMAT,
            "verb": verb,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": 0.0,
            **environment(),
            **(extra or {}),
            "stages": {},
        }
        write_json(path / PROVENANCE, started)
        return run

    def holds_this_run(
        self, config: Mapping[str, Any], *, verb: str, resume: bool, ignore: Sequence[str] = ()
    ) -> bool:
        """Whether there is a run to go on with (True) or nothing yet (False); touches nothing.

        A run killed before it left anything counts as nothing.

        Raises:
            RunFolderError: see :meth:`open`.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: is a file; choose another folder with --out")
        names = {p.name for p in self.path.iterdir()} - {LOCK, EXAMPLE} if self.path.is_dir() else set()
        if all(name in (CONFIG, PROVENANCE) or name.endswith(".partial") for name in names) and not (
            PROVENANCE in names and self.provenance()["stages"]
        ):
            return False
        if not {CONFIG, PROVENANCE} <= names:
            raise RunFolderError(
                f"{self.path}: is not empty and has no {CONFIG} with {PROVENANCE}, so it holds no run to go "
                "on with; choose another folder with --out"
            )
        provenance = self.provenance()
        if provenance["verb"] != verb:
            raise RunFolderError(
                f"{self.path}: already holds a run of `stepscope {provenance['verb']}`; "
                "choose another folder with --out"
            )
        if not resume:
            done = ", ".join(provenance["stages"]) or "none"
            raise RunFolderError(
                f"{self.path}: already holds a run (finished stages: {done}); choose another folder with "
                "--out, or add --resume to go on with it"
            )
        there, here = ({k: v for k, v in c.items() if k not in ignore} for c in (self.config(), config))
        if differences := differing_keys(there, here):
            raise RunFolderError(
                f"{self.path}: holds a run of another configuration: {'; '.join(differences)}; "
                "choose another folder with --out, or give the same settings"
            )
        return True

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            RunFolderError: ``config.yaml`` is missing or damaged.
        """
        file = self.path / CONFIG
        try:
            data = parse_yaml(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise RunFolderError(f"{file}: cannot be read; is {self.path} a run folder?") from error
        if not isinstance(data, dict):
            raise RunFolderError(f"{file}: expected `key: value` lines; is {self.path} a run folder?")
        return data

    def renew_config(self, values: Mapping[str, Any]) -> None:
        """Replace settings of the recorded configuration."""
        before = self.config()
        if (renewed := {**before, **values}) != before:
            write_yaml(self.path / CONFIG, renewed)

    def provenance(self) -> dict[str, Any]:
        """What is known about the run's origin, and its finished stages.

        Raises:
            RunFolderError: ``provenance.json`` is missing or damaged.
        """
        data = _parse_json(self.path / PROVENANCE)
        if not (
            isinstance(data, dict)
            and {"verb", "stages", "wall_seconds"} <= set(data)
            and isinstance(data["wall_seconds"], int | float)
            and isinstance(data["stages"], dict)
            and all(
                isinstance(record, dict)
                and isinstance(record.get("files"), dict)
                and isinstance(record.get("seconds"), int | float)
                for record in data["stages"].values()
            )
        ):
            raise RunFolderError(f"{self.path / PROVENANCE}: not the provenance of a run; delete the folder")
        return data

    def file(self, name: str) -> Path:
        """Path of an artifact."""
        return self.path / name

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished: recorded, and all its files still there with their sizes."""
        record = self.provenance()["stages"].get(stage)
        if record is None:
            return False
        return all(
            (self.path / name).is_file() and (self.path / name).stat().st_size == size
            for name, size in record["files"].items()
        )

    def seconds(self, stage: str) -> float:
        """How long a finished stage took."""
        return float(self.provenance()["stages"][stage]["seconds"])

    @contextmanager
    def stage(
        self,
        name: str,
        files: Sequence[str],
        *,
        invalidates: Sequence[str] = (),
        sealed: bool = True,
        inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> Iterator[None]:
        """Run a stage inside the block and record it as finished afterwards.

        Args:
            name: of the stage.
            files: names of the files it leaves; one of another stage is completed, and recorded there, too.
            invalidates: later stages that rest on it; they count as unfinished from here on.
            sealed: nothing else writes these files, so that one that changes is damaged.
            inputs: what the stage has read, given the provenance; recorded.

        Raises:
            RunFolderError: the block ended but a file is missing.
        """
        before = self.provenance()
        for later in (name, *invalidates):
            before["stages"].pop(later, None)
        write_json(self.path / PROVENANCE, before)
        begin = time.perf_counter()
        finished = False
        try:
            yield
            missing = [f for f in files if not (self.path / f).is_file()]
            if missing:
                raise RunFolderError(f"{self.path}: stage {name} left out {', '.join(missing)}")
            finished = True
        finally:
            if not finished:
                others = {file for record in before["stages"].values() for file in record["files"]}
                for file in set(files) - others:
                    (self.path / file).unlink(missing_ok=True)
        seconds = time.perf_counter() - begin
        provenance = self.provenance()
        provenance["wall_seconds"] += seconds
        sizes = {f: (self.path / f).stat().st_size for f in files}
        digests = {f: sha256(self.path / f) for f in files} if sealed else {}
        for record in provenance["stages"].values():
            record["files"] |= {f: size for f, size in sizes.items() if f in record["files"]}
            record["sha256"] |= {f: digest for f, digest in digests.items() if f in record["files"]}
        record = provenance["stages"][name] = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "files": sizes,
            "sha256": digests,
        }
        if inputs is not None:
            record["inputs"] = inputs(provenance)
        write_json(self.path / PROVENANCE, provenance)

    def write_sealed(self, name: str, record: Stored) -> None:
        """Write a record that several stages add to, its digest recorded beside that of what it replaces.

        The record goes first, so that a process killed in between leaves a file that passes.
        """
        path = self.path / name
        partial = path.with_name(path.name + ".partial")
        record.write(partial)
        provenance = self.provenance()
        digests = [sha256(p) for p in (partial, path) if p.is_file()]
        write_json(
            self.path / PROVENANCE, {**provenance, "sealed": {**provenance.get("sealed", {}), name: digests}}
        )
        partial.replace(path)

    def seal_beside(self, files: Sequence[Path]) -> None:
        """Record the digests of files beside the folder; of none, before they are written."""
        beside = {path.name: sha256(path) for path in files}
        write_json(self.path / PROVENANCE, {**self.provenance(), BESIDE: beside})

    def clean_up(self) -> None:
        """After a failure: remove half-written files, and the folder itself if it holds nothing of a run."""
        if not self.path.is_dir():
            return
        for partial in self.path.glob("*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()
        names = {p.name for p in self.path.iterdir()}
        kept = names - {LOCK, EXAMPLE}
        if kept <= {CONFIG, PROVENANCE} and not (PROVENANCE in kept and self.provenance()["stages"]):
            for name in kept:
                (self.path / name).unlink()
            if names.isdisjoint((LOCK, EXAMPLE)):
                self.path.rmdir()

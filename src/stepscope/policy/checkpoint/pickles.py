"""Files that hold pickled objects: read without running anything, whatever they ask for.

Tensors are read by ``torch.load(weights_only=True)``. Where a file needs classes beside tensors and plain
data, a format names each of them with a stub of its own in its place; any other class is refused by name.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepscope.errors import CheckpointError, printable
from stepscope.policy.checkpoint.foreign import refuse_packed

Stubs = Mapping[str, Any]
"""What is made in place of a class or function, by its full name (``package.module.name``)."""

LARGEST = 2**29
"""Bytes of a pickle without tensors: some 200 for each part of a tensor in a directory of shards."""

UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, pickle.UnpicklingError),
    *(AttributeError, ImportError, TypeError, AssertionError),
)
"""What torch and pickle raise for a file that is none of theirs, or damaged."""


class ForbiddenClassError(CheckpointError):
    """A file needs something beside tensors and plain data that its format has no need of.

    Attributes:
        names: what it needs, in full.
    """

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


def read_tensors(path: Path, *, stubs: Stubs | None = None, lazily: bool = False) -> Any:
    """What ``torch.save`` wrote, on the processor; nothing of it is run.

    Args:
        path: the file.
        stubs: what else it may hold; torch's own sharded tensors (``DTensor``) have to be imported by whoever
            expects them.
        lazily: map the file into memory, so that a tensor is read when it is used.

    Raises:
        ForbiddenClassError: it holds objects of other classes; they are named.
        CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; copy the checkpoint again")
    refuse_packed(path)
    try:
        with torch.serialization.safe_globals([(stub, name) for name, stub in (stubs or {}).items()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily or None)
    except UNREADABLE as error:
        classes = _classes_in(path) if isinstance(error, pickle.UnpicklingError) else set()
        if classes := classes - set(stubs or {}):
            raise _forbidden(path, sorted(classes)) from error
        raise CheckpointError(
            f"{path}: damaged, or not what torch.save writes ({_reason(error)}); copy the file again"
        ) from error


def read_item(content: bytes, *, where: str) -> Any:
    """What ``torch.save`` wrote as a part of a larger file: plain data or one tensor.

    Raises:
        CheckpointError: as :func:`read_tensors`.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{where}: damaged, or no plain data ({_reason(error)}); copy the file again"
        ) from error


def unpickle(path: Path, *, stubs: Stubs) -> Any:
    """What ``pickle.dump`` wrote, of named classes only; stubs stand for them, which are all that is called.

    Args:
        path: the file.
        stubs: for every class or function that the file may name. Make them for each file anew, since a file
            can change attributes of what it is given.

    Raises:
        ForbiddenClassError: it names another class.
        CheckpointError: it is missing, too large or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; copy the checkpoint again")
    if (size := path.stat().st_size) > LARGEST:
        raise CheckpointError(
            f"{path}: {size} bytes, expected at most {LARGEST} for what names tensors; copy it again"
        )
    try:
        return _Restricted(path, stubs).load()
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: damaged ({_reason(error)}); copy the file again") from error


class _Restricted(pickle.Unpickler):
    """Hands out stubs and nothing else."""

    def __init__(self, path: Path, stubs: Stubs) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self._path = path
        self._stubs = stubs

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._stubs:
            raise _forbidden(self._path, [full])
        return self._stubs[full]


def _forbidden(path: Path, names: list[str]) -> ForbiddenClassError:
    some = ", ".join(printable(name)[:80] for name in names[:3])
    return ForbiddenClassError(
        f"{path}: it holds {some}, expected tensors and plain data; nothing of it was run: do not load it "
        "elsewhere unless you know where it comes from",
        names,
    )


def _classes_in(path: Path) -> set[str]:
    """The classes that a file needs beside tensors, found without running it; none where it is damaged."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except UNREADABLE:
        return set()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0])[:160] if lines else type(error).__name__

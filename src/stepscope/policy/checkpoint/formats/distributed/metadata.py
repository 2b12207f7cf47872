"""The directory of such a checkpoint: which tensors there are, and where each chunk of one stands.

``.metadata`` is a pickle of torch's own classes. It is read with stubs in their place (names checked on torch
2.13): nothing of it is called, and whatever else it names is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from stepscope.errors import CheckpointError, shown
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.pickles import Stubs, unpickle

METADATA = ".metadata"

_OWN = "torch.distributed.checkpoint.metadata"

Place = tuple[str | int, ...]
"""Of an item in the nested state that was saved; one element, its flat name, where the file does not tell."""


@dataclass(frozen=True)
class Span:
    """A part of a file."""

    file: Path
    start: int
    length: int

    def verify(self) -> None:
        """Make sure that there is such a part.

        Raises:
            CheckpointError: the file is shorter than that, or not there.
        """
        if not self.file.is_file():
            raise CheckpointError(f"{self.file}: a file of the checkpoint is missing; copy it")
        size = self.file.stat().st_size
        if self.start + self.length > size:
            raise CheckpointError(
                f"{self.file}: bytes {self.start} to {self.start + self.length} are asked for and it has "
                f"{size}; copy the file again"
            )

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            CheckpointError: as :meth:`verify`.
        """
        self.verify()
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.length)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, how long it is along each axis, and where it stands."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the directory has it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Directory:
    """What a checkpoint holds, by place: tensors, and values of other kinds."""

    tensors: Mapping[Place, TensorEntry]
    values: Mapping[Place, Span]

    @property
    def files(self) -> frozenset[Path]:
        """Of all chunks and values."""
        chunks = (chunk.span.file for entry in self.tensors.values() for chunk in entry.chunks)
        return frozenset(chunks) | {span.file for span in self.values.values()}


@reads_foreign
def read_directory(folder: Path) -> Directory:
    """The directory of a folder with ``.metadata``.

    Raises:
        CheckpointError: it is damaged, names classes that are no part of such a file, or contradicts itself.
    """
    path = folder / METADATA
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> Directory:
    record = unpickle(path, stubs=_stubs())
    spans: dict[tuple[str, tuple[int, ...] | None], Span] = {}
    for index, info in _items(record, "storage_data", path):
        offset = index.state.get("offset")
        spans[str(index.state["fqn"]), None if offset is None else _whole(offset, path)] = _span(info, path)
    places = dict(_items(record, "planner_data", path)) if record.state.get("planner_data") else {}
    tensors: dict[Place, TensorEntry] = {}
    values: dict[Place, Span] = {}
    for name, entry in _items(record, "state_dict_metadata", path):
        place = tuple(places.get(name, (str(name),)))
        if entry.state is None or "chunks" not in entry.state:
            values[place] = _found(spans, (name, None), path)
            continue
        dtype = entry.state["properties"].state[0]
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{path}: {shown(name)} has type {shown(dtype)}; copy the file again")
        chunks = [
            (_whole(c.state["offsets"], path), _whole(c.state["sizes"], path)) for c in entry.state["chunks"]
        ]
        tensors[place] = TensorEntry(
            str(name),
            _whole(entry.state["size"], path),
            dtype,
            tuple(Chunk(at, sizes, _found(spans, (name, at), path)) for at, sizes in chunks),
        )
    return Directory(tensors, values)


def _stubs() -> Stubs:
    """What stands for the classes that a directory may name, made anew for each."""

    class Kept:
        """Keeps what the pickle sets, and does nothing."""

        state: Any = None

        def __init__(self, *_: Any) -> None:
            self.state = {}

        def __setstate__(self, state: Any) -> None:
            self.state = state

    def ignored(*_: Any) -> None:
        return None

    names = (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
    )
    kept = {f"{_OWN}.{name}": type(name, (Kept,), {}) for name in names}
    types = {f"torch.{n}": t for n, t in vars(torch).items() if isinstance(t, torch.dtype)}
    return {
        **kept,
        **types,
        "torch.distributed.checkpoint.filesystem._StorageInfo": type("_StorageInfo", (Kept,), {}),
        f"{_OWN}._MEM_FORMAT_ENCODING": ignored,
        "torch.serialization._get_layout": ignored,
        "torch.Size": tuple,
        "pathlib.PosixPath": ignored,
        "pathlib._local.PosixPath": ignored,
        "pathlib.WindowsPath": ignored,
        "collections.OrderedDict": dict,
    }


def _items(record: Any, key: str, path: Path) -> Iterator[tuple[Any, Any]]:
    found = record.state.get(key) if isinstance(getattr(record, "state", None), dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: {key} is {shown(found)}, expected what torch.distributed.checkpoint writes; copy the "
            "file again"
        )
    yield from found.items()


def _whole(value: Any, path: Path) -> tuple[int, ...]:
    """Lengths or offsets, none below 0."""
    if not isinstance(value, tuple) or not all(type(v) is int and v >= 0 for v in value):
        raise CheckpointError(f"{path}: {shown(value)} are no offsets or sizes; copy the file again")
    return value


def _span(info: Any, path: Path) -> Span:
    state = info.state
    (start, length), name = _whole((state["offset"], state["length"]), path), state["relative_path"]
    if state.get("transform_descriptors"):
        raise CheckpointError(
            f"{path}: items are stored transformed ({shown(state['transform_descriptors'])}); save without "
            "extensions (FileSystemWriter without _extensions)"
        )
    # by its parts: files of a snapshot that the hub's client has downloaded are links out of it
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{path}: it points at {shown(name)}, outside of its folder; copy it again")
    return Span(path.parent / name, start, length)


def _found(spans: Mapping[Any, Span], key: tuple[Any, Any], path: Path) -> Span:
    if key not in spans:
        raise CheckpointError(
            f"{path}: {shown(key[0])} at {shown(key[1])} stands in no file; copy the checkpoint again"
        )
    return spans[key]

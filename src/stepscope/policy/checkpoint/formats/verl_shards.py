"""Tensors that the processes of an FSDP run have saved in pieces, put together again without a process group.

A piece is what a process holds of a ``DTensor``; which part of the whole it is says the mesh of the processes
that lies in the file. Copies on other processes (``fsdp_size`` below the number of processes) must be equal.
Pinned by ``tests/policy/test_verl.py`` on files that torch wrote with 1 to 4 processes.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.pickles import ForbiddenClassError, read_tensors

_FILE = re.compile(r"(?:model|optim)_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")

Grid = tuple[tuple[int, ...], ...]
"""The processes: a row for each copy of the whole, in the order of its pieces."""


@dataclass(frozen=True)
class Joined:
    """A tensor in pieces, read when it is asked for.

    Attributes:
        where: file and name, for errors.
        copies: the pieces of each copy, in order.
        axis: along which it is cut; None where a piece is the whole.
        shape: of the whole.
        dtype: its type.
    """

    where: str
    copies: tuple[tuple[Tensor, ...], ...]
    axis: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: EllipsisType, /) -> Tensor:
        """The whole.

        Raises:
            CheckpointError: copies of it differ.
        """
        pieces = [agreed(same, self.where) for same in zip(*self.copies, strict=True)]
        return pieces[0] if self.axis is None else torch.cat(pieces, dim=self.axis)


def processes(folder: Path, kind: str) -> int:
    """How many processes have saved their ``model`` or ``optim`` files here.

    Raises:
        CheckpointError: files are missing, or there are those of several runs.
    """
    found: dict[int, set[int]] = {}
    for file in folder.glob(f"{kind}_world_size_*_rank_*.pt"):
        if (said := _FILE.fullmatch(file.name)) is not None:
            found.setdefault(int(said[1]), set()).add(int(said[2]))
    if not found:
        raise CheckpointError(
            f"{folder}: there is no {kind}_world_size_*_rank_*.pt; copy the checkpoint again"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: {kind} files of {' and of '.join(map(str, sorted(found)))} processes, expected those "
            "of one checkpoint; remove what another run has left"
        )
    (world, ranks), *_ = found.items()
    missing = [rank for rank in range(world) if rank not in ranks]
    if missing or len(ranks) > world:
        first = missing[0] if missing else max(ranks)
        raise CheckpointError(
            f"{folder}: {len(ranks)} {kind} files of {world} processes, "
            f"{kind}_world_size_{world}_rank_{first}.pt is {'missing' if missing else 'one too many'}; copy "
            "those of all machines of the run into one folder"
        )
    return world


def read_ranks(folder: Path, kind: str) -> list[Mapping[Any, Any]]:
    """What each process has saved, its tensors mapped into memory.

    Raises:
        CheckpointError: as :func:`processes`; a file is damaged, or holds more than tensors and plain data.
    """
    world = processes(folder, kind)
    found = []
    for rank in range(world):
        file = folder / f"{kind}_world_size_{world}_rank_{rank}.pt"
        try:
            with _without_groups():
                content = read_tensors(file, lazily=True)
        except ForbiddenClassError as error:
            if not any(name.rpartition(".")[2] == "ShardedTensor" for name in error.names):
                raise
            raise CheckpointError(
                f"{file}: its tensors are torch's old ShardedTensor, which only a group of as many processes "
                "can read; save the checkpoint with verl 0.3 or newer, which writes DTensor"
            ) from error
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{file}: got {type(content).__name__}, expected a dict; copy the file again"
            )
        found.append(content)
    return found


def grid_of(ranks: Sequence[Mapping[Any, Any]], where: str) -> Grid:
    """How the processes share the tensors, by what their ``model`` files say.

    Raises:
        CheckpointError: the meshes in the files are not those of as many processes, each in its place.
    """
    meshes = [next((t.device_mesh for t in r.values() if isinstance(t, DTensor)), None) for r in ranks]
    if meshes[0] is None:
        return ((0,),) if len(ranks) == 1 else _refuse_mesh(where, "no tensor is in pieces")
    mesh = _mesh(meshes[0])
    rows = mesh.view(1, -1) if mesh.dim() == 1 else mesh
    if mesh.dim() > 2 or sorted(mesh.flatten().tolist()) != list(range(len(ranks))):
        _refuse_mesh(where, f"the mesh of processes is {tuple(mesh.shape)}")
    for rank, other in enumerate(meshes):
        if other is None or not torch.equal(_mesh(other), mesh):
            _refuse_mesh(where, f"process {rank} has another mesh than process 0")
        place = vars(other).get("_coordinate_on_dim")
        own = (mesh == rank).nonzero()[0].tolist()
        if place is not None and list(place) != own:
            _refuse_mesh(where, f"the file of process {rank} has been written by another")
    return tuple(tuple(row) for row in rows.tolist())


def joined(parts: Sequence[Any], grid: Grid, where: str) -> Joined:
    """One tensor of all processes.

    Args:
        parts: what each process has of it, plain where each has the whole.
        grid: of the processes.
        where: file and name, for errors.

    Raises:
        CheckpointError: it is no tensor, is cut in another way than FSDP cuts, or the pieces do not make up
            the shape it is said to have.
    """
    first = parts[0]
    if not all(isinstance(part, Tensor) and type(part) is type(first) for part in parts):
        raise CheckpointError(f"{where}: not a tensor on every process; copy the checkpoint again")
    if not isinstance(first, DTensor):
        return Joined(where, tuple((part,) for part in parts), None, tuple(first.shape), first.dtype)
    axis = _axis(first, len(grid) > 1, where)
    shape = tuple(first.shape)
    pieces = [part._local_tensor for part in parts]
    if any(tuple(p.shape) != shape or p.placements != first.placements for p in parts):
        raise CheckpointError(f"{where}: the processes do not agree on its shape; copy the checkpoint again")
    if axis is None:
        copies = tuple((piece,) for piece in pieces)
    else:
        copies = tuple(tuple(pieces[rank] for rank in row) for row in grid)
    for row in copies:
        got = [tuple(piece.shape) for piece in row]
        whole = shape if axis is None else _length(got, axis, shape)
        if whole != shape or any(piece.dtype != pieces[0].dtype for piece in row):
            raise CheckpointError(
                f"{where}: pieces of shapes {', '.join(map(str, got))}, expected {shape} in all; copy the "
                "checkpoint again"
            )
    return Joined(where, copies, axis, shape, pieces[0].dtype)


def agreed(copies: Sequence[Tensor], where: str) -> Tensor:
    """One of several copies.

    Raises:
        CheckpointError: they differ.
    """
    for other in copies[1:]:
        if other.dtype != copies[0].dtype or not torch.equal(other, copies[0]):
            raise CheckpointError(
                f"{where}: the processes have different copies of it; these are files of different steps, "
                "copy the checkpoint again"
            )
    return copies[0]


def _length(got: Sequence[tuple[int, ...]], axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that pieces have together, if they differ along one axis only and FSDP would have cut so."""
    if any(len(s) != len(shape) for s in got):
        return ()
    sizes = [s[axis] for s in got]
    most = math.ceil(shape[axis] / len(sizes))
    even = [max(0, min(most, shape[axis] - i * most)) for i in range(len(sizes))]
    rest = {(*s[:axis], *s[axis + 1 :]) for s in got if s[axis]}
    if sizes != even or rest - {(*shape[:axis], *shape[axis + 1 :])}:
        return ()
    return shape


def _axis(tensor: DTensor, copied: bool, where: str) -> int | None:
    *above, last = tensor.placements
    if len(above) == copied and all(type(p) is Replicate for p in above):
        if type(last) is Replicate:
            return None
        if type(last) is Shard and 0 <= last.dim < tensor.dim():
            return int(last.dim)
    raise CheckpointError(
        f"{where}: it is cut as {', '.join(map(str, tensor.placements))}, expected pieces along one axis as "
        "FSDP makes them; train without tensor parallelism"
    )


def _mesh(mesh: Any) -> Tensor:
    """Numbers of the processes; torch kept them as a tensor up to 2.8 and as a layout since."""
    kept = vars(mesh).get("mesh")
    return kept if isinstance(kept, Tensor) else mesh.mesh


def _refuse_mesh(where: str, what: str) -> Grid:
    raise CheckpointError(f"{where}: {what}; copy the checkpoint again, each file under its own name")


@contextmanager
def _without_groups() -> Iterator[None]:
    """No warnings inside the block that process groups are not there, which nothing here needs."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""Tensors of such a checkpoint, put together from their chunks when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.distributed.metadata import Chunk, TensorEntry
from stepscope.policy.checkpoint.pickles import read_item


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that is read chunk by chunk; a :class:`~stepscope.policy.checkpoint.tensors.Stored`."""

    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """As it was saved."""
        return self.entry.dtype

    def __getitem__(self, index: EllipsisType, /) -> Tensor:
        """The whole tensor.

        Raises:
            CheckpointError: its chunks leave a hole, overlap, claim more than their files have, or are not
                what the directory says.
        """
        refuse_gaps(self.entry)
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.entry.chunks:
            place = tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._read(chunk)
        return whole

    def _read(self, chunk: Chunk) -> Tensor:
        where = f"{chunk.span.file}: {self.entry.name}"
        found = read_item(chunk.span.read(), where=where)
        if not isinstance(found, Tensor) or tuple(found.shape) != chunk.sizes or found.dtype != self.dtype:
            got = f"{found.dtype} of {tuple(found.shape)}" if isinstance(found, Tensor) else "no tensor"
            raise CheckpointError(
                f"{where} is {got}, expected {self.dtype} of {chunk.sizes}; copy the checkpoint again"
            )
        return found


def refuse_gaps(entry: TensorEntry) -> None:
    """Refuse a tensor whose chunks are not a partition of it, or cannot be as large as they say.

    Raises:
        CheckpointError: naming the tensor and what is wrong.
    """
    rank = len(entry.shape)
    if any(len(c.offsets) != rank or len(c.sizes) != rank for c in entry.chunks):
        raise _refusal(entry, "chunks of another number of axes")
    boxes = [c for c in entry.chunks if math.prod(c.sizes)]
    if len({(c.span.file, c.span.start) for c in boxes}) != len(boxes):
        raise _refusal(entry, "chunks that stand in one place of a file")
    for chunk in boxes:
        chunk.span.verify()
        if math.prod(chunk.sizes) * entry.dtype.itemsize > chunk.span.length:
            raise _refusal(entry, f"a chunk of {chunk.sizes} in {chunk.span.length} bytes")
    starts = np.array([c.offsets for c in boxes], dtype=object).reshape(len(boxes), rank)
    ends = starts + np.array([c.sizes for c in boxes], dtype=object).reshape(len(boxes), rank)
    if (ends > np.array(entry.shape, dtype=object)).any():
        raise _refusal(entry, "a chunk beyond its end")
    held = sum(math.prod(c.sizes) for c in boxes)
    if held != math.prod(entry.shape):
        raise _refusal(entry, f"chunks of {held} numbers in all")
    starts, ends = starts.astype(np.int64), ends.astype(np.int64)
    for i in range(len(boxes) - 1):
        apart = (starts[i + 1 :] >= ends[i]) | (ends[i + 1 :] <= starts[i])
        if not apart.any(axis=1).all():
            raise _refusal(entry, "chunks that overlap")


def _refusal(entry: TensorEntry, what: str) -> CheckpointError:
    files = sorted({str(c.span.file) for c in entry.chunks})
    place = files[0] if files else "the checkpoint"
    return CheckpointError(
        f"{place}: {entry.name} of shape {entry.shape} has {what}; copy the checkpoint again, with the files "
        "of all processes"
    )

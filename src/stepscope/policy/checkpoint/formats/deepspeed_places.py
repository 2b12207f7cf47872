"""Which part of which flat tensor is whose, in a checkpoint of DeepSpeed.

ZeRO keeps, on each rank, one flat tensor per parameter group (stages 1 and 2) or sub-group of one (stage 3)
of the weights in float32, and moments of the same length. A parameter's part of it is

- in stages 1 and 2 (``stage_1_and_2.py``, ``bf16_optimizer.py``) that of ``param_slice_mappings``: name to
  first number and length on that rank; ranks follow each other, in whatever order the group was put;
- in stage 3 (``stage3.py``) that of ``param_shapes``: a parameter of n numbers has ceil(n / W) on each rank,
  of which the last ones are padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from stepscope.errors import CheckpointError, printable
from stepscope.policy.checkpoint.formats.deepspeed_files import mapping
from stepscope.policy.numerics.finiteness import whole_number


@dataclass(frozen=True)
class Place:
    """Where a parameter is in flat tensors.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        group: number of the group or sub-group.
        parts: rank, first number and length of each part, in the order in which they follow each other.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    parts: tuple[tuple[int, int, int], ...]

    def join(self, flats: Sequence[Tensor]) -> Tensor:
        """The parameter's own tensor, out of the flat ones of its group, one per rank.

        Raises:
            CheckpointError: a flat tensor is shorter than what it has to hold.
        """
        found = []
        for rank, start, length in self.parts:
            part = flats[rank][start : start + length]
            if len(part) != length:
                raise CheckpointError(
                    f"{printable(self.name)} ends at {start + length} of a flat tensor of rank {rank} that "
                    f"has {start + len(part)} numbers; the file is damaged, copy it again"
                )
            found.append(part)
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole[: math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True)
class Joined:
    """A parameter that is put together when it is asked for."""

    place: Place
    flats: Sequence[Tensor]

    @property
    def shape(self) -> Sequence[int]:
        """Of the parameter."""
        return self.place.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the flat tensors."""
        return self.flats[0].dtype

    def __getitem__(self, index: EllipsisType, /) -> Tensor:
        """The tensor."""
        return self.place.join(self.flats)[index]


@dataclass(frozen=True)
class Master(Joined):
    """A parameter's master, held against the copy of it in the training's type.

    The copy is the master rounded. Parts under each other's file names give something else altogether; so do
    places under ``round_robin_gradients`` with several processes: DeepSpeed 0.19.8 puts the group in another
    order, that of ``param_shapes``, and counts places through the first one (``_link_all_hp_params``).

    Attributes:
        copy: in ``*_model_states.pt``.
        where: the folder of the step, for errors.
    """

    copy: Tensor
    where: Path

    def __getitem__(self, index: EllipsisType, /) -> Tensor:
        """The tensor.

        Raises:
            CheckpointError: it is further from its copy than rounding can be.
        """
        found, kind = super().__getitem__(index), torch.finfo(self.copy.dtype)
        room = kind.eps * found.abs() + kind.tiny
        if found.shape != self.copy.shape or ((found - self.copy.to(found.dtype)).abs() > room).any():
            raise CheckpointError(
                f"{self.where}: the masters of {printable(self.place.name)} are not those of the weights in "
                "*_model_states.pt: files of different steps or under each other's names, or a training with "
                "round_robin_gradients, with which DeepSpeed writes down other places than it uses; copy the "
                "checkpoint again, or train without round_robin_gradients"
            )
        return found


def places_by_slices(groups: Sequence[Any], ranks: Sequence[Sequence[Any]], where: Path) -> Iterator[Place]:
    """Places in stages 1 and 2.

    Args:
        groups: ``param_shapes``.
        ranks: ``param_slice_mappings`` of each.
        where: what to name in an error.

    Raises:
        CheckpointError: a parameter is not there as a whole, or there is one more.
    """
    for number, group in enumerate(groups):
        shapes = mapping(group, "param_shapes", where)
        for name, shape in shapes.items():
            parts = []
            for rank, own in enumerate(ranks):
                if (at := own[number].get(name)) is not None:
                    parts.append((rank, _at(at.start, where), _at(at.numel, where)))
            if (held := sum(length for _, _, length in parts)) != math.prod(shape):
                raise CheckpointError(
                    f"{where}: the ranks hold {held} numbers of {printable(str(name))}, expected "
                    f"{math.prod(shape)}; copy the checkpoint again"
                )
            yield Place(str(name), tuple(shape), number, tuple(parts))
        if strange := {str(name) for own in ranks for name in own[number]} - set(map(str, shapes)):
            raise CheckpointError(
                f"{where}: the ranks hold {printable(min(strange))}, which the model's file does not know; "
                "the files are of different trainings, so copy the checkpoint again"
            )


def places_by_partition(
    groups: Sequence[Any], lengths: Sequence[Sequence[int]], where: Path
) -> Iterator[Place]:
    """Places in stage 3.

    Args:
        groups: ``param_shapes``.
        lengths: of each rank's flat tensors.
        where: what to name in an error.

    Raises:
        CheckpointError: a flat tensor is longer or shorter than its parameters.
    """
    world = len(lengths)
    for number, group in enumerate(groups):
        start = 0
        for name, shape in mapping(group, "param_shapes", where).items():
            place = split_evenly(str(name), shape, world, group=number, start=start)
            yield place
            start += place.parts[0][2]
        for rank, own in enumerate(lengths):
            if own[number] != start:
                raise CheckpointError(
                    f"{where}: rank {rank} holds {own[number]} weights of sub-group {number}, expected "
                    f"{start}; parameters that were split over other processes than all {world} (hpZ, MiCS) "
                    "or are kept elsewhere (NVMe) are not read: train without"
                )


def split_evenly(name: str, shape: Sequence[int], world: int, *, group: int = 0, start: int = 0) -> Place:
    """The place of a parameter of which every rank has as much from ``start`` on, padding after it."""
    length = -(-math.prod(shape) // world)
    return Place(name, tuple(shape), group, tuple((rank, start, length) for rank in range(world)))


def _at(value: object, where: Path) -> int:
    """A first number or a length."""
    found = whole_number(value, "a part of param_slice_mappings", str(where))
    if found < 0:
        raise CheckpointError(
            f"{where}: param_slice_mappings holds {found}, expected 0 or more; copy the checkpoint again"
        )
    return found

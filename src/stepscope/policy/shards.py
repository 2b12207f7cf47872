"""Tensors of which each of several processes holds a part: rows of their first axis, as FSDP2 cuts them.

A vector in parameter space of a sharded policy has such tensors (``torch.distributed.tensor.DTensor``).
Operations on coordinates work on them as on any other; what mixes coordinates or reads numbers goes through
here or through :mod:`stepscope.policy.vectors`, so that a part is never taken for the whole: torch refuses to
mix the two.

A tensor that is whole has one part, itself: functions here take either.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard

from stepscope.policy.group import Group, current


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, outside of autograd; changes in place change the tensor."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def span(like: Tensor) -> slice:
    """Which rows of a parameter this process holds."""
    if not isinstance(like, DTensor):
        return slice(0, like.shape[0] if like.dim() else 1)
    count, size = like.shape[0], _chunk(like)
    start = min(current().rank * size, count)
    return slice(start, min(start + size, count))


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process; an exchange, possible inside of ``torch.func`` transforms too."""
    if not isinstance(tensor, DTensor):
        return tensor
    own, size, axis = part(tensor), _chunk(tensor), _axis(tensor)
    with torch.no_grad(), torch._C._DisableFuncTorch():
        own = own.movedim(axis, 0)
        padded = own.new_zeros(size, *own.shape[1:])
        padded[: len(own)] = own
        found = current().concatenated(padded)
        return found[: tensor.shape[axis]].movedim(0, axis)


def of_parts(own: Tensor, like: Tensor, leading: int | None = None) -> Tensor:
    """The tensor of which each process gives its part; the part itself where ``like`` is whole.

    Args:
        own: this process's part.
        like: a tensor that is held in the same parts, but for axes before those of the parameter.
        leading: how many such axes ``own`` has; by default as ``like`` has.
    """
    if not isinstance(like, DTensor):
        return own
    axis = _axis(like)
    place = axis if leading is None else leading
    shape = torch.Size((*own.shape[:place], *like.shape[axis:]))
    return DTensor.from_local(
        own.contiguous(),
        like.device_mesh,
        [Shard(place)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def cut(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to all, as a parameter is held: a copy of the own part, or the tensor itself."""
    return of_parts(full[span(like)].clone(), like) if isinstance(like, DTensor) else full


def dealt(tensor: Tensor | None, like: Tensor, dtype: torch.dtype, group: Group) -> Tensor:
    """This process's part of a tensor that the first process of a group has; an exchange.

    Args:
        tensor: on the first process; None on the others.
        like: a sharded parameter of its shape.
        dtype: of the tensor.
        group: the processes.
    """
    assert isinstance(like, DTensor)
    size, device = _chunk(like), part(like).device
    own = torch.empty(size, *like.shape[1:], dtype=dtype, device=device)
    parts = None
    if tensor is not None:
        parts = [torch.zeros_like(own) for _ in range(group.size)]
        for rank, each in enumerate(parts):
            rows = tensor[rank * size : (rank + 1) * size]
            each[: len(rows)] = rows
    dist.scatter(own, parts, group=group.processes, group_src=0)
    rows_here = span(like)
    return own[: rows_here.stop - rows_here.start].clone()


def sum_over_parts(values: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Sums over coordinates: added up over the processes where the tensors that they are of are sharded.

    Args:
        values: sums over the coordinates of this process; left alone.
        tensors: what they are sums over; all sharded, or none.
    """
    if not any(isinstance(t, DTensor) for t in tensors):
        return values
    found = values.detach().clone()
    current().sum_([found])
    return found


def _axis(tensor: DTensor) -> int:
    (placement,) = tensor.placements
    assert isinstance(placement, Shard), placement
    return int(placement.dim)


def _chunk(tensor: DTensor) -> int:
    """Rows of the first process; the last may have fewer, or none."""
    return -(-tensor.shape[_axis(tensor)] // current().size)

"""The optimizer's state of an FSDP run, from what ``optimizer.state_dict()`` was on each process.

Numbers count ``module.parameters()``. FSDP2 keeps moments in pieces like weights (``DTensor``). FSDP1 keeps
them flat: the part of its flat parameter that a process has, of several parameters together
(``use_orig_params=False``, ``verl_units.py``) or of each by itself, if any of it lies there. Only moments
that go with their parameter number by number can be put together from pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.verl_shards import Grid, agreed, grid_of, joined
from stepscope.policy.checkpoint.formats.verl_units import units_of
from stepscope.policy.checkpoint.names import Names
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.registry import named_state

Entry = Mapping[str, Any]

_BLOCKWISE = ("state1", "qmap1", "absmax1")


def state_of_ranks(
    ranks: Sequence[Mapping[Any, Any]],
    grid: Grid,
    names: Sequence[str],
    model: nn.Module,
    *,
    where: str,
    dtype: torch.dtype | None,
) -> OptimizerState:
    """The state by name.

    Args:
        ranks: ``state_dict()`` of the optimizer on each process.
        grid: of the processes.
        names: of the weights as the training's model had them, in its order.
        model: the model, with ``requires_grad`` as in training.
        where: what to name in an error.
        dtype: type of the moments, as :func:`~stepscope.policy.optim.registry.named_state` takes it.

    Raises:
        CheckpointError: as :func:`~stepscope.policy.optim.registry.named_state`; the processes do not agree,
            or the moments are not those of this model's parameters.
    """
    groups, entries = _groups(ranks, where), _entries(ranks, where)
    order = _order(names, model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    kept = next((e for rank in entries for e in rank if e is not None), {})
    if any(key in kept for key in _BLOCKWISE):
        raise CheckpointError(
            f"{where}: moments of bitsandbytes in blocks, which are not put together from pieces; train with "
            "optimizer_impl=torch.optim optimizer=AdamW"
        )
    state: dict[str, dict[str, Any]] = {}
    if any(isinstance(value, DTensor) for value in kept.values()):
        if len(order) != len(entries):
            raise CheckpointError(
                f"{where}: the optimizer has {len(entries)} parameters, expected {len(order)} for this "
                "model; these are moments of another model, copy those that belong to these weights"
            )
        if grid_of([_tensors(saved) for saved in ranks], where) != grid:
            raise CheckpointError(
                f"{where}: moments and weights are shared among the processes in different ways; these are "
                "files of different runs, copy the checkpoint again"
            )
        for name, pieces in zip(order, entries, strict=True):
            if any(piece is not None for piece in pieces):
                state[name] = _whole(pieces, grid, f"{where}: {name}")
        units = [[name] for name in order]
    else:
        flat = [_flat(pieces, grid, f"{where}: entry {n}") for n, pieces in enumerate(entries)]
        sizes = [None if entry is None else _size(entry) for entry in flat]
        units = units_of(model, order, sizes, len(grid[0]), where=where)
        for unit, entry in zip(units, flat, strict=True):
            state |= {} if entry is None else _cut(entry, unit, shapes)
    of_group: list[list[str]] = []
    first = 0
    for group in groups:
        of_group.append([name for unit in units[first : first + len(group["params"])] for name in unit])
        first += len(group["params"])
    saved = [{**group, "params": own} for group, own in zip(groups, of_group, strict=True)]
    return named_state({"state": state, "param_groups": saved}, of_group, model, where=where, dtype=dtype)


def _groups(ranks: Sequence[Mapping[Any, Any]], where: str) -> list[dict[str, Any]]:
    """The groups, which are the same on every process and count through the parameters."""
    for rank, saved in enumerate(ranks):
        found, state = saved.get("param_groups"), saved.get("state")
        if not isinstance(found, list) or not found or not isinstance(state, Mapping):
            raise CheckpointError(
                f"{where}: the optimizer's file of process {rank} is not what state_dict() gives; copy it "
                "again"
            )
        if not _same(found, ranks[0]["param_groups"]):
            raise CheckpointError(
                f"{where}: the parameter groups of process {rank} are not those of process 0; copy the "
                "checkpoint again"
            )
    groups: list[dict[str, Any]] = ranks[0]["param_groups"]
    numbers = [n for g in groups if isinstance(g, Mapping) for n in g.get("params", ())]
    if numbers != list(range(len(numbers))) or not all(isinstance(g, Mapping) for g in groups):
        raise CheckpointError(
            f"{where}: the optimizer's parameters are not numbered through; copy the checkpoint again"
        )
    return groups


def _entries(ranks: Sequence[Mapping[Any, Any]], where: str) -> list[list[Entry | None]]:
    """Per number what each process keeps."""
    count = sum(len(group["params"]) for group in ranks[0]["param_groups"])
    for rank, saved in enumerate(ranks):
        for number, entry in saved["state"].items():
            if number not in range(count) or not isinstance(entry, Mapping):
                raise CheckpointError(
                    f"{where}: process {rank} has a state of parameter {number!s:.40}, expected one of "
                    f"{count}; copy the checkpoint again"
                )
    return [[saved["state"].get(number) for saved in ranks] for number in range(count)]


def _tensors(saved: Mapping[Any, Any]) -> dict[tuple[Any, Any], Any]:
    """All that a process keeps, by number and key."""
    return {(number, key): value for number, e in saved["state"].items() for key, value in e.items()}


def _order(names: Sequence[str], model: nn.Module) -> list[str]:
    """The model's parameters in the order that the training's model had them, as far as its weights tell."""
    known, own = Names.of(model), [name for name, _ in model.named_parameters()]
    found = [name for name in dict.fromkeys(known.own(n) for n in names) if name in set(own)]
    return [str(n) for n in found] if len(found) == len(own) else own


def _whole(pieces: Sequence[Entry | None], grid: Grid, where: str) -> dict[str, Any]:
    """What FSDP2 keeps of one parameter."""
    found = _complete(pieces, where)
    return {
        key: joined([entry[key] for entry in found], grid, f"{where} ({key})")[...]
        if isinstance(value, Tensor)
        else _common([entry[key] for entry in found], where)
        for key, value in found[0].items()
    }


def _flat(pieces: Sequence[Entry | None], grid: Grid, where: str) -> dict[str, Any] | None:
    """What FSDP1 keeps of one flat parameter or one parameter; None where no process has anything."""
    places = [[pieces[row[column]] for row in grid] for column in range(len(grid[0]))]
    if any((entry is None) != (place[0] is None) for place in places for entry in place):
        raise CheckpointError(f"{where}: some copies of its moments are missing; copy the checkpoint again")
    held = [_complete(place, where) for place in places if place[0] is not None]
    if not held:
        return None
    _complete([place[0] for place in held], where)
    found: dict[str, Any] = {}
    for key, value in held[0][0].items():
        if isinstance(value, Tensor) and value.dim():
            parts = [agreed([entry[key] for entry in place], f"{where} ({key})") for place in held]
            found[key] = torch.cat([part.reshape(-1) for part in parts])
        else:
            found[key] = _common([entry[key] for place in held for entry in place], f"{where} ({key})")
    return found


def _complete(pieces: Sequence[Entry | None], where: str) -> list[Entry]:
    """Entries of all processes with the same keys."""
    found = [entry for entry in pieces if entry is not None]
    if len(found) != len(pieces) or any(set(entry) != set(found[0]) for entry in found):
        raise CheckpointError(
            f"{where}: some processes lack a part of its moments; copy the checkpoint again"
        )
    return found


def _size(entry: Entry) -> int:
    """Numbers of each moment; where they differ no parameter has as many as the first."""
    sizes = {value.numel() for value in entry.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else -1


def _cut(entry: Entry, unit: Sequence[str], shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, Any]]:
    """The entries of the parameters that one flat entry is of; what is left over is padding."""
    found: dict[str, dict[str, Any]] = {}
    start = 0
    for name in unit:
        end = start + shapes[name].numel()
        found[name] = {
            key: value[start:end].view(shapes[name]) if isinstance(value, Tensor) and value.dim() else value
            for key, value in entry.items()
        }
        start = end
    return found


def _common(values: Sequence[Any], where: str) -> Any:
    if not all(_same(value, values[0]) for value in values):
        raise CheckpointError(
            f"{where}: the processes have different values of it; these are files of different steps, copy "
            "the checkpoint again"
        )
    return values[0]


def _same(one: Any, other: Any) -> bool:
    """Whether plain data with tensors in it is the same."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)

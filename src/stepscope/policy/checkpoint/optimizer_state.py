"""An optimizer's state as ``optimizer.pt`` keeps it, matched to the parameters of a model by name.

PyTorch saves optimizer state under running numbers; which number belongs to which name is found in
``parameter_order``. Every tensor's shape is verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.names import Names
from stepscope.policy.checkpoint.parameter_order import names_in_order
from stepscope.policy.checkpoint.pickles import ForbiddenClassError, read_tensors
from stepscope.policy.numerics.finiteness import real_number
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.registry import measurable, named_by, named_state, recognised, shape_of

OPTIMIZER_FILE = "optimizer.pt"
"""Name of the optimizer's file inside a checkpoint folder."""


@reads_foreign
def read_optimizer(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read an optimizer's ``state_dict()`` without unpickling anything but tensors and plain data.

    Args:
        path: the file.
        lazily: map it into memory instead of reading it.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than an optimizer's state.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no optimizer state, and a step cannot be rebuilt without it; save the run with "
            "save_only_model=False (the default), or point at a checkpoint folder that has it"
        )
    try:
        state = read_tensors(path, lazily=lazily)
    except ForbiddenClassError as error:
        raise CheckpointError(
            f"{path}: the optimizer state is not plain tensors ({named_by(error.names)}); {measurable()}"
        ) from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise CheckpointError(
            f"{path}: got {type(state).__name__} without 'state' and 'param_groups', expected what "
            "state_dict() of an optimizer gives; point at a checkpoint of the Hugging Face Trainer"
        )
    return state


def match_optimizer(
    saved: Mapping[str, Any], model: nn.Module, *, where: str, dtype: torch.dtype | None = None
) -> OptimizerState:
    """Give every tensor of a saved state its parameter's name.

    Args:
        saved: ``state_dict()`` of the optimizer.
        model: the model, with ``requires_grad`` as in training.
        where: what to name in an error, the optimizer's file.
        dtype: type of the moments, as :func:`~stepscope.policy.optim.registry.named_state` takes it.

    Raises:
        CheckpointError: as :func:`~stepscope.policy.optim.registry.named_state`, or no order of the model's
            parameters fits the state.
    """
    return named_state(saved, _names_by_group(saved, model, where), model, where=where, dtype=dtype)


def state_by_name(
    saved: Mapping[str, Any], model: nn.Module, *, where: str, dtype: torch.dtype | None = None
) -> OptimizerState:
    """The state that a file has under the names of parameters, as its training wrote them.

    Args:
        saved: ``state`` by name, and ``param_groups`` whose ``params`` are those names, with whatever
            wrappers have put into them (:class:`~stepscope.policy.checkpoint.names.Names`).
        model: the model.
        where: what to name in an error.
        dtype: type of the moments, as :func:`~stepscope.policy.optim.registry.named_state` takes it.

    Raises:
        CheckpointError: as :func:`~stepscope.policy.optim.registry.named_state`, or a name is none of the
            model's, is there twice, or has a state and is in no group.
    """
    recognised(saved, where)  # before its groups are looked into
    groups = saved["param_groups"]
    grouped = {name for group in groups for name in group["params"]}
    if stray := sorted(map(str, set(saved["state"]) - grouped)):
        raise CheckpointError(
            f"{where}: {stray[0]} has a state and is in no parameter group; the file is damaged, copy it "
            "again"
        )
    names = _own_names(
        [group["params"] for group in groups], model, where, {n for n, _ in model.named_parameters()}
    )
    return named_state(saved, names, model, where=where, dtype=dtype)


def _own_names(
    named: Sequence[Sequence[Any]], model: nn.Module, where: str, possible: Set[str]
) -> list[list[str]]:
    """The model's own names of what groups name, each once and out of those that are possible."""
    known = Names.of(model)
    found: list[list[str]] = []
    seen: dict[str, str] = {}
    for group in named:
        found.append([])
        for name in map(str, group):
            own = known.own(name)
            if own is None or own not in possible:
                raise CheckpointError(
                    f"{where}: the optimizer has {name}, which is no trainable parameter of the model; "
                    "this is the optimizer state of another model, copy the one that belongs to these "
                    "weights"
                )
            if own in seen:
                raise CheckpointError(
                    f"{where}: {seen[own]} and {name} are one parameter of the model; the file is damaged, "
                    "copy it again"
                )
            seen[own] = name
            found[-1].append(own)
    return found


def _names_by_group(saved: Mapping[str, Any], model: nn.Module, where: str) -> list[list[str]]:
    """Parameter names of each group in the order of its numbers."""
    kind, entries = recognised(saved, where)
    groups = saved["param_groups"]
    if all("param_names" in group for group in groups):
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        return _own_names([group["param_names"] for group in groups], model, where, trainable)
    shapes = [
        [shape_of(kind, entries[n]) if n in entries else None for n in group["params"]] for group in groups
    ]
    lrs = [real_number(group["lr"], "lr of a parameter group", where) for group in groups]
    return names_in_order(shapes, lrs, model, where=where)

"""An optimizer's state as ``optimizer.pt`` keeps it, matched to the parameters of a model by name.

PyTorch saves optimizer state under running numbers; which number belongs to which name is found in
``parameter_order``. Every tensor's shape is verified.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import reads_foreign, refuse_packed
from stepscope.policy.checkpoint.parameter_order import names_in_order
from stepscope.policy.numerics.finiteness import real_number
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.registry import measurable, named_by, named_state, recognised, shape_of

OPTIMIZER_FILE = "optimizer.pt"
"""Name of the optimizer's file inside a checkpoint folder."""

_WRAPPERS = re.compile(r"(?:^|\.)(?:module|_orig_mod)(?=\.)")


@reads_foreign
def read_optimizer(path: Path) -> dict[str, Any]:
    """Read ``optimizer.pt`` without unpickling anything but tensors and plain data.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than an optimizer's state.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no optimizer state, and a step cannot be rebuilt without it; save the run with "
            "save_only_model=False (the default), or point at a checkpoint folder that has it"
        )
    refuse_packed(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and (classes := _classes_in(path)):
            raise CheckpointError(
                f"{path}: the optimizer state is not plain tensors ({named_by(classes)}); {measurable()}"
            ) from error
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: the optimizer state is damaged or not plain tensors ({reason}); copy the file again"
        ) from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise CheckpointError(
            f"{path}: got {type(state).__name__} without 'state' and 'param_groups', expected what "
            "state_dict() of an optimizer gives; point at a checkpoint of the Hugging Face Trainer"
        )
    return state


def _classes_in(path: Path) -> list[str]:
    """The classes that a file needs beside tensors, found without running it; none where it is damaged."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
        return []


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


def _names_by_group(saved: Mapping[str, Any], model: nn.Module, where: str) -> list[list[str]]:
    """Parameter names of each group in the order of its numbers."""
    kind, entries = recognised(saved, where)
    groups = saved["param_groups"]
    if all("param_names" in group for group in groups):
        named = [[_WRAPPERS.sub("", n).lstrip(".") for n in group["param_names"]] for group in groups]
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        unknown = [n for names in named for n in names if n not in trainable]
        if unknown:
            raise CheckpointError(
                f"{where}: the optimizer has {unknown[0]}, which is no trainable parameter of the model; "
                "this is the optimizer state of another model, copy the one that belongs to these "
                "weights"
            )
        return named
    shapes = [
        [shape_of(kind, entries[n]) if n in entries else None for n in group["params"]] for group in groups
    ]
    lrs = [real_number(group["lr"], "lr of a parameter group", where) for group in groups]
    return names_in_order(shapes, lrs, model, where=where)

"""AdamW's state as a checkpoint keeps it, matched to the parameters of a model by name.

PyTorch saves optimizer state under running numbers; which number belongs to which name is found in
``parameter_order``. Every tensor's shape is verified.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import reads_foreign, refuse_packed
from stepscope.policy.checkpoint.layouts import missing_state
from stepscope.policy.checkpoint.optimizer_class import MEASURABLE, adamw_entries, made_by_torch, named_by
from stepscope.policy.checkpoint.parameter_order import names_in_order
from stepscope.policy.finiteness import real_number, refuse_impossible_state, whole_number
from stepscope.policy.state import OptimizerState, ParameterGroup

OPTIMIZER_FILE = "optimizer.pt"
"""Name of the optimizer's file inside a checkpoint folder."""

_WRAPPERS = re.compile(r"(?:^|\.)(?:module|_orig_mod)(?=\.)")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@reads_foreign
def read_optimizer(path: Path) -> dict[str, Any]:
    """Read ``optimizer.pt`` without unpickling anything but tensors and plain data.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than an optimizer's state.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {missing_state(path.parent)}")
    refuse_packed(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and (classes := _classes_in(path)):
            raise CheckpointError(
                f"{path}: the optimizer state is not plain tensors ({named_by(classes)}); {MEASURABLE}"
            ) from error
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: the optimizer state is damaged or not plain tensors ({reason}); copy the file again"
        ) from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise CheckpointError(
            f"{path}: got {type(state).__name__} without 'state' and 'param_groups', expected what "
            "torch.optim.AdamW.state_dict() gives; point at a checkpoint of the Hugging Face Trainer"
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
    """Give every tensor of a saved AdamW state its parameter's name.

    Args:
        saved: ``state_dict()`` of the optimizer.
        model: the model, with ``requires_grad`` as in training.
        where: what to name in an error, the optimizer's file.
        dtype: type of the moments; None leaves bfloat16 and float16 at float32 and wider ones as they are.

    Returns:
        The state on the devices of the parameters. A parameter without state got no gradient in the whole
        run; it is left out of the groups.

    Raises:
        CheckpointError: another optimizer than AdamW, another model, a shape that does not fit, no state
        at all, or one that AdamW cannot have reached.
    """
    groups = saved["param_groups"]
    entries = adamw_entries(saved, where)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names_by_group = _names_by_group(groups, entries, model, list(params), where)
    found: dict[str, dict[str, Tensor]] = {key: {} for key in (*_MOMENTS, "max_exp_avg_sq")}
    steps: dict[str, int] = {}
    types: dict[str, torch.dtype] = {}
    for group, names in zip(groups, names_by_group, strict=True):
        for number, name in zip(group["params"], names, strict=True):
            entry = entries.get(number)
            if entry is None:
                continue
            _check_entry(entry, name, params[name], bool(group.get("amsgrad")), where)
            steps[name] = whole_number(entry["step"], f"step of {name}", where)
            if made_by_torch(group):
                types[name] = entry["exp_avg"].dtype
            for key in found:
                if key in entry:
                    found[key][name] = _moment(entry[key], params[name].device, dtype)
    if not steps:
        raise CheckpointError(
            f"{where}: there is no state for any of {len(params)} parameters (an optimizer before its "
            "first step); use a checkpoint saved after at least one step"
        )
    state = OptimizerState(
        groups=tuple(
            _parameter_group(group, [n for n in names if n in steps], where)
            for group, names in zip(groups, names_by_group, strict=True)
        ),
        exp_avg=found["exp_avg"],
        exp_avg_sq=found["exp_avg_sq"],
        steps=steps,
        max_exp_avg_sq=found["max_exp_avg_sq"],
        moment_types=types,
    )
    refuse_impossible_state(state, where)
    return state


def _names_by_group(
    groups: Sequence[Mapping[str, Any]],
    entries: Mapping[Any, Mapping[str, Any]],
    model: nn.Module,
    trainable: list[str],
    where: str,
) -> list[list[str]]:
    """Parameter names of each group in the order of its numbers."""
    if all("param_names" in group for group in groups):
        named = [[_WRAPPERS.sub("", n).lstrip(".") for n in group["param_names"]] for group in groups]
        unknown = [n for names in named for n in names if n not in trainable]
        if unknown:
            raise CheckpointError(
                f"{where}: the optimizer has {unknown[0]}, which is no trainable parameter of the model; "
                "this is the optimizer state of another model, copy the one that belongs to these "
                "weights"
            )
        return named
    shapes = [
        [tuple(entries[n]["exp_avg"].shape) if n in entries else None for n in group["params"]]
        for group in groups
    ]
    lrs = [real_number(group["lr"], "lr of a parameter group", where) for group in groups]
    return names_in_order(shapes, lrs, model, where=where)


def _check_entry(entry: Mapping[str, Any], name: str, param: Tensor, amsgrad: bool, where: str) -> None:
    if amsgrad and "max_exp_avg_sq" not in entry:
        raise CheckpointError(f"{where}: AMSGrad state of {name} lacks max_exp_avg_sq; copy the file again")
    for key in (*_MOMENTS, *(["max_exp_avg_sq"] if amsgrad else [])):
        if tuple(entry[key].shape) != tuple(param.shape):
            raise CheckpointError(
                f"{where}: {key} of {name} has shape {tuple(entry[key].shape)}, expected "
                f"{tuple(param.shape)}; this is the optimizer state of another model, copy the one that "
                "belongs to these weights"
            )


def _moment(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    return tensor.to(device=device, dtype=dtype)


def _parameter_group(group: Mapping[str, Any], names: list[str], where: str) -> ParameterGroup:
    def number(key: str, value: object) -> float:
        return real_number(value, f"{key} of a parameter group", where)

    decay = number("weight_decay", group.get("weight_decay", 0.0))
    if decay and not group.get("decoupled_weight_decay", True):
        raise CheckpointError(
            f"{where}: Adam with weight decay {decay} inside the gradient, expected AdamW (decoupled "
            "decay); only AdamW can be measured"
        )
    if group.get("maximize"):
        raise CheckpointError(f"{where}: the optimizer maximizes, expected one that minimizes a loss")
    betas = group.get("betas")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise CheckpointError(f"{where}: a parameter group has no two betas, expected AdamW's; copy it again")
    return ParameterGroup(
        names=tuple(names),
        lr=number("lr", group.get("lr")),
        betas=(number("betas", betas[0]), number("betas", betas[1])),
        eps=number("eps", group.get("eps")),
        weight_decay=decay,
        amsgrad=bool(group.get("amsgrad")),
        foreach=group.get("foreach"),
        fused=group.get("fused"),
    )

"""A second model on the parts that a training under FSDP2 holds, to measure with while that stands still.

A training's own FSDP2 has its cutting into units, its mixed precision, its hooks and its exchanges, and a
measurement that went through them could leave traces. A twin has the training's modules and none of that: it
is sharded anew by stepscope's own means (:mod:`stepscope.policy.sharding`), with exchanges of a group of its
own, and its parts are the training's tensors, so that it takes no memory for them (but for parameters whose
rows the processes do not divide evenly, of which FSDP2 keeps a padded copy).
"""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from stepscope.errors import MeasurementError
from stepscope.policy.group import Group
from stepscope.policy.sharding import shard_model
from stepscope.policy.shards import is_sharded, of_parts, part, span

_LEFT_OUT = {
    STATE_KEY,
    REGISTRY_KEY,
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "forward",  # accelerate's and TRL's
    "_original_forward",
    "generate",  # transformers'
    "_output_capturing_hooks_installed",  # which a twin has not
}
"""What wrappers put into a module beside its class's own attributes."""


def is_cut(model: nn.Module) -> bool:
    """Whether other processes hold parts of a training's model."""
    return any(map(is_sharded, model.parameters()))


def on_device(model: nn.Module) -> str:
    """The kind of device that a training's parts are on."""
    return next(part(p).device.type for p in model.parameters())


def twin_of(model: nn.Module, group: Group) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A model like one that is trained under FSDP2, on the same parts of parameters.

    Where the training changes its parts, make another one.

    Args:
        model: the training's; left alone. All processes call this, outside of its passes.
        group: with ``lockstep``; entered.

    Returns:
        The twin, in evaluation mode, and the training's parameters by the names that they have in it.

    Raises:
        MeasurementError: parameters are held in another way than cut by rows among all processes, one part on
            each one's own device.
    """
    memo: dict[int, Any] = {}
    made = _shell(model, memo)
    own: dict[str, nn.Parameter] = {}
    by_id = {id(memo[id(p)]): p for p in model.parameters()}
    for name, blank in made.named_parameters():
        parameter = own[name] = by_id[id(blank)]
        _require_rows(name, parameter, group)
    devices = {part(p).device for p in own.values()}
    if len(devices) > 1 or (group.device is not None and group.device not in devices):
        raise MeasurementError(
            f"the training keeps its parts on {', '.join(sorted(map(str, devices)))}, expected the device "
            "that computes; probe a training that does not offload its parameters"
        )
    shard_model(made, group, next(iter(devices)))
    parts = {id(p): part(own[n]) for n, p in made.named_parameters()}
    made._apply(lambda t: of_parts(parts[id(t)], t) if id(t) in parts else t)  # type: ignore[no-untyped-call]
    for name, parameter in made.named_parameters():
        if span(parameter).stop - span(parameter).start != len(part(own[name])):
            raise MeasurementError(
                f"{name}: the training holds {len(part(own[name]))} rows here, expected {span(parameter)}; "
                "probe a training that is cut by FSDP2 alone"
            )
    return made.eval(), own


def _require_rows(name: str, parameter: nn.Parameter, group: Group) -> None:
    """Refuse a parameter that is not cut as FSDP2 cuts it by default."""
    how = "whole"
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        if parameter.placements == (Shard(0),) and mesh.size() == group.size:
            return
        how = f"{parameter.placements} over {mesh.shape}"
    raise MeasurementError(
        f"the training holds {name} as {how}, expected rows of it on each of {group.size} processes; probe a "
        "training under FSDP2 alone, without hybrid sharding, tensor parallelism or ignored modules"
    )


def _shell(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A module's structure without wrappers and hooks; parameters are empty, and known by ``memo``."""
    if isinstance(module, CheckpointWrapper):
        return _shell(cast(nn.Module, module._checkpoint_wrapped_module), memo)
    if id(module) in memo:
        shell: nn.Module = memo[id(module)]
        return shell
    kind = next(k for k in type(module).__mro__ if not issubclass(k, FSDPModule))
    made = cast(nn.Module, kind.__new__(kind))
    memo[id(module)] = made
    kept = {name: value for name, value in vars(module).items() if name not in _LEFT_OUT}
    kept |= {name: OrderedDict() for name in kept if name.endswith("_hooks") or "_hooks_" in name}
    kept["_parameters"] = {name: _blank(p, memo) for name, p in module._parameters.items()}
    kept["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    kept["_modules"] = {name: c if c is None else _shell(c, memo) for name, c in module._modules.items()}
    made.__dict__.update(kept)
    for name, value in kept.items():  # PEFT keeps a method of its base
        if isinstance(value, MethodType) and id(value.__self__) in memo:
            made.__dict__[name] = MethodType(value.__func__, memo[id(value.__self__)])
    return made


def _blank(parameter: nn.Parameter | None, memo: dict[int, Any]) -> nn.Parameter | None:
    if parameter is None:
        return None
    if id(parameter) not in memo:
        empty: Tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    found: nn.Parameter = memo[id(parameter)]
    return found

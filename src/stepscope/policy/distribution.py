"""Policies dealt out over processes: the first one loads, and each keeps its parts of parameters and moments.

What a checkpoint's files hold is read, checked and tried out by the first process, in its main memory, as for
a measurement alone. The others are told how the model is built, without a number in it, and then each tensor
is dealt out by itself: they never hold more than their parts and one part besides, and no device holds more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from stepscope.errors import MeasurementError
from stepscope.policy.checkpoint.adapters import base_is_rewritten
from stepscope.policy.group import Group
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.by_parameter import AsWhole, ByParameter
from stepscope.policy.sharding import shard_model
from stepscope.policy.shards import dealt, of_parts, part
from stepscope.policy.state import Policy


@dataclass
class _Numbers:
    """What a policy holds on the first process, to be dealt out; nothing on the others."""

    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]


def dealt_out(make: Callable[[], Policy], group: Group, device: torch.device) -> Policy:
    """A policy of which each process of a group holds a part.

    Args:
        make: loads it, in main memory; called by the first process.
        group: with ``lockstep``.
        device: where this process computes.

    Raises:
        MeasurementError: parameters or an optimizer that cannot be cut.
    """
    numbers = _Numbers({}, {})

    def emptied() -> Policy:
        policy = make()
        refuse_uncuttable(policy)
        numbers.parameters = _emptied(policy.model)
        state = policy.optimizer
        if state is None:
            return policy
        numbers.moments = {key: dict(by_name) for key, by_name in _moments(state).items()}
        blank = {
            key: {name: tensor.to("meta") for name, tensor in by_name.items()}
            for key, by_name in numbers.moments.items()
        }
        return replace(policy, optimizer=_with(state, blank))

    policy = group.from_main(emptied)
    for module in policy.model.modules():
        if isinstance(
            module, PreTrainedModel
        ):  # transformers looks hidden states up by the model that was built
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
    shard_model(policy.model, group, device)
    policy.model._apply(  # type: ignore[no-untyped-call]
        lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device)
    )
    for name, parameter in policy.model.named_parameters():
        part(parameter).copy_(dealt(numbers.parameters.pop(name, None), parameter, parameter.dtype, group))
    state = policy.optimizer
    if state is None:
        return policy
    own = policy.parameters

    def rows(key: str, name: str, like: Tensor) -> Tensor:
        return dealt(numbers.moments.get(key, {}).pop(name, None), own[name], like.dtype, group)

    return replace(policy, optimizer=held_in_parts(state, own, rows))


def held_in_parts(
    state: OptimizerState,
    parameters: Mapping[str, Tensor],
    rows: Callable[[str, str, Tensor], Tensor] = lambda key, name, own: own,
) -> OptimizerState:
    """An optimizer's state whose moments are held as their parameters are.

    Args:
        state: what says which moments there are.
        parameters: sharded, by name.
        rows: a moment's field, its parameter and what ``state`` has of it to the part of this process; that
            itself by default.
    """
    found = {
        key: {name: of_parts(rows(key, name, own), parameters[name]) for name, own in by_name.items()}
        for key, by_name in _moments(state).items()
    }
    return _with(state, found)


def bytes_held(policy: Policy) -> int:
    """What parameters and moments take on this process."""
    moments = [
        t
        for by_name in (policy.optimizer.tensors().values() if policy.optimizer else ())
        for t in by_name.values()
    ]
    return sum(part(t).nbytes for t in (*policy.model.parameters(), *moments))


def refuse_uncuttable(policy: Policy) -> None:
    """Refuse a policy whose step cannot be made of parts of parameters.

    Raises:
        MeasurementError: what stands against it.
    """
    state = policy.optimizer
    if state is not None and (isinstance(state, AsWhole) or not isinstance(state, ByParameter)):
        raise MeasurementError(
            f"{state.label} makes its step of whole parameters, and --shard cuts them; measure without it"
        )
    if state is not None and state.codes:
        raise MeasurementError(
            f"{state.label} keeps moments in blocks of 8 bits, and --shard cuts them; measure without --shard"
        )
    if base_is_rewritten(policy.model):
        raise MeasurementError(
            "the adapter's initialisation rewrote the base, which is held twice for that; measure without "
            "--shard"
        )


def _moments(state: OptimizerState) -> dict[str, Mapping[str, Tensor]]:
    """What a state keeps of parameters, by the name of its field."""
    kept = {id(by_name) for by_name in state.tensors().values()}
    return {f.name: value for f in fields(state) if id(value := getattr(state, f.name)) in kept}


def _with(state: OptimizerState, tensors: Mapping[str, Mapping[str, Tensor]]) -> OptimizerState:
    """A state with other tensors, by the names of its fields."""
    chosen: dict[str, Any] = dict(tensors)
    return replace(state, **chosen)


def _emptied(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, which it then has no numbers of; buffers stay."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    blank: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for attribute, own in module._parameters.items():
            if own is not None:
                if id(own) not in blank:
                    blank[id(own)] = nn.Parameter(own.detach().to("meta"), requires_grad=own.requires_grad)
                module._parameters[attribute] = blank[id(own)]
    return found

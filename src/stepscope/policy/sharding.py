"""Models too large for one process: parameters sharded by FSDP2, gathered a layer at a time while it runs.

Each transformer layer is a unit of ``torch.distributed.fsdp.fully_shard``, and what is around them
(embeddings, last norm, head) one more, the root. FSDP2 gathers a unit's parameters before its forward and its
backward pass and gives them up afterwards; gradients come back summed over the processes and sharded.

There is no forward mode through FSDP2 itself. But while a unit runs, its parameters are plain tensors, and a
hook after FSDP2's puts others in their place: ``own + lr * direction``, with the direction gathered for this
unit alone. Every layer's own code then computes with them, in forward mode as well as it can without FSDP2,
nested too. (Pinned by ``tests/test_sharded_measure.py``: the same to round-off as one process.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stepscope.errors import MeasurementError
from stepscope.policy.group import Group, current
from stepscope.policy.head import replaying
from stepscope.policy.shards import whole
from stepscope.policy.vectors import ParameterVector

Change = Callable[[str, Tensor], Tensor]
"""A parameter's name and its own value to the value that is used in its place."""

Slot = tuple[nn.Module, str, str]
"""A module, its attribute, and the parameter that is there."""


@dataclass
class Sharded:
    """A model in units, and what its parameters are replaced by while it runs.

    Attributes:
        root: the module that holds what belongs to no layer.
        slots: of each unit, where its parameters are.
        change: what is in force, innermost last.
    """

    root: nn.Module
    slots: dict[nn.Module, list[Slot]]
    change: list[Change] = field(default_factory=list)
    _kept: dict[nn.Module, list[tuple[nn.Module, str, Any]]] = field(default_factory=dict)

    def put(self, unit: nn.Module) -> None:
        """Replace a gathered unit's parameters as the change in force says."""
        if not self.change or unit in self._kept:
            return
        kept, made = self._kept.setdefault(unit, []), dict[str, Tensor]()
        for module, attribute, name in self.slots[unit]:
            own = module._parameters[attribute]
            assert own is not None
            if name not in made:
                made[name] = self.change[-1](name, own)
            kept.append((module, attribute, own))
            module._parameters[attribute] = made[name]  # type: ignore[assignment]

    def put_back(self, unit: nn.Module) -> None:
        """Undo :meth:`put`."""
        for module, attribute, own in self._kept.pop(unit, ()):
            module._parameters[attribute] = own

    def gather_root(self) -> None:
        """The root's parameters are there, whichever of its parts is called."""
        self.root.unshard()  # type: ignore[operator]

    def release_root(self) -> None:
        """Only the own parts of the root's parameters are there, unless a backward pass is using them."""
        if replaying():
            return
        self.root.reshard()  # type: ignore[operator]


_MESH = "stepscope"
"""Sets its meshes apart from those of a training on the same processes: torch keeps layouts by mesh."""

_MARK = "_sharded_by_stepscope"
"""Attribute of a root; wrappers of a model hand it on."""


def sharded(model: nn.Module) -> Sharded | None:
    """How a model is sharded; None where it is whole."""
    found: Sharded | None = getattr(model, _MARK, None)
    return found


def shard_model(model: nn.Module, group: Group, device: torch.device) -> None:
    """Cut a model's parameters into parts, one for each process of a group, in place.

    Args:
        model: a transformers model, adapted or not; the same on all processes.
        group: with ``lockstep``.
        device: where this process computes.

    Raises:
        MeasurementError: the model has parameters that cannot be cut.
    """
    unwrap = getattr(model, "get_base_model", None)
    root: nn.Module = model if unwrap is None else unwrap()
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {id(p) for p in root.parameters()}
    for number, name in names.items():
        if number not in inside:
            raise MeasurementError(
                f"{name} is outside of the model itself and cannot be sharded; measure without --shard"
            )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise MeasurementError(
                f"{name} is a single number and cannot be sharded; measure without --shard"
            )
    units = _layers(root)
    slots = {unit: _slots(unit, units, names) for unit in (*units, root)}
    mesh = DeviceMesh.from_group(group.processes, device.type, mesh_dim_names=(_MESH,))
    for unit in (*units, root):
        fully_shard(unit, mesh=mesh)
    found = Sharded(root, slots)
    for unit in units:
        unit.register_forward_pre_hook(lambda module, _: found.put(module))
        unit.register_forward_hook(lambda module, *_: found.put_back(module), prepend=True)
    for unit in (*units, root):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(enable=True)  # gloo has no product with a factor in float32
    setattr(root, _MARK, found)


def _layers(root: nn.Module) -> list[nn.Module]:
    """The layers that transformers says are not to be split, or the members of the longest module list."""
    kinds = set(getattr(root, "_no_split_modules", None) or ())
    found = [m for m in root.modules() if type(m).__name__ in kinds]
    if not found:
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList)]
        found = list(max(lists, key=len, default=()))
    return [m for m in found if any(True for _ in m.parameters())]


def _slots(unit: nn.Module, units: list[nn.Module], names: Mapping[int, str]) -> list[Slot]:
    """Where a unit's own parameters are, those of units inside left out."""
    others = {id(u) for u in units if u is not unit}
    found: list[Slot] = []
    waiting = [unit]
    while waiting:
        module = waiting.pop()
        found += [(module, a, names[id(p)]) for a, p in module._parameters.items() if p is not None]
        waiting += [child for child in module.children() if id(child) not in others]
    return found


@dataclass(frozen=True)
class Replaced:
    """Other values of some parameters, made of their own where and when they are needed.

    Attributes:
        names: of which parameters.
        change: what makes them, in differentiable operations.
    """

    names: frozenset[str]
    change: Change

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """All of them at once, of a whole model."""
        return {n: self.change(n, p.detach()) for n, p in model.named_parameters() if n in self.names}

    def in_units(self, name: str, own: Tensor) -> Tensor:
        """One of them, of a parameter of a sharded model that is gathered."""
        return self.change(name, own.detach()) if name in self.names else own.detach()


def along(direction: ParameterVector, lr: Tensor) -> Replaced:
    """The parameters at ``params + lr * direction``."""

    def change(name: str, own: Tensor) -> Tensor:
        return own + lr * whole(direction[name]).to(own)

    return Replaced(frozenset(direction), change)


def with_tangent(direction: ParameterVector) -> Replaced:
    """The parameters as dual numbers that move along a direction (``torch.autograd.forward_ad``)."""

    def change(name: str, own: Tensor) -> Tensor:
        dual: Tensor = forward_ad.make_dual(own, whole(direction[name]).to(own))  # type: ignore[no-untyped-call]
        return dual

    return Replaced(frozenset(direction), change)


@contextmanager
def changed(model: nn.Module, change: Change) -> Iterator[None]:
    """A block in which a sharded model runs with other values of its parameters."""
    found = sharded(model)
    assert found is not None
    found.change.append(change)
    try:
        yield
    finally:
        found.change.pop()
        for unit in list(found._kept):
            found.put_back(unit)


def still(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which no derivative is taken with respect to a sharded model's parameters."""
    return nullcontext() if sharded(model) is None else changed(model, lambda _, own: own.detach())


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """A block in which parts of a sharded model may be called one by one; nothing for a whole one."""
    found = sharded(model)
    if found is None:
        yield
        return
    found.gather_root()
    found.put(found.root)
    try:
        yield
    finally:
        found.put_back(found.root)


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """A block after which a sharded model holds no more than its parts again; nothing for a whole one."""
    try:
        yield
    finally:
        if (found := sharded(model)) is not None:
            found.release_root()


def pulled_back(
    model: nn.Module, value: Tensor, parameters: Sequence[Tensor], *, same: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradients of a number in a model's parameters; None where it does not depend on one.

    Of a sharded model all processes take part, and the number is the sum of theirs.

    Args:
        model: whose parameters they are.
        value: the number.
        parameters: in which.
        same: all processes have the same number, which then counts once.
    """
    if sharded(model) is None:
        return torch.autograd.grad(value, list(parameters), allow_unused=True)
    value.backward()  # type: ignore[no-untyped-call]
    times = current().size if same else 1
    found = tuple(None if p.grad is None else p.grad / times for p in parameters)
    for parameter in parameters:
        parameter.grad = None
    return found

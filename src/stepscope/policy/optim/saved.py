"""What a file has of an optimizer: by which keys it is known, its groups, and its parameters' entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.numerics.finiteness import real_number, whole_number
from stepscope.policy.numerics.precision import HALF_TYPES, type_name

_ANOTHER_MODEL = "this is the optimizer state of another model, copy the one that belongs to these weights"


@dataclass(frozen=True)
class ParameterGroup:
    """Hyperparameters of the named parameters of one group; optimizers add their own.

    Attributes:
        names: of the parameters.
        lr: learning rate of the *next* step, as the scheduler has it, or left it in the optimizer's state.
        weight_decay: decoupled from the gradient, or as the optimizer has it.
        initial_lr: the one that the schedule started from, where the state says so.
        saved_lr: the one in the optimizer's state, where the scheduler's is another.
    """

    names: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0
    initial_lr: float | None = None
    saved_lr: float | None = None

    def ratio(self, lr: float) -> float:
        """The factor of the group's parts of a direction that is per unit of ``lr``."""
        return self.lr / lr if lr > 0 else 1.0

    @property
    def fractions(self) -> dict[str, float]:
        """Hyperparameters that are at least 0 and below 1."""
        return {}

    @property
    def sizes(self) -> dict[str, float]:
        """Hyperparameters that are finite and at least 0."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    @property
    def problem(self) -> str:
        """What is out of range, or ""."""
        for name, value in self.fractions.items():
            if not 0 <= value < 1:
                return f"{name} is {value}, expected at least 0 and below 1"
        for name, value in self.sizes.items():
            if not 0 <= value < math.inf:
                return f"{name} is {value}, expected finite and at least 0"
        return ""


@dataclass(frozen=True)
class Keys:
    """By what a state is known: the keys of its groups and of its parameters' entries.

    Attributes:
        group: of every group.
        group_optional: of some.
        entry: of every parameter's entry; tensors, but for ``step``.
        entry_optional: of some.
    """

    group: frozenset[str]
    entry: frozenset[str]
    group_optional: frozenset[str] = frozenset()
    entry_optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group as a file has it, its parameters named.

    Attributes:
        settings: hyperparameters by key.
        names: of those of its parameters that have a state.
        where: what to name in an error.
    """

    settings: Mapping[str, Any]
    names: tuple[str, ...]
    where: str

    def number(self, key: str, value: object = None) -> float:
        """A hyperparameter, or a part of one.

        Raises:
            CheckpointError: it is no number.
        """
        given = self.settings.get(key) if value is None else value
        return real_number(given, f"{key} of a parameter group", self.where)

    def pair(self, key: str) -> Sequence[Any]:
        """A hyperparameter of two parts.

        Raises:
            CheckpointError: it has not two.
        """
        given = self.settings.get(key)
        if not isinstance(given, Sequence) or len(given) != 2:
            raise CheckpointError(f"{self.where}: a parameter group has no two {key}; copy the file again")
        return given

    @property
    def betas(self) -> tuple[float, float]:
        """B1 and b2.

        Raises:
            CheckpointError: they are not two numbers.
        """
        first, second = self.pair("betas")
        return self.number("betas", first), self.number("betas", second)

    @property
    def shared(self) -> dict[str, Any]:
        """The fields of :class:`ParameterGroup`.

        Raises:
            CheckpointError: a learning rate or a decay is no number.
        """
        decay, initial = self.settings.get("weight_decay", 0.0), self.settings.get("initial_lr")
        return {
            "names": self.names,
            "lr": self.number("lr"),
            "weight_decay": real_number(decay, "weight_decay of a parameter group", self.where),
            "initial_lr": self.number("initial_lr") if initial else None,
        }


@dataclass(frozen=True)
class SavedState:
    """An optimizer's state as a file has it, its parameters named.

    Attributes:
        groups: in the optimizer's order.
        entries: by name of the parameter, under the optimizer's keys.
        parameters: of the model.
        where: what to name in an error.
        dtype: type of the tensors; None leaves bfloat16 and float16 at float32, wider ones as they are.
    """

    groups: Sequence[SavedGroup]
    entries: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Tensor]
    where: str
    dtype: torch.dtype | None

    def tensors(
        self, key: str, shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    ) -> dict[str, Tensor]:
        """What entries have under a key, on the devices of their parameters.

        Args:
            key: of the entries.
            shape: of a tensor, given that of its parameter.

        Raises:
            CheckpointError: a shape is that of another model.
        """
        found = {}
        for name, entry in self.entries.items():
            if key not in entry:
                continue
            tensor, parameter = entry[key], self.parameters[name]
            if tuple(tensor.shape) != (expected := shape(tuple(parameter.shape))):
                raise CheckpointError(
                    f"{self.where}: {key} of {name} has shape {tuple(tensor.shape)}, expected {expected}; "
                    f"{_ANOTHER_MODEL}"
                )
            dtype = self.dtype
            if dtype is None:
                dtype = torch.float32 if type_name(tensor.dtype) in HALF_TYPES else tensor.dtype
            found[name] = tensor.to(device=parameter.device, dtype=dtype)
        return found

    def steps(self) -> dict[str, int]:
        """Steps taken, by parameter.

        Raises:
            CheckpointError: something that is no whole number.
        """
        return {
            name: whole_number(entry["step"], f"step of {name}", self.where)
            for name, entry in self.entries.items()
            if "step" in entry
        }

    def types(self, key: str) -> dict[str, torch.dtype]:
        """Types of what entries have under a key, by parameter."""
        return {name: entry[key].dtype for name, entry in self.entries.items() if key in entry}

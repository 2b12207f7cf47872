"""What a measurement needs of an optimizer, whichever it is.

An optimizer is a subclass of :class:`OptimizerState` in a file of its own, and an entry in
:data:`stepscope.policy.optim.registry.OPTIMIZERS`. It says by which keys its state is known in a file, reads
the state once parameters have names, splits the step it would take, and takes it in its library's own way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.numerics.finiteness import MOST_STEPS, first_not_finite
from stepscope.policy.numerics.precision import HALF_TYPES, type_name
from stepscope.policy.optim.block_codes import BlockCodes
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedState
from stepscope.policy.optim.slope import Slope
from stepscope.policy.vectors import ParameterVector, multiply
from stepscope.results import Brief

Through = Literal["fixed", "optimizer"]
"""What a share of a step goes through: P and c as they are, or as they answer to the gradient."""

THROUGHS: tuple[Through, ...] = ("fixed", "optimizer")

_DAMAGED = "the file is damaged, copy it again"


@dataclass(frozen=True)
class Update:
    """What an optimizer makes of a gradient: parts of (params' - params) / lr.

    Attributes:
        parts: by component name, what is there without the gradient, such as ``momentum`` and ``decay``.
        preconditioner: P, elementwise, from -grad Loss before clipping to the gradient's own part; None where
            no such P is that part's.
        own: the gradient's own part, the step less ``parts``, where there is no P.
    """

    parts: dict[str, dict[str, Tensor]]
    preconditioner: dict[str, Tensor] | None
    own: dict[str, Tensor] | None = None

    def made_of(self, ascent: ParameterVector) -> dict[str, Tensor]:
        """The part of the -grad Loss before clipping that this is the update of."""
        if self.preconditioner is not None:
            return multiply(self.preconditioner, ascent)
        assert self.own is not None
        return self.own


@dataclass(frozen=True, repr=False, kw_only=True)
class OptimizerState(Brief, ABC):
    """An optimizer's state before a step, matched to parameters by name, and the step that it takes.

    Attributes:
        groups: parameter groups in the optimizer's order.
        steps: number of steps taken so far, per parameter (t - 1 for the step to come); empty for an
            optimizer that does not count.
        moment_types: type per parameter in which the training kept it, as far as the state tells.
        codes: key to parameter name to what the file has, for tensors that it keeps in 8 bits.
        blank: parameters of its groups that train and have no state: they got no gradient so far.
        source: what it was read from, under the file's own keys and types; None once nobody needs it.
    """

    groups: tuple[ParameterGroup, ...]
    steps: Mapping[str, int]
    moment_types: Mapping[str, torch.dtype] = field(default_factory=dict)
    codes: Mapping[str, Mapping[str, BlockCodes]] = field(default_factory=dict)
    blank: tuple[str, ...] = ()
    source: SavedState | None = None

    label: ClassVar[str]
    """What it is called."""
    asked_for: ClassVar[tuple[str, ...]] = ()
    """Names by which Hugging Face's Trainer makes it (``optim``)."""
    keys: ClassVar[Keys]
    library: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The class that takes its steps, where it is installed with torch."""
    passed: ClassVar[tuple[str, ...]] = ()
    """Fields of its groups that :attr:`library` takes by the same names, beside those of every group."""
    blank_entries: ClassVar[bool] = False
    """Whether its library makes an entry of nothing for a parameter without a gradient."""
    throughs: ClassVar[tuple[Through, ...]] = THROUGHS
    """What shares of its step can go through: ``fixed`` needs a P, ``optimizer`` a :meth:`slope`."""
    nonlinear: ClassVar[str] = ""
    """Why a step is not linear in its gradient even with all that scales it held; "" where it is."""

    @classmethod
    def runs(cls, optimizer: object) -> bool:
        """Whether a running optimizer is this one."""
        library = cls.library
        return (
            library is not None
            and isinstance(optimizer, library)
            and type(optimizer).__name__ == library.__name__
        )

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """Why no step of a state with this optimizer's keys can be rebuilt; "" where it can."""
        return ""

    @classmethod
    def shape_in(cls, entry: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape of the parameter that an entry is of; None where it does not tell."""
        return next((tuple(entry[key].shape) for key in sorted(cls.keys.entry - {"step"})), None)

    @classmethod
    def keeps_nothing(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a group with these settings has no state of its parameters."""
        return False

    @classmethod
    @abstractmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters.

        Raises:
            CheckpointError: something is missing, or of the wrong type or shape.
        """

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's entry before its first step."""
        return {}

    @classmethod
    def mean_gradient(cls, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor | None:
        """The running mean of past gradients in an entry, without bias; None where none is kept."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """What is kept of parameters: key to parameter name to tensor."""

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        """Keys of tensors that are zero before the first step."""
        return tuple(self.tensors())

    @property
    def squares(self) -> tuple[str, ...]:
        """Keys of tensors that are never negative."""
        return ()

    @abstractmethod
    def update(
        self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float
    ) -> Update:
        """The parts of the step, each per unit of ``lr``.

        Args:
            parameters: where the step starts.
            ascent: -grad Loss before clipping.
            clip: clip coefficient c; 1 where ``ascent`` is clipped already.
            lr: learning rate that the parts are per unit of; those of group j have the factor lr_j / lr.
        """

    @abstractmethod
    def slope(self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float) -> Slope:
        """The derivative of the direction with respect to the clipped -grad Loss.

        Args:
            parameters: where the step starts.
            ascent: -grad Loss before clipping.
            clip: clip coefficient c.
            lr: learning rate that the direction is per unit of.
        """

    @abstractmethod
    def carried(self, name: str, horizon: int) -> float:
        """Displacement that a gradient has caused after some steps over that of its own step, the next.

        Args:
            name: of the parameter.
            horizon: n >= 1, steps in all; later gradients and all settings stay what they are.
        """

    @abstractmethod
    def own_shares(self, name: str) -> tuple[float, float]:
        """What part of the squared length of a step is its own gradient's by arithmetic alone.

        Returns:
            For gradients that are white noise, and for one that never changes.
        """

    def options(self, group: ParameterGroup) -> dict[str, Any]:
        """A group's hyperparameters as :attr:`library` takes them, beside its parameters."""
        own = {name: getattr(group, name) for name in self.passed}
        return {"lr": group.lr, "weight_decay": group.weight_decay, **own}

    @property
    def youth(self) -> str:
        """Why the step's scale is much the batch's own in this state; "" where it is not."""
        return ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters that the optimizer moves."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def half_types(self) -> tuple[str, ...]:
        """Names of the half types in which the training kept parameters; empty where it kept none so."""
        return tuple(sorted({type_name(t) for t in self.moment_types.values()} & set(HALF_TYPES)))

    def finer_than_kept(self, parameters: ParameterVector) -> str:
        """Which weights are no numbers of the half type that their moments have; empty where all are."""
        for name, kept in self.moment_types.items():
            value = parameters[name].detach()
            if type_name(kept) in HALF_TYPES and not torch.equal(value.to(kept).to(value.dtype), value):
                return (
                    f"{name} is no {type_name(kept)} number although the optimizer's moments are: the "
                    "weights were changed after it, or its library keeps moments in a type of their own"
                )
        return ""

    def take(self, copies: Mapping[str, nn.Parameter], *, scale: float | None, lr: float) -> str:
        """One step of :attr:`library` from this state.

        Args:
            copies: the parameters by name, with gradients; they move.
            scale: factor of every group's learning rate; None gives all the same.
            lr: that one.

        Returns:
            Which of torch's implementations took it, ``fused``, ``foreach`` or ``single tensor``.
        """
        assert self.library is not None
        groups = [group for group in self.groups if group.names]
        settings = [
            self.options(group) | {"lr": lr if scale is None else scale * group.lr} for group in groups
        ]
        made: Any = self.library
        optimizer = made(
            [
                {"params": [copies[name] for name in group.names], **own}
                for group, own in zip(groups, settings, strict=True)
            ]
        )
        kept = self.tensors()
        entries = {
            i: {key: by_name[name] for key, by_name in kept.items() if name in by_name}
            | ({"step": torch.tensor(float(self.steps[name]))} if name in self.steps else {})
            for i, name in enumerate(name for group in groups for name in group.names)
        }
        # torch casts the moments to the type of the parameters, which is exact for what was stored in it
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        optimizer.step()
        if any(own.get("fused") for own in settings):
            return "fused"
        chosen = [own.get("foreach") for own in settings]
        on_gpu = next(iter(copies.values())).is_cuda and all(each is None for each in chosen)
        return "foreach" if on_gpu or any(chosen) else "single tensor"

    def refuse_impossible(self, where: str) -> None:
        """Refuse a state that no training can have reached.

        Raises:
            CheckpointError: a tensor is not finite, a square negative, a number of steps not possible, or a
                hyperparameter out of its range; naming the parameter or the group.
        """
        for number, group in enumerate(self.groups):
            if problem := group.problem:
                raise CheckpointError(
                    f"{where}: group {number}: {problem}; the file is damaged, copy it again"
                )
        kept = self.tensors()
        for key, tensors in kept.items():
            problem = first_not_finite(tensors.items())
            if not problem and key in self.squares:
                negative = next((n for n, t in tensors.items() if t.numel() and float(t.amin()) < 0), None)
                problem = f"{negative} holds negative numbers" if negative else ""
            if problem:
                raise CheckpointError(
                    f"{where}: {key} of {problem}; the training diverged or the file is damaged, so take an "
                    "earlier checkpoint or copy it again"
                )
        for name, steps in self.steps.items():
            starts = (kept[key] for key in self.zero_at_first)
            fresh = not any(bool(tensors[name].any()) for tensors in starts if name in tensors)
            if not (1 <= steps <= MOST_STEPS or (steps == 0 and fresh)):
                raise CheckpointError(
                    f"{where}: {name} has taken {steps} steps, expected at least 1; {_DAMAGED}"
                )

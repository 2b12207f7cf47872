"""Optimizers that make of each parameter by itself, from its own gradient and state, what they add to it.

The loop over groups and parameters is here; an optimizer says what one parameter's part of a step is, and how
it answers to that parameter's gradient: coordinate by coordinate (:class:`ByCoordinate`) or not
(:class:`AsWhole`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from stepscope.policy.optim.base import OptimizerState, Update
from stepscope.policy.optim.saved import ParameterGroup
from stepscope.policy.optim.slope import Differentiated, Elementwise, Slope
from stepscope.policy.vectors import ParameterVector

G = TypeVar("G", bound=ParameterGroup)


class Parts(NamedTuple):
    """What one parameter's direction is made of.

    Attributes:
        momentum: what past gradients, or an average, have in it.
        decay: the weight decay.
        gradient: P; the gradient's own part of an optimizer whose shares go through no P.
    """

    momentum: Tensor
    decay: Tensor
    gradient: Tensor


@dataclass(frozen=True, repr=False)
class Place(Generic[G]):
    """One parameter before a step.

    Attributes:
        name: of the parameter.
        group: its hyperparameters.
        lr: learning rate that the direction is per unit of.
        clip: clip coefficient c.
        parameter: where the step starts.
        ascent: -grad Loss before clipping, in the type in which the state is kept.
    """

    name: str
    group: G
    lr: float
    clip: float
    parameter: Tensor
    ascent: Tensor

    @property
    def rate(self) -> float:
        """The group's learning rate over the one that the direction is per unit of."""
        return self.group.ratio(self.lr)

    @property
    def point(self) -> Tensor:
        """The clipped -grad Loss."""
        return self.clip * self.ascent

    @property
    def weights(self) -> Tensor:
        """The parameter in the type in which the state is kept."""
        return self.parameter.to(self.ascent.dtype)

    def decay(self, factor: float | Tensor) -> Tensor:
        """-factor times the parameter; 0 in a group without decay, whatever the parameter is.

        A bias that excludes a token with -inf is in a group without decay, and 0 x inf is no number.
        """
        if not (self.rate and self.group.weight_decay):
            return torch.zeros_like(self.weights)
        return -factor * self.weights


@dataclass(frozen=True, repr=False, kw_only=True)
class ByParameter(OptimizerState, Generic[G]):
    """A state whose steps are made parameter by parameter."""

    groups: tuple[G, ...]

    @abstractmethod
    def kept(self, name: str) -> Tensor | None:
        """What has the type in which a parameter's step is computed; None where that is the gradient's."""

    @abstractmethod
    def parts(self, at: Place[G]) -> Parts:
        """What a parameter's direction is made of."""

    def update(
        self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float
    ) -> Update:
        """Momentum, decay and the gradient's part of every parameter."""
        found = {at.name: self.parts(at) for at in self._places(parameters, ascent, clip=clip, lr=lr)}
        parts = {
            "momentum": {name: own.momentum for name, own in found.items()},
            "decay": {name: own.decay for name, own in found.items()},
        }
        gradient = {name: own.gradient for name, own in found.items()}
        return Update(parts, gradient) if "fixed" in self.throughs else Update(parts, None, gradient)

    def _places(
        self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float
    ) -> Iterator[Place[G]]:
        """Every parameter, in the order of the groups."""
        for group in self.groups:
            for name in group.names:
                kept, own = self.kept(name), ascent[name]
                yield Place(
                    name=name,
                    group=group,
                    lr=lr,
                    clip=clip,
                    parameter=parameters[name].detach(),
                    ascent=own if kept is None else own.to(kept.dtype),
                )

    def _group_of(self, name: str) -> G:
        return next(group for group in self.groups if name in group.names)


@dataclass(frozen=True, repr=False, kw_only=True)
class ByCoordinate(ByParameter[G]):
    """Whose coordinates each answer to their own gradient alone, all that scales it taken along."""

    @abstractmethod
    def derivative(self, at: Place[G]) -> Tensor:
        """Of each coordinate of a parameter's direction, in that of the clipped -grad Loss."""

    def slope(self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float) -> Slope:
        """A diagonal."""
        places = self._places(parameters, ascent, clip=clip, lr=lr)
        return Elementwise({at.name: self.derivative(at) for at in places})


@dataclass(frozen=True, repr=False, kw_only=True)
class AsWhole(ByParameter[G]):
    """Whose coordinates answer to those of the whole parameter."""

    @abstractmethod
    def moved(self, at: Place[G], point: Tensor) -> Tensor:
        """The gradient's part of a parameter's direction at an x, differentiable in it."""

    def slope(self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float) -> Slope:
        """By automatic differentiation of the gradient's part."""
        places = list(self._places(parameters, ascent, clip=clip, lr=lr))
        return Differentiated(
            {at.name: partial(self.moved, at) for at in places}, {at.name: at.point for at in places}
        )

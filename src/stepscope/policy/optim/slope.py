"""The derivative of what an optimizer makes of a clipped gradient: a linear map, and its transpose.

With D(x) the direction that the optimizer takes with the clipped ascent x = -c grad Loss, J is dD/dx at the
batch. An optimizer that treats each coordinate by itself has a diagonal J (:class:`Elementwise`); of one that
does not, J and its transpose are taken by automatic differentiation of D itself (:class:`Differentiated`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepscope.policy import vectors
from stepscope.policy.vectors import ParameterVector


class Slope(ABC):
    """J, as a map of vectors in parameter space."""

    @abstractmethod
    def along(self, change: ParameterVector) -> dict[str, Tensor]:
        """J change."""

    @abstractmethod
    def pulled(self, stacks: ParameterVector) -> dict[str, Tensor]:
        """J' on each of a stack of vectors.

        Args:
            stacks: name to (row, ...parameter shape).

        Returns:
            The same shapes, types and devices.
        """


@dataclass(frozen=True, repr=False)
class Elementwise(Slope):
    """A diagonal J, which is its own transpose.

    Attributes:
        diagonal: by parameter.
    """

    diagonal: dict[str, Tensor]

    def along(self, change: ParameterVector) -> dict[str, Tensor]:
        """Products with the diagonal."""
        return vectors.multiply(self.diagonal, change)

    def pulled(self, stacks: ParameterVector) -> dict[str, Tensor]:
        """Products with the diagonal."""
        return {n: t * self.diagonal[n].to(t.device, t.dtype) for n, t in stacks.items()}


@dataclass(frozen=True, repr=False)
class Differentiated(Slope):
    """J of a function of each parameter's own gradient, by automatic differentiation.

    Attributes:
        functions: by parameter, D as torch operations that have forward and reverse derivatives.
        points: by parameter, the x at which J is taken; J is computed in its type.

    Pinned by ``tests/policy/test_slope.py`` on differences.
    """

    functions: Mapping[str, Callable[[Tensor], Tensor]]
    points: Mapping[str, Tensor]

    def along(self, change: ParameterVector) -> dict[str, Tensor]:
        """By forward mode."""
        found: dict[str, Tensor] = {}
        for name, vector in change.items():
            point = self.points[name]
            tangent = vector.to(point.device, point.dtype)
            moved = torch.func.jvp(self.functions[name], (point,), (tangent,))[1]
            found[name] = moved.to(vector.device, vector.dtype)
        return found

    def pulled(self, stacks: ParameterVector) -> dict[str, Tensor]:
        """By reverse mode, a row at a time."""
        found: dict[str, Tensor] = {}
        for name, rows in stacks.items():
            point = self.points[name].detach().clone().requires_grad_()
            with torch.enable_grad():
                out = self.functions[name](point)
            found[name] = torch.empty_like(rows)
            for own, row in zip(found[name], rows, strict=True):
                (back,) = torch.autograd.grad(out, point, row.to(out.device, out.dtype), retain_graph=True)
                own.copy_(back)
        return found

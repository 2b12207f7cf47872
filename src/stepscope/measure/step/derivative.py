"""How a step answers to a change of the loss gradient: through clipping and what scales it, too.

The components of a step (:mod:`stepscope.measure.step.reconstruct`) hold the preconditioner P and the clip
coefficient c as they are. Both depend on the gradient. With a = -g the ascent of the loss and J the
derivative of the direction with respect to c a, which the optimizer gives
(:meth:`~stepscope.policy.optim.base.OptimizerState.slope`),

    d direction / da at fixed c:   A = c J
    d direction / dc:              E = J a
    dc/da = - c^2 / max_norm  a / |a|   where the gradient is clipped, else 0

so that the step's derivative along a change da of the gradient is A da + E (dc/da . da), and a quantity with
gradient F' changes by u . da with u = A' F' + (E . F') dc/da. (``docs/METHODS.md``; own derivation, held to
finite differences of the optimizers of torch.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.optim.base import Through
from stepscope.policy.optim.slope import Elementwise, Slope
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector


@dataclass(frozen=True)
class StepDerivative:
    """The derivative of a step's direction with respect to -grad Loss, per unit of the step's lr.

    Attributes:
        slope: J, or P where preconditioner and clipping are held fixed.
        factor: c, or 1 beside P: A is the one times the other.
        clip_effect: E, d direction / dc; empty where clipping is fixed or not at work.
        clip_gradient: dc/da; empty like ``clip_effect``.
    """

    slope: Slope
    factor: float
    clip_effect: dict[str, Tensor]
    clip_gradient: dict[str, Tensor]

    def along(self, change: ParameterVector) -> dict[str, Tensor]:
        """Change of the direction for a small change of -grad Loss."""
        moved = vectors.scale(self.slope.along(change), self.factor)
        if not self.clip_effect:
            return moved
        return vectors.add(moved, vectors.scale(self.clip_effect, vectors.dot(self.clip_gradient, change)))

    def pulled(self, stacks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The transpose on a stack of gradients of quantities: their gradients with respect to -grad Loss.

        Args:
            stacks: name to (row, ...parameter shape).

        Returns:
            The same shapes: u = A' F' + (E . F') dc/da for every row F'.
        """
        found = {n: t.mul_(self.factor) for n, t in self.slope.pulled(stacks).items()}
        if self.clip_effect:
            vectors.add_multiples(found, vectors.stack_dots(stacks, self.clip_effect), self.clip_gradient)
        return found


def step_derivative(policy: Policy, step: Step, through: Through) -> StepDerivative:
    """The derivative of a step's direction with respect to -grad Loss.

    Args:
        policy: where the step starts.
        step: the step.
        through: ``fixed`` holds preconditioner and clip coefficient, ``optimizer`` holds nothing.

    Raises:
        MeasurementError: the optimizer has no preconditioner to hold, or no derivative.
    """
    assert policy.optimizer is not None
    state = policy.optimizer
    if through not in state.throughs:
        raise MeasurementError(
            f"no shares of this step through={through}: {state.nonlinear}; use through={state.throughs[0]}"
        )
    if through == "fixed":
        return StepDerivative(Elementwise(step.metric()), 1.0, {}, {})
    clip, limit = step.clip_coefficient, policy.settings.max_grad_norm
    slope = state.slope(policy.parameters, step.ascent, clip=clip, lr=step.lr)
    if clip == 1.0 or not limit > 0:
        return StepDerivative(slope, clip, {}, {})
    return StepDerivative(
        slope,
        clip,
        slope.along(step.ascent),
        vectors.scale(step.ascent, -(clip**2) / (limit * step.grad_norm)),
    )

"""How a step answers to a change of the loss gradient: through clipping and what scales it, too.

The components of a step (:mod:`stepscope.measure.step.reconstruct`) hold the preconditioner P and the clip
coefficient c as they are. Both depend on the gradient. With a = -g the ascent of the loss and J the
derivative of the direction with respect to c a, elementwise, which the optimizer gives
(:meth:`~stepscope.policy.optim.base.OptimizerState.slope`),

    d direction / da at fixed c:   A = c J
    d direction / dc:              E = a J
    dc/da = - c^2 / max_norm  a / |a|   where the gradient is clipped, else 0

so that the step's derivative along a change da of the gradient is A da + E (dc/da . da), and a quantity with
gradient F' changes by u . da with u = A F' + (E . F') dc/da. (``docs/METHODS.md``; own derivation, held to
finite differences of ``torch.optim.AdamW``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector

Through = Literal["fixed", "optimizer"]
"""What a share of a step goes through: P and c as they are, or as they answer to the gradient."""

THROUGHS: tuple[Through, ...] = ("fixed", "optimizer")


@dataclass(frozen=True)
class StepDerivative:
    """The derivative of a step's direction with respect to -grad Loss, per unit of the step's lr.

    Attributes:
        diagonal: A, or P where preconditioner and clipping are held fixed.
        clip_effect: E, d direction / dc; empty where clipping is fixed or not at work.
        clip_gradient: dc/da; empty like ``clip_effect``.
    """

    diagonal: dict[str, Tensor]
    clip_effect: dict[str, Tensor]
    clip_gradient: dict[str, Tensor]

    def along(self, change: ParameterVector) -> dict[str, Tensor]:
        """Change of the direction for a small change of -grad Loss."""
        moved = vectors.multiply(self.diagonal, change)
        if not self.clip_effect:
            return moved
        return vectors.add(moved, vectors.scale(self.clip_effect, vectors.dot(self.clip_gradient, change)))

    def pulled(self, stacks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The transpose on a stack of gradients of quantities: their gradients with respect to -grad Loss.

        Args:
            stacks: name to (row, ...parameter shape).

        Returns:
            The same shapes: u = A F' + (E . F') dc/da for every row F'.
        """
        found = {n: t * self.diagonal[n].to(t.device, t.dtype) for n, t in stacks.items()}
        if self.clip_effect:
            effects = sum(
                (t.flatten(1).double() @ self.clip_effect[n].reshape(-1).to(t.device).double()).cpu()
                for n, t in stacks.items()
            )
            assert isinstance(effects, Tensor)
            for n, t in found.items():
                rows = effects.to(t.device, t.dtype).reshape(-1, *[1] * (t.dim() - 1))
                t += rows * self.clip_gradient[n].to(t.device, t.dtype)
        return found


def step_derivative(policy: Policy, step: Step, through: Through) -> StepDerivative:
    """The derivative of a step's direction with respect to -grad Loss.

    Args:
        policy: where the step starts.
        step: the step.
        through: ``fixed`` holds preconditioner and clip coefficient, ``optimizer`` holds nothing.
    """
    if through == "fixed":
        return StepDerivative(step.preconditioner, {}, {})
    assert policy.optimizer is not None
    clip, limit = step.clip_coefficient, policy.settings.max_grad_norm
    slope = policy.optimizer.slope(step.ascent, clip=clip, lr=step.lr)
    diagonal = vectors.scale(slope, clip)
    if clip == 1.0:
        return StepDerivative(diagonal, {}, {})
    ascent = {n: step.ascent[n].to(t.dtype) for n, t in slope.items()}
    return StepDerivative(
        diagonal,
        vectors.multiply(ascent, slope),
        vectors.scale(ascent, -(clip**2) / (limit * step.grad_norm)),
    )

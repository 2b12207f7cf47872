"""How AdamW's step answers to a change of the loss gradient: through clipping and the second moment, too.

The parts of a step (:mod:`stepscope.measure.step.reconstruct`) hold the preconditioner P and the clip
coefficient c as they are. Both depend on the gradient. With a = -g the ascent of the loss,
M = - b1 m + (1 - b1) c a, v' and D as there (everything elementwise but c, and with
r = lr of the group / lr of the step),

    d direction / da at fixed c:   A = r / (1 - b1^t) [ (1 - b1) c / D - M / D^2 dD/da ]
    d direction / dc:              E = r / (1 - b1^t) [ (1 - b1) a / D - M / D^2 dD/dc ]
    dD/da = (1 - b2) c^2 a / sqrt(v' (1 - b2^t)),    dD/dc = (1 - b2) c a^2 / sqrt(v' (1 - b2^t))
    dc/da = - c^2 / max_norm  a / |a|   where the gradient is clipped, else 0

so that the step's derivative along a change da of the gradient is A da + E (dc/da . da), and a quantity with
gradient F' changes by u . da with u = A F' + (E . F') dc/da. (``docs/METHODS.md``; own derivation, held to
finite differences of ``torch.optim.AdamW``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepscope.measure.step.reconstruct import Step, adamw_terms
from stepscope.policy import vectors
from stepscope.policy.state import OptimizerState, Policy
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
    assert isinstance(policy.optimizer, OptimizerState)
    clip = step.clip_coefficient
    limit = policy.settings.max_grad_norm
    clipped = clip < 1.0
    diagonal: dict[str, Tensor] = {}
    clip_effect: dict[str, Tensor] = {}
    clip_gradient: dict[str, Tensor] = {}
    for terms in adamw_terms(policy.optimizer, step.ascent, clip=clip, lr=step.lr):
        name, (beta1, beta2) = terms.name, terms.group.betas
        denominator = terms.denominator
        scale = terms.ratio / terms.correction
        # dD/da / c = dD/dc / a; where v' is 0 so is a, and D has its kink: held as it is there
        slope = (1 - beta2) * terms.clipped / (terms.root * terms.root_scale)
        slope = torch.where(terms.root > 0, slope, torch.zeros_like(slope))
        if terms.fresh is not None:
            slope = torch.where(terms.fresh, slope, torch.zeros_like(slope))
        moment = (1 - beta1) * terms.clipped - beta1 * terms.first
        common = scale * ((1 - beta1) / denominator - moment / denominator**2 * slope)
        diagonal[name] = clip * common
        if clipped:
            ascent = step.ascent[name].to(common.dtype)
            clip_effect[name] = ascent * common
            clip_gradient[name] = ascent * (-(clip**2) / (limit * step.grad_norm))
    return StepDerivative(diagonal, clip_effect, clip_gradient)

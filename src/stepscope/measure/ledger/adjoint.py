"""How a run of AdamW steps answers to the gradient of each, taken backwards.

With x_t = c_t a_t the clipped -grad Loss of step t (a_t before clipping; Adam adds its decay to x_t), n_t the
optimizer's own count after the step, and G_t what a quantity gains per unit of the displacement Delta_t,

    m_t = b1 m_{t-1} + (1 - b1) x_t         v_t = b2 v_{t-1} + (1 - b2) x_t^2
    D_t = sqrt(v_t) / sqrt(1 - b2^n_t) + eps
    Delta_t = lr_t m_t / ((1 - b1^n_t) D_t) - lr_t wd theta_t

(m the running mean of *ascents*, minus the ``exp_avg`` of torch), and with M_t, W_t the derivatives of
sum_t G_t . Delta_t with respect to m_t and v_t,

    M_t = lr_t G_t / ((1 - b1^n_t) D_t) + b1 M_{t+1}
    W_t = - lr_t G_t m_t / ((1 - b1^n_t) D_t^2) / (2 sqrt(v_t) sqrt(1 - b2^n_t)) + b2 W_{t+1}

all elementwise, M and W zero after the last step. The first term of each is step t's own, the second goes
through later steps. With respect to a_t, then,

    fixed       c_t V_t, V_t = (1 - b1) M_t: all D and c held as they were
    optimizer   c_t X_t + (a_t . X_t) dc_t/da_t, X_t = (1 - b1) M_t + 2 (1 - b2) x_t W_t: nothing held,
                dc/da = - c^2 / max_norm  a / |a| where the gradient was clipped

and a token's entry is w_ik times the product of that with grad l_ik(theta_t). Under AMSGrad D_t has the
largest v so far in it, and W_t passes where step t made a new largest one. (``docs/METHODS.md``; own
derivation, held to automatic differentiation of AdamW itself in ``tests/measure/test_ledger_adjoint.py``.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy import vectors
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.optim.base import Through
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Brief


@dataclass(frozen=True, repr=False, kw_only=True)
class TakenStep(Brief):
    """A step that AdamW took.

    Attributes:
        state: after the step; its groups have the learning rates that the step was taken with, and the names
            of what it moved. Where only ``fixed`` is asked for, ``exp_avg`` may be empty.
        clip: clip coefficient c.
        max_norm: of the clipping; 0 for none.
        ascent: a, -grad Loss before clipping; needed where nothing is held.
        parameters: where the step started; needed for Adam, whose decay is in the gradient.
    """

    state: AdamWState
    clip: float = 1.0
    max_norm: float = 0.0
    ascent: ParameterVector = field(default_factory=dict)
    parameters: ParameterVector = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an optimizer whose steps are not AdamW's.

        Raises:
            MeasurementError: naming it.
        """
        if type(self.state).library not in (torch.optim.AdamW, torch.optim.Adam):
            raise MeasurementError(
                f"the ledger follows the moments of torch's AdamW and Adam, got {self.state.label}; measure "
                "single checkpoints of this run instead"
            )

    @property
    def places(self) -> Iterator[tuple[str, AdamWGroup, int]]:
        """Name, group and n of every parameter that the step moved."""
        for group in self.state.groups:
            for name in group.names:
                yield name, group, self.state.steps[name]

    def root(self, name: str) -> Tensor:
        """Sqrt of what the step was divided by: v, or the largest so far."""
        largest = self.state.max_exp_avg_sq.get(name)
        return torch.sqrt(self.state.exp_avg_sq[name] if largest is None else largest)

    def decay(self, theta: ParameterVector) -> dict[str, Tensor]:
        """-lr wd theta: the part of the displacement that is decay beside the gradient."""
        found = vectors.zeros_like(theta)
        for name, group, _ in self.places:
            if (rate := group.lr * group.weight_decay) and group.decoupled:
                found[name] = -rate * theta[name]
        return found


def scale(group: AdamWGroup, count: int) -> float:
    """Lr / (1 - b1^n)."""
    return group.lr / (1 - group.betas[0] ** count)


def denominator(step: TakenStep, name: str, group: AdamWGroup, count: int) -> Tensor:
    """D."""
    root: Tensor = step.root(name) / (1 - group.betas[1] ** count) ** 0.5
    return root.add_(group.eps)


def carried_moment(step: TakenStep, moment: ParameterVector, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The displacement that earlier moments make in a step: - lr b1^a m / ((1 - b1^n) D), a steps later.

    Args:
        step: the step.
        moment: ``exp_avg`` as torch keeps it, of gradients, of all parameters.
        counts: the optimizer's own count of steps then, by parameter.
    """
    found = vectors.zeros_like(moment)
    for name, group, count in step.places:
        factor = -scale(group, count) * group.betas[0] ** (count - counts[name])
        found[name] = factor * moment[name] / denominator(step, name, group, count)
    return found


@dataclass(frozen=True, repr=False)
class Adjoint(Brief):
    """Derivatives of the change with respect to a step's moments, by name to (row, ...parameter shape).

    Attributes:
        first: with respect to the running mean m of ascents.
        second: with respect to v; empty where D is held.
        largest: with respect to AMSGrad's largest v; empty without it.
    """

    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Pulled(Brief):
    """What one step answers, by name to (row, ...parameter shape).

    Attributes:
        own: derivative with respect to a, -grad Loss before clipping, through the step itself.
        later: the same through the moments of all later steps.
        decay: wd times the derivative with respect to the clipped ascent, to which Adam adds -wd theta; empty
            of parameters whose decay is not in the gradient.
        before: derivatives with respect to the moments before the step.
    """

    own: dict[str, Tensor]
    later: dict[str, Tensor]
    decay: dict[str, Tensor]
    before: Adjoint


def pull(step: TakenStep, gains: Mapping[str, Tensor], after: Adjoint, through: Through) -> Pulled:
    """One step of the recursion. Moments of what the step did not move stay as they are.

    Args:
        step: the step.
        gains: G, name to (row, ...parameter shape): gradients of quantities along the step's displacement.
        after: derivatives with respect to the moments that the step left, as later steps have them; empty
            after the last.
        through: ``fixed`` holds D and c, ``optimizer`` nothing.

    Returns:
        Derivatives with respect to the gradient of the step and the moments before it.

    Raises:
        MeasurementError: nothing is to be held and the step has no gradient or first moment.
    """
    if through == "optimizer" and not (step.ascent and step.state.exp_avg):
        raise MeasurementError(
            "through=optimizer needs the gradient and the first moment of every step, got neither or one; "
            "take through=fixed"
        )
    coupled: dict[str, Tensor] = {}
    own, later = ({n: torch.zeros_like(g) for n, g in gains.items()} for _ in range(2))
    before = Adjoint(dict(after.first), dict(after.second), dict(after.largest))
    for name, group, count in step.places:
        (b1, b2), gain = group.betas, gains[name]
        divisor = denominator(step, name, group, count)
        mine = scale(group, count) * gain / divisor
        theirs = after.first.get(name, torch.zeros_like(mine))
        before.first[name] = b1 * (mine + theirs)
        own[name], later[name] = (1 - b1) * mine, (1 - b1) * theirs
        if through == "optimizer":
            x = step.clip * step.ascent[name]
            if group.weight_decay and not group.decoupled:
                x = x - group.weight_decay * step.parameters[name]
            moment = -step.state.exp_avg[name]
            root = step.root(name)
            slope = moment / divisor / (2 * root * (1 - b2**count) ** 0.5)
            slope = torch.where(root > 0, slope, torch.zeros_like(slope))  # D has its kink there: held
            parts = -mine * slope, after.second.get(name, torch.zeros_like(mine))
            if name in step.state.max_exp_avg_sq:
                fresh = step.state.exp_avg_sq[name] >= step.state.max_exp_avg_sq[name]
                kept = after.largest.get(name, torch.zeros_like(mine))
                nothing = torch.zeros_like(mine)
                before.largest[name] = torch.where(fresh, nothing, parts[0] + kept)
                parts = torch.where(fresh, parts[0], nothing), parts[1] + torch.where(fresh, kept, nothing)
            before.second[name] = b2 * (parts[0] + parts[1])
            own[name] = own[name] + 2 * (1 - b2) * x * parts[0]
            later[name] = later[name] + 2 * (1 - b2) * x * parts[1]
        if group.weight_decay and not group.decoupled:
            coupled[name] = group.weight_decay * (own[name] + later[name])
    clipped = [_through_clip(step, part, through) for part in (own, later)]
    return Pulled(clipped[0], clipped[1], coupled, before)


def _through_clip(step: TakenStep, pulled: dict[str, Tensor], through: Through) -> dict[str, Tensor]:
    """From derivatives with respect to the clipped gradient to those before clipping."""
    found = {name: step.clip * rows for name, rows in pulled.items()}
    if through == "fixed" or step.clip == 1.0 or not step.max_norm > 0:
        return found
    norm = vectors.norm(step.ascent)
    slope = -(step.clip**2) / (step.max_norm * norm)
    vectors.add_multiples(found, slope * vectors.stack_dots(pulled, step.ascent), step.ascent)
    return found

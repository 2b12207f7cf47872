"""AdamW, AMSGrad and Adam as torch has them, Loshchilov & Hutter 2019 (arXiv:1711.05101).

With c g the clipped gradient and the state (m, v, t = steps after this one), per parameter,

    v' = b2 v + (1 - b2) (c g)^2        (AMSGrad: v' = max(v', vmax))
    D  = sqrt(v') / sqrt(1 - b2^t) + eps
    P  = (1 - b1) c / ((1 - b1^t) D)
    direction = - b1 m / ((1 - b1^t) D)     [momentum]
                - wd params                 [decay]
                - P g                       [the gradient's part]

Adam's decay is inside the gradient, in place of c g stands c g + wd params everywhere, and its part of the
step is -(1 - b1) wd params / ((1 - b1^t) D), with v' held as it is held for the gradient's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.optim.by_parameter import ByCoordinate, Parts, Place
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedGroup, SavedState

YOUNG = 20
"""Steps before which a batch makes much of the second moment that divides it."""


@dataclass(frozen=True)
class AdamWGroup(ParameterGroup):
    """Hyperparameters of AdamW.

    ``foreach`` and ``fused`` choose torch's implementation, which matters for parameters in a half type;
    ``decoupled`` keeps the decay out of the gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    foreach: bool | None = None
    fused: bool | None = None
    decoupled: bool = True

    @property
    def fractions(self) -> dict[str, float]:
        """Hyperparameters that are at least 0 and below 1."""
        return {"beta1": self.betas[0], "beta2": self.betas[1]}

    @property
    def sizes(self) -> dict[str, float]:
        """Hyperparameters that are finite and at least 0."""
        return {"eps": self.eps, **super().sizes}

    def carried(self, step: int, horizon: int) -> float:
        """L_n of :mod:`stepscope.measure.step.lifetime` for a gradient whose own step has number ``step``.

        A decay inside the gradients is held as they are.
        """
        beta, moved = self.betas[0], 0.0
        shrink = self.lr * self.weight_decay if self.decoupled else 0.0
        for j in range(horizon):
            moved = moved * (1 - shrink)
            moved += beta**j * (1 - beta**step) / (1 - beta ** (step + j))
        return moved


@dataclass(frozen=True)
class _Terms:
    """What AdamW makes of one parameter's gradient, rounded as ``torch.optim.AdamW`` does.

    Attributes:
        scale: the group's learning rate over the one that a direction is per unit of, over 1 - b1^t.
        first: m, the first moment before the step.
        clipped: -c g, for Adam with the decay in it.
        root: sqrt(v') of the second moment after the step.
        root_scale: sqrt(1 - b2^t).
        eps: added to the root.
        fresh: where this step's gradient has part in ``root``: everywhere but where AMSGrad's maximum is
            older.
    """

    scale: float
    first: Tensor
    clipped: Tensor
    root: Tensor
    root_scale: float
    eps: float
    fresh: Tensor | None

    @property
    def denominator(self) -> Tensor:
        """D."""
        return (self.root / self.root_scale).add_(self.eps)


@dataclass(frozen=True, repr=False, kw_only=True)
class AdamWState(ByCoordinate[AdamWGroup]):
    """AdamW's state, matched to parameters by name.

    Attributes:
        groups: parameter groups in the optimizer's order.
        exp_avg: m, first moment, per parameter.
        exp_avg_sq: v, second moment, per parameter.
        max_exp_avg_sq: running maximum of v, present for AMSGrad only.
    """

    groups: tuple[AdamWGroup, ...]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    max_exp_avg_sq: Mapping[str, Tensor] = field(default_factory=dict)

    label: ClassVar[str] = "AdamW"
    asked_for: ClassVar[tuple[str, ...]] = ("adamw_torch", "adamw_torch_fused")
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"}),
        group_optional=frozenset(
            {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
        ),
        entry=frozenset({"step", "exp_avg", "exp_avg_sq"}),
        entry_optional=frozenset({"max_exp_avg_sq"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.AdamW
    passed: ClassVar[tuple[str, ...]] = ("betas", "eps", "amsgrad", "foreach", "fused")

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters, whose moments have the types that the training kept them in."""
        for group in saved.groups:
            lacking = [n for n in group.names if "max_exp_avg_sq" not in saved.entries[n]]
            if group.settings.get("amsgrad") and lacking:
                raise CheckpointError(
                    f"{saved.where}: AMSGrad state of {lacking[0]} lacks max_exp_avg_sq; copy the file again"
                )
        return cls(
            groups=tuple(map(cls._group, saved.groups)),
            steps=saved.steps(),
            exp_avg=saved.tensors("exp_avg"),
            exp_avg_sq=saved.tensors("exp_avg_sq"),
            max_exp_avg_sq=saved.tensors("max_exp_avg_sq"),
            moment_types=saved.types("exp_avg") if cls.library else {},
        )

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """A decay inside the gradient."""
        coupled = any(g["weight_decay"] and not g.get("decoupled_weight_decay", True) for g in groups)
        return "the weight decay is in the gradient" if coupled else ""

    @staticmethod
    def _group(saved: SavedGroup) -> AdamWGroup:
        given, shared = saved.settings, saved.shared
        return AdamWGroup(
            **shared,
            betas=saved.betas,
            eps=saved.number("eps"),
            amsgrad=bool(given.get("amsgrad")),
            foreach=given.get("foreach"),
            fused=given.get("fused"),
            decoupled=given.get("decoupled_weight_decay", True),
        )

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Moments of zero."""
        zero = torch.zeros_like(parameter)
        entry: dict[str, Any] = {"step": 0, "exp_avg": zero, "exp_avg_sq": zero}
        return entry | {"max_exp_avg_sq": zero} if settings.get("amsgrad") else entry

    @classmethod
    def mean_gradient(cls, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor | None:
        """M / (1 - b1^t)."""
        if "exp_avg" not in entry:
            return None
        mean: Tensor = entry["exp_avg"] / (1 - float(settings["betas"][0]) ** float(entry["step"]))
        return mean

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The moments."""
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "max_exp_avg_sq": self.max_exp_avg_sq,
        }

    @property
    def squares(self) -> tuple[str, ...]:
        """The second moments."""
        return ("exp_avg_sq", "max_exp_avg_sq")

    def kept(self, name: str) -> Tensor:
        """The first moment."""
        return self.exp_avg[name]

    def parts(self, at: Place[AdamWGroup]) -> Parts:
        """Momentum, decay and P."""
        terms, beta1 = self._terms(at), at.group.betas[0]
        denominator = terms.denominator
        shrink: float | Tensor = at.rate * at.group.weight_decay
        if shrink and not at.group.decoupled:
            shrink = terms.scale * (1 - beta1) * at.group.weight_decay / denominator
        return Parts(
            -terms.scale * beta1 * terms.first / denominator,
            at.decay(shrink),
            terms.scale * (1 - beta1) * at.clip / denominator,
        )

    def derivative(self, at: Place[AdamWGroup]) -> Tensor:
        """R / (1 - b1^t) [(1 - b1) / D - M / D^2 dD/d(c a)], with a = -g and M = - b1 m + (1 - b1) c a.

        dD/d(c a) = (1 - b2) c a / sqrt(v' (1 - b2^t)); where v' is 0 so is a, and D has its kink: held as it
        is there.
        """
        terms, (beta1, beta2) = self._terms(at), at.group.betas
        denominator = terms.denominator
        rise = (1 - beta2) * terms.clipped / (terms.root * terms.root_scale)
        rise = torch.where(terms.root > 0, rise, torch.zeros_like(rise))
        if terms.fresh is not None:
            rise = torch.where(terms.fresh, rise, torch.zeros_like(rise))
        moment = (1 - beta1) * terms.clipped - beta1 * terms.first
        return terms.scale * ((1 - beta1) / denominator - moment / denominator**2 * rise)

    def carried(self, name: str, horizon: int) -> float:
        """A geometric series in b1, up to the bias corrections."""
        return self._group_of(name).carried(self.steps[name] + 1, horizon)

    def own_shares(self, name: str) -> tuple[float, float]:
        """(1 - b1^2) / (1 - b1^(2t)) and (1 - b1) / (1 - b1^t)."""
        beta, step = self._group_of(name).betas[0], self.steps[name] + 1
        return (1 - beta**2) / (1 - beta ** (2 * step)), (1 - beta) / (1 - beta**step)

    @property
    def youth(self) -> str:
        """In the first steps a batch makes much of the second moment that divides it."""
        age = max(self.steps.values()) + 1
        if age >= YOUNG:
            return ""
        return f"AdamW is at step {age}, so the batch makes much of its own second moment"

    def _shrunk(self, group: AdamWGroup) -> float:
        """By what the decay multiplies the rest of the step: 1, since torch decays first."""
        return 1.0

    def _terms(self, at: Place[AdamWGroup]) -> _Terms:
        group, steps, clipped = at.group, self.steps[at.name] + 1, at.point
        beta1, beta2 = group.betas
        if group.weight_decay and not group.decoupled:
            clipped = clipped - group.weight_decay * at.weights
        moment = self.exp_avg_sq[at.name].mul(beta2).addcmul_(clipped, clipped, value=1 - beta2)
        fresh = None
        if group.amsgrad:
            fresh = moment > self.max_exp_avg_sq[at.name]
            moment = torch.maximum(moment, self.max_exp_avg_sq[at.name])
        return _Terms(
            scale=at.rate * self._shrunk(group) / (1 - beta1**steps),
            first=self.exp_avg[at.name],
            clipped=clipped,
            root=moment.sqrt(),
            root_scale=(1 - beta2**steps) ** 0.5,
            eps=group.eps,
            fresh=fresh,
        )


@dataclass(frozen=True, repr=False, kw_only=True)
class AdamState(AdamWState):
    """Adam's state: AdamW's but for the decay, which is inside the gradient."""

    label: ClassVar[str] = "Adam"
    asked_for: ClassVar[tuple[str, ...]] = ()
    library: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adam

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """Groups with a decay beside the gradient, too."""
        mixed = any(g["weight_decay"] and g.get("decoupled_weight_decay", True) for g in groups)
        return "the weight decay is in the gradient in some groups and beside it in others" if mixed else ""

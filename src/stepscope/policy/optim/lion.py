"""Lion (Chen et al. 2023, arXiv:2302.06675) as lion-pytorch and bitsandbytes have it: the step is a sign.

With c g the clipped gradient, m the running mean of gradients and a = -g,

    direction = - sign(b1 m + (1 - b1) c g) - wd params

m itself moves by b2, after the step. The derivative of the sign is 0 wherever it has one, so no small change
of a batch changes a step. What the batch as a whole does is to turn coordinates: those where it outweighs m
and has the other sign. The secant P = (direction with the batch - direction without) / a is 2 / |a| there,
1 / |a| where m is 0, and 0 at all others; P a is what the batch adds.

lion-pytorch's option ``decoupled_weight_decay`` divides the decay by the first learning rate and is not
saved: a state is read as one without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.optim.base import Through
from stepscope.policy.optim.bitsandbytes import decoded
from stepscope.policy.optim.by_parameter import ByParameter, Parts, Place
from stepscope.policy.optim.nonlinear import NonlinearState
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedGroup, SavedState
from stepscope.policy.optim.slope import Slope
from stepscope.policy.vectors import ParameterVector


@dataclass(frozen=True)
class LionGroup(ParameterGroup):
    """Hyperparameters of Lion: b1 mixes the gradient into the step, b2 into the mean."""

    betas: tuple[float, float] = (0.9, 0.99)

    @property
    def fractions(self) -> dict[str, float]:
        """Hyperparameters that are at least 0 and below 1."""
        return {"beta1": self.betas[0], "beta2": self.betas[1]}


@dataclass(frozen=True, repr=False, kw_only=True)
class LionState(NonlinearState, ByParameter[LionGroup]):
    """Lion's state, matched to parameters by name.

    Attributes:
        groups: parameter groups in the optimizer's order.
        exp_avg: m, per parameter.
    """

    groups: tuple[LionGroup, ...]
    exp_avg: Mapping[str, Tensor]

    label: ClassVar[str] = "Lion"
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "betas", "weight_decay"}), entry=frozenset({"exp_avg"})
    )
    passed: ClassVar[tuple[str, ...]] = ("betas",)
    throughs: ClassVar[tuple[Through, ...]] = ("fixed",)
    nonlinear: ClassVar[str] = (
        "Lion's step is a sign, which is not linear in the gradient and has no derivative"
    )

    @classmethod
    def runs(cls, optimizer: object) -> bool:
        """By name, since the library need not be there; its cautious relative has the same name elsewhere."""
        made = type(optimizer)
        plain = ("lion_pytorch.lion_pytorch", "lion_pytorch.foreach")
        return made.__module__ in plain and made.__name__ == "Lion"

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters."""
        return cls(
            groups=tuple(map(_group, saved.groups)), steps=saved.steps(), exp_avg=saved.tensors("exp_avg")
        )

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A mean of zero."""
        return {"exp_avg": torch.zeros_like(parameter)}

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The means."""
        return {"exp_avg": self.exp_avg}

    def kept(self, name: str) -> Tensor:
        """The mean."""
        return self.exp_avg[name]

    def parts(self, at: Place[LionGroup]) -> Parts:
        """The secant P, the decay, and the rest of the step: the one without a gradient, up to round-off."""
        beta, mean, own = at.group.betas[0], self.exp_avg[at.name], at.ascent
        before = -(mean * beta).sign()
        after = -(mean * beta).add(own, alpha=-at.clip * (1 - beta)).sign()
        secant = torch.where(own == 0, 0.0, (after - before) / own)
        # the quotient by the smallest numbers is none, and such a coordinate's turn is left to the rest
        secant = torch.where(secant.isfinite(), secant, 0.0)
        return Parts(
            at.rate * (after - secant * own), at.decay(at.rate * at.group.weight_decay), at.rate * secant
        )

    def slope(self, parameters: ParameterVector, ascent: ParameterVector, *, clip: float, lr: float) -> Slope:
        """There is none.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError(f"{self.nonlinear}; take influence through=fixed, or re-made steps")


@dataclass(frozen=True, repr=False, kw_only=True)
class BitsAndBytesLion(LionState):
    """bitsandbytes' Lion with its mean in 8 or 32 bits, paged or not, under lion-pytorch's names.

    Where it puts a weight decay, beside the step or into the gradient, is different between its versions and
    devices, so that a state with one is refused.
    """

    label: ClassVar[str] = "bitsandbytes' Lion"
    asked_for: ClassVar[tuple[str, ...]] = ("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit")
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "betas", "eps", "weight_decay"}),
        group_optional=frozenset({"alpha", "t_alpha", "t_beta3"}),
        entry=frozenset({"step", "state1"}),
        entry_optional=frozenset({"qmap1", "absmax1"}),
    )

    @classmethod
    def runs(cls, optimizer: object) -> bool:
        """By name, since the library need not be there."""
        return type(optimizer).__module__ == "bitsandbytes.optim.lion"

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A mean of zero."""
        return {"step": 0, "state1": torch.zeros_like(parameter, dtype=torch.float32)}

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """A decay, and those of bitsandbytes that keep one state and are not Lion.

        Lion alone has two betas above 0 and no eps: SGD keeps its dampening, 0 but for who sets it, as the
        second, RMSprop and Adagrad have an eps.
        """
        if any(group["eps"] or len(group["betas"]) != 2 or not all(group["betas"]) for group in groups):
            return "the state is that of an optimizer of bitsandbytes, not AdamW or Lion"
        if any(group["weight_decay"] for group in groups):
            return "bitsandbytes' Lion has a weight decay, which its versions put into different places"
        return ""

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters, decoded where it is in 8 bits."""
        plain, codes = decoded(saved, {"1": "exp_avg"})
        return replace(super().read(plain), codes=codes)


def _group(saved: SavedGroup) -> LionGroup:
    return LionGroup(**saved.shared, betas=saved.betas)

"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as torch has it.

With x = -c g the clipped ascent, a = x / c, and t the number of the step, a matrix has second moments r' of
its rows and k' of its columns, running means of x^2 over the other dimension in which the new has weight
t^beta2_decay; other parameters have the whole V'. Per parameter,

    V'        = r' k' / mean(r')
    P         = c s / (sqrt(V') max(1, RMS(x / sqrt(V')) / d))
    direction = - wd params + P a
    s         = max(eps2, RMS(params)) min(lr, 1 / sqrt(t)) / lr

There is no first moment: a gradient is in its own step alone. V' and the RMS have the batch in them, as v'
has it in AdamW, and P holds them. The derivative with nothing held is not elementwise; it is taken by
automatic differentiation of P a as it stands here. Above lr = 1 / sqrt(t) a step is not proportional to its
learning rate, and the direction is that at the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.optim.by_parameter import AsWhole, Parts, Place
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedGroup, SavedState

YOUNG = 0.05
"""Weight of a batch in its own second moment from which the batch makes much of it."""


@dataclass(frozen=True)
class AdafactorGroup(ParameterGroup):
    """Hyperparameters of Adafactor under torch's names.

    Attributes:
        beta2_decay: exponent of t in the weight of the new in a running mean.
        eps: least of a second moment's root, or what is added to a square, and least RMS of a parameter; None
            is the spacing of numbers at 1 in the type of the parameter.
        d: from which RMS on the update is made smaller.
        relative: the step is relative to the RMS of the parameter.
    """

    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    relative: bool = True
    foreach: bool | None = None

    @property
    def sizes(self) -> dict[str, float]:
        """Hyperparameters that are finite and at least 0."""
        own = {
            "-beta2_decay": -self.beta2_decay,
            "eps1": self.eps[0] or 0.0,
            "eps2": self.eps[1],
            "d": self.d,
        }
        return own | super().sizes

    def scale(self, parameter: Tensor) -> float:
        """The factor of the learning rate that comes from the parameter."""
        if not self.relative:
            return 1.0
        return max(self.eps[1], float(parameter.detach().double().square().mean().sqrt()))


@dataclass(frozen=True, repr=False, kw_only=True)
class AdafactorState(AsWhole[AdafactorGroup]):
    """torch's Adafactor, matched to parameters by name.

    Attributes:
        groups: parameter groups in the optimizer's order.
        row_var: second moments of rows, (..., rows, 1), of parameters with two dimensions or more.
        col_var: second moments of columns, (..., 1, columns).
        variance: second moments of the other parameters.
    """

    groups: tuple[AdafactorGroup, ...]
    row_var: Mapping[str, Tensor]
    col_var: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]

    label: ClassVar[str] = "Adafactor"
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "beta2_decay", "eps", "d", "weight_decay", "maximize"}),
        group_optional=frozenset({"foreach"}),
        entry=frozenset({"step"}),
        entry_optional=frozenset({"row_var", "col_var", "variance"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adafactor
    passed: ClassVar[tuple[str, ...]] = ("beta2_decay", "eps", "d", "foreach")

    @classmethod
    def shape_in(cls, entry: Mapping[str, Any]) -> tuple[int, ...] | None:
        """From rows and columns, or of the whole second moment."""
        if "variance" in entry:
            return tuple(entry["variance"].shape)
        if "row_var" in entry and "col_var" in entry:
            return (*entry["row_var"].shape[:-1], *entry["col_var"].shape[-1:])
        return None

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters."""
        refuse_incomplete(saved, ("row_var", "col_var"), "variance")
        kept = {name: next(iter(entry.keys() - {"step"})) for name, entry in saved.entries.items()}
        return cls(
            groups=tuple(map(_group, saved.groups)),
            steps=saved.steps(),
            row_var=saved.tensors("row_var", lambda shape: (*shape[:-1], 1)),
            col_var=saved.tensors("col_var", lambda shape: (*shape[:-2], 1, shape[-1])),
            variance=saved.tensors("variance"),
            moment_types={name: saved.entries[name][key].dtype for name, key in kept.items()},
        )

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Second moments of zero."""
        if parameter.dim() < 2:
            return {"step": 0, "variance": torch.zeros_like(parameter)}
        rows = torch.zeros_like(parameter[..., :1])
        return {"step": 0, "row_var": rows, "col_var": torch.zeros_like(parameter[..., :1, :])}

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The second moments."""
        return {"row_var": self.row_var, "col_var": self.col_var, "variance": self.variance}

    @property
    def squares(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.tensors())

    def kept(self, name: str) -> Tensor:
        """A second moment."""
        return self.row_var[name] if name in self.row_var else self.variance[name]

    def parts(self, at: Place[AdafactorGroup]) -> Parts:
        """Decay and P; there is no momentum."""
        factor = at.rate * self._factor(at.group, at.name, at.parameter)
        return Parts(
            torch.zeros_like(at.weights),
            at.decay(at.rate * self._decay(at.group, at.parameter)),
            at.clip * factor * self._inverse(at.group, at.name, at.point),
        )

    def moved(self, at: Place[AdafactorGroup], point: Tensor) -> Tensor:
        """P a: x times what it is multiplied with, the second moments and the RMS not held."""
        factor = at.rate * self._factor(at.group, at.name, at.parameter)
        return factor * point * self._inverse(at.group, at.name, point)

    def carried(self, name: str, horizon: int) -> float:
        """Only the decay changes what a gradient has moved."""
        group = self._group_of(name)
        return (1 - group.lr * group.weight_decay) ** (horizon - 1)

    def own_shares(self, name: str) -> tuple[float, float]:
        """1: there is no momentum."""
        return 1.0, 1.0

    @property
    def youth(self) -> str:
        """A batch has weight t^beta2_decay in the second moment that divides it."""
        age = max(self.steps.values()) + 1
        weight = max(age**group.beta2_decay for group in self.groups)
        if weight < YOUNG:
            return ""
        return f"Adafactor is at step {age}, so the batch makes {weight:.0%} of its own second moment"

    def _inverse(self, group: AdafactorGroup, name: str, point: Tensor) -> Tensor:
        """1 / sqrt(V'), made smaller where the update would be large."""
        inverse = self._root(group, name, point)
        # the square of RMS / d: its root has a derivative where no gradient is
        excess = (inverse * point).square().mean() / group.d**2
        return inverse / excess.clamp(min=1).sqrt()

    def _root(self, group: AdafactorGroup, name: str, point: Tensor) -> Tensor:
        weight, squares = (self.steps[name] + 1) ** group.beta2_decay, point.square()
        least = group.eps[0]
        if least is None:
            least = torch.finfo(self.moment_types[name]).eps
        if name in self.row_var:
            rows = self.row_var[name].lerp(squares.mean(-1, keepdim=True), weight)
            columns = self.col_var[name].lerp(squares.mean(-2, keepdim=True), weight)
            estimate = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=least)
        else:
            estimate = self.variance[name].lerp(squares, weight)
        return estimate.clamp(min=least * least).rsqrt()

    def _factor(self, group: AdafactorGroup, name: str, parameter: Tensor) -> float:
        """s: the update's factor per unit of the group's learning rate, which counts up to 1/sqrt(t)."""
        most = (self.steps[name] + 1) ** -0.5
        return group.scale(parameter) * (min(1.0, most / group.lr) if group.lr > 0 else 1.0)

    def _decay(self, group: AdafactorGroup, parameter: Tensor) -> float:
        return group.weight_decay


def refuse_incomplete(saved: SavedState, factors: tuple[str, str], whole: str) -> None:
    """Raise where a matrix has no second moments of rows and columns, or another parameter none of its own.

    Raises:
        CheckpointError: naming the parameter.
    """
    for name, entry in saved.entries.items():
        wanted = set(factors) if saved.parameters[name].dim() > 1 else {whole}
        if entry.keys() & {*factors, whole} != wanted:
            raise CheckpointError(
                f"{saved.where}: the state of {name} has not {' and '.join(sorted(wanted))} alone as second "
                "moments; copy the file again, or the one that belongs to these weights"
            )


def two_eps(saved: SavedGroup, *, none: bool) -> tuple[float | None, float]:
    """Both of a group.

    Args:
        saved: the group.
        none: whether the first may be None.

    Raises:
        CheckpointError: there are no two numbers.
    """
    eps = saved.pair("eps")
    first = None if none and eps[0] is None else saved.number("eps", eps[0])
    return first, saved.number("eps", eps[1])


def _group(saved: SavedGroup) -> AdafactorGroup:
    return AdafactorGroup(
        **saved.shared,
        beta2_decay=saved.number("beta2_decay"),
        eps=two_eps(saved, none=True),
        d=saved.number("d"),
        foreach=saved.settings.get("foreach"),
    )

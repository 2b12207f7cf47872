"""Schedule-free SGD and AdamW (Defazio et al. 2024, arXiv:2405.15682) as the package schedulefree has them.

There are three points: gradients are taken at y, z takes the steps, x is the average that evaluations use,
and y = (1 - b) z + b x. In training mode the parameters are y, in evaluation mode x. What is measured is y,
the policy that a trainer differentiates and, like TRL, samples from. A checkpoint in evaluation mode is
refused, since its weights are x and the gradient of its next step is not taken there.

With u = c g (SGD) or c g / D (AdamW, D as in :mod:`stepscope.policy.optim.adamw`), k steps taken, s the
factor of the warm-up and w = (k + 1)^r max(lr s)^p the weight of the next step in the average,

    ck        = w / (sum of weights before + w)
    direction = ck (z - y) / lr                      [momentum: the pull of the average]
                - s (1 - b (1 - ck)) wd y            [decay]
                - s (1 - b (1 - ck)) u               [the gradient's part]

The pull is there whatever the learning rate of the step: the direction is that at the checkpoint's own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.numerics.finiteness import whole_number
from stepscope.policy.optim.adamw import YOUNG
from stepscope.policy.optim.by_parameter import ByCoordinate, Parts, Place
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedGroup, SavedState

MANY = 10**6
"""Steps above which sums over them are taken as integrals."""

_AVERAGE = frozenset({"r", "k", "warmup_steps", "train_mode", "weight_sum", "lr_max", "weight_lr_power"})
_OPTIONAL = frozenset({"scheduled_lr", "foreach"})


@dataclass(frozen=True)
class ScheduleFreeGroup(ParameterGroup):
    """Hyperparameters, and where the average is.

    Attributes:
        beta: b, the share of x in y.
        taken: k, steps taken.
        warmup_steps: over which the learning rate rises.
        weight_sum: of the weights so far.
        lr_max: largest learning rate so far.
        r: power of the step's number in its weight.
        power: of the largest learning rate in it.
        beta2: of AdamW's second moment.
        eps: of AdamW.
    """

    beta: float = 0.9
    taken: int = 0
    warmup_steps: int = 0
    weight_sum: float = 0.0
    lr_max: float = 0.0
    r: float = 0.0
    power: float = 2.0
    beta2: float = 0.999
    eps: float = 1e-8

    @property
    def fractions(self) -> dict[str, float]:
        """Hyperparameters that are at least 0 and below 1."""
        return {"beta1": self.beta, "beta2": self.beta2}

    @property
    def sizes(self) -> dict[str, float]:
        """Hyperparameters that are finite and at least 0."""
        own = {"weight_sum": self.weight_sum, "lr_max": self.lr_max, "r": self.r, "eps": self.eps}
        return own | {"weight_lr_power": self.power, "warmup_steps": self.warmup_steps} | super().sizes

    def following(self) -> Iterator[tuple[float, float]]:
        """Warm-up s and share ck of the next step and of those after it."""
        most, weights = self.lr_max, self.weight_sum
        for k in count(self.taken):
            warm = (k + 1) / self.warmup_steps if k < self.warmup_steps else 1.0
            most = max(most, self.lr * warm)
            weight = (k + 1) ** self.r * most**self.power
            weights += weight
            yield warm, weight / weights if weights else 0.0

    def own(self, share: float) -> float:
        """What of a gradient's step goes into y at once, for a share ck."""
        return 1 - self.beta * (1 - share)


@dataclass(frozen=True, repr=False, kw_only=True)
class ScheduleFreeState(ByCoordinate[ScheduleFreeGroup]):
    """The state of either optimizer, matched to parameters by name.

    Attributes:
        groups: parameter groups in the optimizer's order.
        z: the point that takes the steps, per parameter.
        exp_avg_sq: second moment of AdamW, per parameter; empty for SGD.
    """

    groups: tuple[ScheduleFreeGroup, ...]
    z: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]

    blank_entries: ClassVar[bool] = True
    made_by: ClassVar[str]
    """Name of the class in schedulefree."""

    @classmethod
    def runs(cls, optimizer: object) -> bool:
        """By name, since the library need not be there."""
        return (
            type(optimizer).__module__.startswith("schedulefree.") and type(optimizer).__name__ == cls.made_by
        )

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """Weights that are the average."""
        if all(group["train_mode"] is True for group in groups):
            return ""
        return (
            "the weights were saved in the optimizer's evaluation mode: they are the average x, and the "
            "gradient of the next step is taken at another point, y (call optimizer.train() before saving)"
        )

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters."""
        groups = tuple(map(cls._group, saved.groups))
        return cls(
            groups=groups,
            steps={name: group.taken for group in groups for name in group.names},
            z=saved.tensors("z"),
            exp_avg_sq=saved.tensors("exp_avg_sq"),
        )

    @classmethod
    def _group(cls, saved: SavedGroup) -> ScheduleFreeGroup:
        shared, where = saved.shared, saved.where
        if not shared["lr"] > 0:
            raise CheckpointError(
                f"{where}: the learning rate of a parameter group is {shared['lr']}; a schedule-free step "
                "moves parameters at any: it is no direction times 0; measure an earlier checkpoint"
            )
        return ScheduleFreeGroup(
            **shared,
            **cls._betas(saved),
            taken=whole_number(saved.settings["k"], "k of a parameter group", where),
            warmup_steps=whole_number(
                saved.settings["warmup_steps"], "warmup_steps of a parameter group", where
            ),
            weight_sum=saved.number("weight_sum"),
            lr_max=max(0.0, saved.number("lr_max")),
            r=saved.number("r"),
            power=saved.number("weight_lr_power"),
        )

    @classmethod
    @abstractmethod
    def _betas(cls, saved: SavedGroup) -> dict[str, Any]:
        """The fields that the two optimizers name in their own way."""

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All points are one."""
        start = {"z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}
        return {key: value for key, value in start.items() if key in cls.keys.entry}

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """z, and the second moment."""
        return {"z": self.z, "exp_avg_sq": self.exp_avg_sq}

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        """All but z."""
        return ("exp_avg_sq",)

    @property
    def squares(self) -> tuple[str, ...]:
        """The second moment."""
        return ("exp_avg_sq",)

    def kept(self, name: str) -> Tensor:
        """Z."""
        return self.z[name]

    def parts(self, at: Place[ScheduleFreeGroup]) -> Parts:
        """The pull of the average, decay and P."""
        warm, share = next(at.group.following())
        rate = at.rate * warm * at.group.own(share)
        return Parts(
            share / at.lr * (self.z[at.name] - at.weights),
            at.decay(rate * at.group.weight_decay),
            at.clip * rate / self._denominator(at.group, at.name, at.point),
        )

    def derivative(self, at: Place[ScheduleFreeGroup]) -> Tensor:
        """S (1 - b (1 - ck)) (1 / D - x / D^2 dD/dx)."""
        warm, share = next(at.group.following())
        denominator = self._denominator(at.group, at.name, at.point)
        rise = self._rise(at.group, at.name, at.point)
        rate = at.rate * warm * at.group.own(share)
        return rate * (1 / denominator - at.point / denominator**2 * rise)

    def _denominator(self, group: ScheduleFreeGroup, name: str, point: Tensor) -> Tensor:
        """D."""
        return torch.ones_like(point)

    def _rise(self, group: ScheduleFreeGroup, name: str, point: Tensor) -> Tensor:
        """dD/dx."""
        return torch.zeros_like(point)

    def carried(self, name: str, horizon: int) -> float:
        """By the recursion itself, for what one step's gradient leaves in y and z; D is held."""
        group = self._group_of(name)
        following = group.following()
        warm, share = next(following)
        first = warm * group.own(share)
        y, z = first, warm
        for _ in range(horizon - 1):
            warm, share = next(following)
            pull = group.lr * warm * group.weight_decay * y
            y, z = y + share * (z - y) - group.own(share) * pull, z - pull
        return y / first

    def own_shares(self, name: str) -> tuple[float, float]:
        """At a constant learning rate: the gradient of step i has b S_i / S_k in z - y.

        S_i is the sum of j^r for j = 1 to i, and i goes from 1 to k - 1; for very many steps (i/k)^(r + 1).
        """
        group = self._group_of(name)
        _, share = next(group.following())
        own, weight = group.own(share), share * group.beta
        if group.taken > MANY:
            once, squared = group.taken / (group.r + 2), group.taken / (2 * group.r + 3)
        else:
            sums = np.cumsum(np.arange(1, group.taken + 1, dtype=float) ** group.r)
            parts = sums[:-1] / sums[-1] if group.taken else sums
            once, squared = float(parts.sum()), float((parts**2).sum())
        return own**2 / (own**2 + weight**2 * squared), own / (own + weight * once)


@dataclass(frozen=True, repr=False, kw_only=True)
class ScheduleFreeSGD(ScheduleFreeState):
    """schedulefree's ``SGDScheduleFree``."""

    label: ClassVar[str] = "schedule-free SGD"
    asked_for: ClassVar[tuple[str, ...]] = ("schedule_free_sgd",)
    made_by: ClassVar[str] = "SGDScheduleFree"
    keys: ClassVar[Keys] = Keys(
        group=_AVERAGE | {"lr", "momentum", "weight_decay"},
        group_optional=_OPTIONAL,
        entry=frozenset({"z"}),
    )

    @classmethod
    def _betas(cls, saved: SavedGroup) -> dict[str, Any]:
        return {"beta": saved.number("momentum")}


@dataclass(frozen=True, repr=False, kw_only=True)
class ScheduleFreeAdamW(ScheduleFreeState):
    """schedulefree's ``AdamWScheduleFree``."""

    label: ClassVar[str] = "schedule-free AdamW"
    asked_for: ClassVar[tuple[str, ...]] = ("schedule_free_adamw",)
    made_by: ClassVar[str] = "AdamWScheduleFree"
    keys: ClassVar[Keys] = Keys(
        group=_AVERAGE | {"lr", "betas", "eps", "weight_decay"},
        group_optional=_OPTIONAL,
        entry=frozenset({"z", "exp_avg_sq"}),
    )

    @classmethod
    def _betas(cls, saved: SavedGroup) -> dict[str, Any]:
        first, second = saved.betas
        return {"beta": first, "beta2": second, "eps": saved.number("eps")}

    @property
    def youth(self) -> str:
        """As of AdamW."""
        age = max(self.steps.values()) + 1
        if age >= YOUNG:
            return ""
        return f"{self.label} is at step {age}, so the batch makes much of its own second moment"

    def _root(self, group: ScheduleFreeGroup, name: str, point: Tensor) -> Tensor:
        moment = self.exp_avg_sq[name] * group.beta2
        return moment.addcmul_(point, point, value=1 - group.beta2).sqrt()

    def _denominator(self, group: ScheduleFreeGroup, name: str, point: Tensor) -> Tensor:
        correction: float = 1 - group.beta2 ** (group.taken + 1)
        return self._root(group, name, point) / math.sqrt(correction) + group.eps

    def _rise(self, group: ScheduleFreeGroup, name: str, point: Tensor) -> Tensor:
        root = self._root(group, name, point)
        correction: float = 1 - group.beta2 ** (group.taken + 1)
        rise = (1 - group.beta2) * point / (root * math.sqrt(correction))
        return torch.where(root > 0, rise, torch.zeros_like(rise))

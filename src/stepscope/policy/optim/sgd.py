"""SGD with momentum, dampening, Nesterov's step and decay inside the gradient, as ``torch.optim.SGD`` has it.

With x = -c g the clipped ascent, mu the momentum, d the dampening and b the buffer before the step,

    b'        = mu b + (1 - d) (wd params - x)         (b' = wd params - x where there is no b yet)
    direction = -b', or x - wd params - mu b' (Nesterov), or x - wd params where mu is 0

so that every part is a factor times the buffer, the parameters or the gradient; P is one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stepscope.policy.optim.by_parameter import ByCoordinate, Parts, Place
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedState


@dataclass(frozen=True)
class SGDGroup(ParameterGroup):
    """Hyperparameters of SGD; the decay is part of the gradient."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    foreach: bool | None = None
    fused: bool | None = None

    @property
    def fractions(self) -> dict[str, float]:
        """Hyperparameters that are at least 0 and below 1."""
        return {"momentum": self.momentum, "dampening": self.dampening}

    def factors(self, *, begun: bool) -> tuple[float, float, float]:
        """What the direction has of the gradient, what it has of the buffer, what the buffer takes in.

        Args:
            begun: there is a buffer.
        """
        if self.momentum == 0:
            return 1.0, 0.0, 0.0
        taken, kept = (1 - self.dampening, self.momentum) if begun else (1.0, 0.0)
        if self.nesterov:
            return 1 + self.momentum * taken, self.momentum * kept, taken
        return taken, kept, taken


@dataclass(frozen=True, repr=False, kw_only=True)
class SGDState(ByCoordinate[SGDGroup]):
    """SGD's state, matched to parameters by name; without momentum there is none.

    Attributes:
        groups: parameter groups in the optimizer's order.
        buffer: b of the parameters that have one.
    """

    groups: tuple[SGDGroup, ...]
    buffer: Mapping[str, Tensor]

    label: ClassVar[str] = "SGD"
    asked_for: ClassVar[tuple[str, ...]] = ("sgd",)
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"}),
        group_optional=frozenset({"foreach", "differentiable", "fused"}),
        entry=frozenset(),
        entry_optional=frozenset({"momentum_buffer"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.SGD
    passed: ClassVar[tuple[str, ...]] = ("momentum", "dampening", "nesterov", "foreach", "fused")

    @classmethod
    def shape_in(cls, entry: Mapping[str, Any]) -> tuple[int, ...] | None:
        """That of the buffer, where there is one."""
        return tuple(entry["momentum_buffer"].shape) if "momentum_buffer" in entry else None

    @classmethod
    def keeps_nothing(cls, settings: Mapping[str, Any]) -> bool:
        """Without momentum."""
        return not settings["momentum"]

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters."""
        groups = tuple(
            SGDGroup(
                **group.shared,
                momentum=group.number("momentum"),
                dampening=group.number("dampening"),
                nesterov=bool(group.settings["nesterov"]),
                foreach=group.settings.get("foreach"),
                fused=group.settings.get("fused"),
            )
            for group in saved.groups
        )
        return cls(
            groups=groups,
            steps={},
            buffer=saved.tensors("momentum_buffer"),
            moment_types=saved.types("momentum_buffer"),
        )

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The buffers."""
        return {"momentum_buffer": self.buffer}

    def kept(self, name: str) -> Tensor | None:
        """The buffer, where there is one."""
        return self.buffer.get(name)

    def parts(self, at: Place[SGDGroup]) -> Parts:
        """Momentum, decay and P, which is the same for all elements of a parameter."""
        own, kept, _ = at.group.factors(begun=at.name in self.buffer)
        return Parts(
            -at.rate * kept * self.buffer[at.name] if kept else torch.zeros_like(at.ascent),
            at.decay(at.rate * own * at.group.weight_decay),
            torch.full_like(at.ascent, at.rate * own * at.clip),
        )

    def derivative(self, at: Place[SGDGroup]) -> Tensor:
        """P / c: the step is linear in its gradient."""
        own, _, _ = at.group.factors(begun=at.name in self.buffer)
        return torch.full_like(at.ascent, at.rate * own)

    def carried(self, name: str, horizon: int) -> float:
        """By the recursion itself, for what one step's gradient leaves of displacement and buffer."""
        group = self._group_of(name)
        own, _, taken = group.factors(begun=name in self.buffer)
        moved, buffer = own, taken
        following, kept, taken = group.factors(begun=True)
        for _ in range(horizon - 1):
            pull = -group.lr * group.weight_decay * moved
            moved += following * pull + kept * buffer
            buffer = group.momentum * buffer + taken * pull
        return moved / own

    def own_shares(self, name: str) -> tuple[float, float]:
        """After many steps; 1 where there is no buffer."""
        group = self._group_of(name)
        if name not in self.buffer or group.momentum == 0:
            return 1.0, 1.0
        own, kept, taken = group.factors(begun=True)
        mu, earlier = group.momentum, kept * taken
        return own**2 / (own**2 + earlier**2 / (1 - mu**2)), own / (own + earlier / (1 - mu))

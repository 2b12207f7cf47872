"""Muon as ``torch.optim.Muon`` has it (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982): matrices only.

With c g the clipped gradient of a matrix of m rows and n columns, and B the momentum buffer,

    B' = mu B + (1 - mu) c g
    X  = (1 - mu) c g + mu B'  with Nesterov's momentum, else B'
    direction = - r NS(X) - wd params

NS is a number of Newton-Schulz steps from X / max(|X|, eps), each Y -> a Y + (b Y Y' + c (Y Y')^2) Y, which
bring all singular values near 1. r is max(1, m/n)^(1/2), or 0.2 max(m, n)^(1/2) (``match_rms_adamw``). Torch
computes NS in bfloat16, whatever the parameters are, and so the step here is torch's own, taken on a matrix
of zeros. Its derivative is that of the same formula in the precision of the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.optim.base import Through
from stepscope.policy.optim.by_parameter import AsWhole, Parts, Place
from stepscope.policy.optim.nonlinear import NonlinearState
from stepscope.policy.optim.saved import Keys, ParameterGroup, SavedGroup, SavedState

MOST_NS_STEPS = 100
"""From so many Newton-Schulz steps on torch refuses."""

_SCALES = (None, "original", "match_rms_adamw")


@dataclass(frozen=True)
class MuonGroup(ParameterGroup):
    """Hyperparameters of Muon, by torch's names."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None

    @property
    def fractions(self) -> dict[str, float]:
        """Hyperparameters that are at least 0 and below 1."""
        return {"momentum": self.momentum}

    @property
    def sizes(self) -> dict[str, float]:
        """Hyperparameters that are finite and at least 0."""
        return {"eps": self.eps, "ns_steps": self.ns_steps, **super().sizes}

    def scale(self, shape: Sequence[int]) -> float:
        """The factor r of a matrix."""
        rows, columns = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))


@dataclass(frozen=True, repr=False, kw_only=True)
class MuonState(NonlinearState, AsWhole[MuonGroup]):
    """Muon's state, matched to parameters by name.

    Attributes:
        groups: parameter groups in the optimizer's order.
        buffer: B, per parameter.
    """

    groups: tuple[MuonGroup, ...]
    buffer: Mapping[str, Tensor]

    label: ClassVar[str] = "Muon"
    keys: ClassVar[Keys] = Keys(
        group=frozenset(
            {
                *("lr", "weight_decay", "momentum", "nesterov"),
                *("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"),
            }
        ),
        entry=frozenset({"momentum_buffer"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Muon
    passed: ClassVar[tuple[str, ...]] = (
        "momentum",
        "nesterov",
        "ns_coefficients",
        "eps",
        "ns_steps",
        "adjust_lr_fn",
    )
    throughs: ClassVar[tuple[Through, ...]] = ("optimizer",)
    nonlinear: ClassVar[str] = (
        "Muon orthogonalises each gradient matrix as a whole, which is not linear in it"
    )

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named matrices."""
        return cls(
            groups=tuple(map(_group, saved.groups)),
            steps={},
            buffer=saved.tensors("momentum_buffer"),
            moment_types=saved.types("momentum_buffer"),
        )

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A buffer of zeros."""
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The buffers."""
        return {"momentum_buffer": self.buffer}

    def kept(self, name: str) -> Tensor:
        """The buffer."""
        return self.buffer[name]

    def parts(self, at: Place[MuonGroup]) -> Parts:
        """The step without a gradient, the decay, and what the gradient adds."""
        alone = at.rate * self._taken(at.group, at.name, torch.zeros_like(at.ascent))
        whole = at.rate * self._taken(at.group, at.name, at.point)
        return Parts(alone, at.decay(at.rate * at.group.weight_decay), whole - alone)

    def moved(self, at: Place[MuonGroup], point: Tensor) -> Tensor:
        """The formula in the precision of the buffers, without the roundings to bfloat16."""
        return orthogonalised(at.group, self.buffer[at.name], at.rate, point)

    def take(self, copies: Mapping[str, nn.Parameter], *, scale: float | None, lr: float) -> str:
        """One step of torch's Muon from this state, which has one implementation."""
        super().take(copies, scale=scale, lr=lr)
        return "single tensor"

    def _taken(self, group: MuonGroup, name: str, clipped: Tensor) -> Tensor:
        """-r NS(X) as torch computes it, for the clipped -grad Loss of a matrix."""
        matrix = nn.Parameter(torch.zeros_like(clipped))
        matrix.grad = -clipped
        optimizer: Any = torch.optim.Muon([matrix], **self.options(group) | {"lr": 1.0, "weight_decay": 0.0})
        optimizer.state[matrix]["momentum_buffer"] = self.buffer[name].clone()
        optimizer.step()
        return matrix.detach()


def orthogonalised(group: MuonGroup, buffer: Tensor, rate: float, clipped: Tensor) -> Tensor:
    """-rate r NS(X) in the type of its arguments, differentiable in the clipped -grad Loss.

    Args:
        group: hyperparameters.
        buffer: B.
        rate: factor of the whole.
        clipped: c times -grad Loss.

    Pinned by ``tests/policy/test_muon.py`` on ``torch.optim.Muon``, as near as bfloat16 comes.
    """
    gradient = -clipped
    kept = torch.lerp(buffer, gradient, 1 - group.momentum)
    seen = torch.lerp(gradient, kept, group.momentum) if group.nesterov else kept
    wide = seen if seen.shape[0] <= seen.shape[1] else seen.T
    wide = wide / torch.linalg.matrix_norm(wide).clamp(min=group.eps)
    a, b, c = group.ns_coefficients
    for _ in range(group.ns_steps):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    found: Tensor = wide if seen.shape[0] <= seen.shape[1] else wide.T
    return found.mul(-rate * group.scale(seen.shape))


def _group(saved: SavedGroup) -> MuonGroup:
    given = saved.settings
    coefficients, steps, scale = given["ns_coefficients"], given["ns_steps"], given["adjust_lr_fn"]
    sound = isinstance(coefficients, Sequence) and len(coefficients) == 3
    sound = sound and type(steps) is int and 0 <= steps < MOST_NS_STEPS and scale in _SCALES
    if not sound:
        raise CheckpointError(
            f"{saved.where}: ns_coefficients, ns_steps or adjust_lr_fn of a parameter group is not what "
            "torch's Muon takes; copy the file again"
        )
    a, b, c = (saved.number("ns_coefficients", value) for value in coefficients)
    return MuonGroup(
        **saved.shared,
        momentum=saved.number("momentum"),
        nesterov=given["nesterov"],
        ns_coefficients=(a, b, c),
        eps=saved.number("eps"),
        ns_steps=steps,
        adjust_lr_fn=scale,
    )

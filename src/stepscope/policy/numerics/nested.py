"""Activations that torch cannot differentiate twice in forward mode, written out in functions that it can.

``layer_norm``, whose nested rule is there but wrong, is replaced by ``policy.numerics.differentiation`` in
every forward pass; these have no nested rule at all and are replaced only where it is needed. What a model
may use beyond them is guarded by a check against finite differences in ``measure.quantity.values``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stepscope.policy.numerics.differentiation import Substituted


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(x)


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.tanh(F.softplus(x))


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim=dim)
    return value * torch.sigmoid(gate)


_WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Tensor]] = {F.silu: _silu, F.mish: _mish, F.glu: _glu}


class SmoothActivations(Substituted):
    """Context in which the functions above are written out."""

    def __init__(self) -> None:
        super().__init__(_WRITTEN_OUT)

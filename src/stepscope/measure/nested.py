"""Nested forward-mode differentiation that is right: functions torch cannot differentiate twice, written out.

torch has no second forward derivative of some activations, and for ``layer_norm`` it has a wrong one (its
formula takes the saved statistics for constants). Inside :func:`twice_differentiable` they are composed of
elementary functions instead. What a model may use beyond them is guarded by a check against finite
differences in ``measure.line``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(x)


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.tanh(F.softplus(x))


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim=dim)
    return value * torch.sigmoid(gate)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    scaled = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


_WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.silu: _silu,
    F.mish: _mish,
    F.glu: _glu,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
}


class twice_differentiable(TorchFunctionMode):  # noqa: N801
    """Context in which the functions above are written out; works for the first derivative too."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the written-out function where there is one."""
        return _WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))

"""Model code that PyTorch cannot differentiate twice in forward mode, replaced by code that it can.

``torch.func.jvp`` of ``torch.func.jvp`` through ``torch.nn.functional.layer_norm`` is silently wrong (PyTorch
2.13): the inner rule treats the saved mean and scale as constants. Written out in elementary operations
the same function has the right derivatives of every order. ``tests/policy/test_differentiation.py``
shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Elementary(TorchFunctionMode):
    """Sends calls of ``layer_norm`` to the version in elementary operations."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.layer_norm:
            return layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` in elementary operations; half types are normalised in float32."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    centred = wide - wide.mean(dims, keepdim=True)
    result = (centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)).to(input.dtype)
    if weight is not None:
        result = result * weight
    return result if bias is None else result + bias


def twice_differentiable(model: nn.Module) -> AbstractContextManager[Any]:
    """A block in which forward mode can be nested through the model; nothing for one without LayerNorm."""
    return _Elementary() if any(isinstance(m, nn.LayerNorm) for m in model.modules()) else nullcontext()

"""Linear maps in forward mode without products with tangents that are zero.

Torch's rule for a matrix product, x' W + x W', makes a zero matrix of a tangent that is not there and
multiplies by it: with frozen weights (LoRA) half as much again for nothing. Here only what moves is
multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from stepscope.policy.numerics.differentiation import Substituted


@contextmanager
def sparing_linear() -> Iterator[None]:
    """Inside, at a dual level, linear maps multiply by the tangents that are there alone."""
    with Substituted({functional.linear: linear, torch.addmm: addmm}):
        yield


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of dual numbers."""
    x, dx = _parts(input)
    w, dw = _parts(weight)
    b, db = (None, None) if bias is None else _parts(bias)
    value = functional.linear(x, w, b)
    moves = [] if dx is None else [functional.linear(dx, w)]
    if dw is not None:
        moves.append(functional.linear(x, dw, db))
    elif db is not None:
        moves.append(db.expand_as(value))
    if not moves:
        return value
    tangent = moves[0] if len(moves) == 1 else moves[0] + moves[1]
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    """``torch.addmm`` of dual numbers: the linear map of GPT-2's layers."""
    if scales or input.dim() != 1:
        return torch.addmm(input, mat1, mat2, **scales)
    return linear(mat1, mat2.T, input)


def _parts(value: Tensor) -> tuple[Tensor, Tensor | None]:
    found: tuple[Tensor, Tensor | None] = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return found

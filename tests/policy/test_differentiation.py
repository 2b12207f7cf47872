"""Nested forward mode through LayerNorm: wrong in PyTorch, right in ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm as torch_layer_norm

from stepscope.policy.differentiation import layer_norm, twice_differentiable

X = torch.linspace(-2, 3, 24, dtype=torch.float64).reshape(3, 8).sin()
V = torch.linspace(1, 5, 24, dtype=torch.float64).reshape(3, 8).cos()


def curvature_error(norm: Callable[[Tensor], Tensor]) -> float:
    """Relative error of jvp of jvp against a central difference of jvp."""

    def slope(x: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(lambda a: norm(a).pow(3).sum(), (x,), (V,))[1]
        return found

    curvature = float(torch.func.jvp(slope, (X,), (V,))[1])
    expected = float(slope(X + 1e-5 * V) - slope(X - 1e-5 * V)) / 2e-5
    return abs(curvature - expected) / abs(expected)


def test_ours_is_right_and_the_reason_for_it_still_stands() -> None:
    assert curvature_error(lambda x: layer_norm(x, (8,))) < 1e-6
    assert curvature_error(lambda x: torch_layer_norm(x, (8,))) > 1e-2, "PyTorch mended it: drop this module"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_pytorchs(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(8, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
        norm.bias.copy_(torch.linspace(-1, 1, 8))
    found = []
    for context in (twice_differentiable(norm), twice_differentiable(nn.Linear(1, 1))):
        x = X.to(dtype).requires_grad_(True)
        with context:
            y = norm(x)
        found.append((y, *torch.autograd.grad((y * V.to(dtype)).sum(), [x, norm.weight, norm.bias])))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

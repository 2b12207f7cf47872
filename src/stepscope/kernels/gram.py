"""Kernels that are functions of Gram matrices: entry, and the two diagonal entries it lies between."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stepscope.errors import MeasurementError

KernelName = Literal["squared_exponential", "arc_cosine", "linear"]

TINY = 1e-300
"""Keeps 0/0 from the derivatives at a point of no length."""


class _ArcCosine(torch.autograd.Function):
    """J(c, a, b) = (s + (pi - t) c) / pi, s = sqrt(ab - c^2), t = atan2(s, c).

    Its own derivatives, dJ/dc = (pi - t)/pi, dJ/da = s/(2 pi a), are finite where those of acos are not
    (c^2 = ab, the whole diagonal), so no argument has to be kept away from one.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        s = (a * b - c * c).clamp(min=0).sqrt()
        rest = math.pi - torch.atan2(s, c)
        ctx.save_for_backward(s, rest, a, b)
        return (s + rest * c) / math.pi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, rest, a, b = ctx.saved_tensors
        half = grad * s / (2 * math.pi)
        return (
            grad * rest / math.pi,
            (half / a.clamp(min=TINY)).sum_to_size(a.shape),
            (half / b.clamp(min=TINY)).sum_to_size(b.shape),
        )


class GramKernel(nn.Module):
    """k(c; a, b) of an entry c = G_ij of a Gram matrix with diagonal entries a = G_ii, b = G_jj.

    With weight w, bias h and amplitude v, all learned in logarithms from w = v = 1:

    - ``squared_exponential``: v exp(-w ((a + b)/2 - c));
    - ``arc_cosine``: J(wc + h; wa + h, wb + h) = 2 E[relu(x) relu(y)] (x, y) normal with those covariances
      (Cho and Saul 2009, order 1): what a wide ReLU layer with the weight's and bias's variances does;
    - ``linear``: wc + h.

    Args:
        name: one of the three.
        bias: h to begin with; 0 holds it there.

    Raises:
        MeasurementError: another name, or a negative bias.
    """

    def __init__(self, name: KernelName, bias: float = 0.1) -> None:
        super().__init__()
        if name not in get_args(KernelName):
            raise MeasurementError(f"kernel: got {name!r}, expected one of {', '.join(get_args(KernelName))}")
        if not 0 <= bias < math.inf:
            raise MeasurementError(f"kernel {name}: bias is {bias}, expected a finite number, not negative")
        self.name = name
        self.log_weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.log_amplitude = self.log_bias = None
        if name == "squared_exponential":
            self.log_amplitude = nn.Parameter(torch.zeros((), dtype=torch.float64))
        elif bias > 0:
            self.log_bias = nn.Parameter(torch.tensor(math.log(bias), dtype=torch.float64))

    def forward(self, entries: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Kernel of every entry (i, j), given G_ii (i, 1) and G_jj (1, j), or all of one shape."""
        c, a, b = (x * self.log_weight.exp() for x in (entries, rows, columns))
        if self.log_amplitude is not None:
            return (self.log_amplitude - (a + b) / 2 + c).exp()
        if self.log_bias is not None:
            c, a, b = (x + self.log_bias.exp() for x in (c, a, b))
        if self.name == "linear":
            return c
        out: Tensor = _ArcCosine.apply(c, a, b)  # type: ignore[no-untyped-call]
        return out

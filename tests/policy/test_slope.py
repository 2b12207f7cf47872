"""The derivative of what an optimizer makes of a gradient, and its transpose, against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepscope.policy import vectors
from stepscope.policy.optim.slope import Differentiated, Elementwise

SHAPES = {"matrix": (3, 4), "bias": (5,)}


def drawn(seed: int, rows: tuple[int, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(*rows, *shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()
    }


def by_rms(x: Tensor) -> Tensor:
    """Every coordinate over the root mean square of all, so that each answers to each."""
    return x / x.square().mean().sqrt()


def test_a_differentiated_slope_is_that_of_differences_and_has_its_transpose() -> None:
    point, change, rows = drawn(0), drawn(1), drawn(2, (2,))
    slope = Differentiated(dict.fromkeys(SHAPES, by_rms), point)
    h = 1e-6
    along = slope.along(change)
    for n, x in point.items():
        moved = (by_rms(x + h * change[n]) - by_rms(x - h * change[n])) / (2 * h)
        torch.testing.assert_close(along[n], moved, rtol=1e-7, atol=1e-9)
    pulled = slope.pulled(rows)
    for i in range(2):
        one = {n: t[i] for n, t in rows.items()}
        back = {n: t[i] for n, t in pulled.items()}
        assert vectors.dot(along, one) == pytest.approx(vectors.dot(change, back), rel=1e-12)


def test_an_elementwise_slope_is_its_own_transpose() -> None:
    diagonal, change, rows = drawn(0), drawn(1), drawn(2, (2,))
    slope = Elementwise(diagonal)
    torch.testing.assert_close(slope.along(change)["bias"], diagonal["bias"] * change["bias"])
    torch.testing.assert_close(slope.pulled(rows)["matrix"][1], diagonal["matrix"] * rows["matrix"][1])

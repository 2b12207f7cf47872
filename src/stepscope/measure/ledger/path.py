"""The path of a training: where its parameters were, what each step was made of, and where F is looked at.

F is differentiated at *knots*: every K-th place of the path, counted from its end, and its start. Between two
knots the gradient is interpolated linearly in the number of steps, and a step takes the mean of the gradients
before and after it (the trapezoid, which cancels curvature):

    G_j = (grad F(theta_j) + grad F(theta_{j+1})) / 2 = sum over knots k of w_kj grad F(theta_k)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.ledger.adjoint import TakenStep, carried_moment
from stepscope.policy import vectors
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Brief, FloatArray, Rollouts


@dataclass(frozen=True, repr=False, kw_only=True)
class PathStep(Brief):
    """One step of a training.

    Attributes:
        number: of optimizer steps after it.
        taken: what the optimizer did.
        update: the batch that made the step.
        token_weights: w_ik = -dLoss/dl_ik before clipping, one (tok,) array per sequence.
        entropy_weights: -dLoss/dH_ik of an entropy bonus, likewise; None without one.
    """

    number: int
    taken: TakenStep
    update: Rollouts
    token_weights: tuple[FloatArray, ...]
    entropy_weights: tuple[FloatArray, ...] | None = None


class Path(Protocol):
    """Steps 0, 1, ... of a training between two places, read when they are asked for."""

    def __len__(self) -> int:
        """Number of steps."""
        ...

    def parameters(self, place: int) -> ParameterVector:
        """Theta before step ``place``; after the last step for ``len(path)``."""
        ...

    def step(self, place: int) -> PathStep:
        """The step from ``place`` to ``place`` + 1."""
        ...

    def first_moment(self) -> tuple[ParameterVector, Mapping[str, int]]:
        """The optimizer's ``exp_avg`` before step 0, and its count of steps then, by parameter."""
        ...


def knots(count: int, every: int) -> tuple[int, ...]:
    """Places where the quantity is differentiated, increasing: 0, and every K-th counted back from the end.

    Raises:
        MeasurementError: no steps, or K below 1.
    """
    if count < 1:
        raise MeasurementError(f"a path of {count} steps has nothing to account for; take at least one")
    if every < 1:
        raise MeasurementError(f"every={every}, expected at least 1; 1 takes every step")
    return tuple(sorted({0, *range(count, 0, -every)}))


def knot_weights(count: int, places: Sequence[int]) -> FloatArray:
    """(knot, step) w_kj; each column adds up to one."""
    hats = np.array([np.interp(np.arange(count + 1), places, row) for row in np.eye(len(places))])
    return np.asarray((hats[:, :-1] + hats[:, 1:]) / 2, dtype=np.float64)


def displacement(path: Path, place: int) -> dict[str, Tensor]:
    """Theta after a step less theta before it."""
    before, after = path.parameters(place), path.parameters(place + 1)
    return {name: after[name] - before[name] for name in before}


def displacement_parts(
    path: Path, place: int, before: tuple[ParameterVector, Mapping[str, int]]
) -> dict[str, dict[str, Tensor]]:
    """A step's displacement and two parts of it.

    Args:
        path: the training.
        place: which step.
        before: :meth:`Path.first_moment`.

    Returns:
        ``whole`` (as it is), ``momentum_before`` (what the moment before step 0 moves) and ``decay`` (beside
        the gradient).
    """
    taken = path.step(place).taken
    return {
        "whole": displacement(path, place),
        "momentum_before": carried_moment(taken, *before),
        "decay": taken.decay(path.parameters(place)),
    }


def parts_along(path: Path, weights: Sequence[Mapping[int, float]]) -> list[dict[str, dict[str, Tensor]]]:
    """Weighted sums over steps of the displacement and of two of its parts.

    Args:
        path: the training.
        weights: for every sum wanted, step to weight.

    Returns:
        For every sum the parts of :func:`displacement_parts`.
    """
    before = path.first_moment()
    found: list[dict[str, dict[str, Tensor]]] = [
        {name: vectors.zeros_like(before[0]) for name in ("whole", "momentum_before", "decay")}
        for _ in weights
    ]
    for place in sorted({place for row in weights for place in row}):
        parts = displacement_parts(path, place, before)
        for sums, row in zip(found, weights, strict=True):
            for name, part in parts.items():
                for key, value in part.items():
                    if weight := row.get(place, 0.0):
                        sums[name][key].add_(value.to(sums[name][key].dtype), alpha=weight)
    return found

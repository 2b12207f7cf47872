"""Regressions by the machines of :mod:`stepscope.kernels`, on inputs and outputs as they come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stepscope.kernels import DeepKernelMachine
from stepscope.results import FloatArray

Machine = Literal["gaussian_process", "deep_kernel"]

RATE, JITTER = 3e-2, 1e-6
"""Of Adam; and on the kernel of the inducing points."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """How a machine is fitted.

    Attributes:
        inducing: inducing points.
        width: nu of the deep kernel machine, which has two layers.
        steps: of Adam.
        seed: of the choice of inducing points.
    """

    inducing: int = 50
    width: float = 1000.0
    steps: int = 200
    seed: int = 0


def regressed(
    machine: Machine, x: FloatArray, y: FloatArray, asked: FloatArray, options: MachineOptions
) -> FloatArray:
    """(t,) predictions at (t, feature) inputs of a machine fitted to (n, feature) inputs and (n,) outputs.

    Inputs and outputs are scaled by the mean and spread of those it is fitted to; a sparse Gaussian process
    is a machine without layers.

    Args:
        machine: which.
        x: inputs.
        y: outputs.
        asked: where to predict.
        options: how it is fitted.

    Raises:
        MeasurementError: inputs or outputs that are not finite.
    """
    spread = x.std(0)
    shift, spread = x.mean(0), np.where(spread > 1e-12, spread, 1.0)
    level, size = float(y.mean()), float(y.std()) or 1.0
    deep = machine == "deep_kernel"
    fitted = DeepKernelMachine(
        torch.from_numpy((x - shift) / spread),
        torch.from_numpy((y - level) / size)[:, None],
        layers=2 if deep else 0,
        width=options.width if deep else math.inf,
        inducing=min(options.inducing, len(y)),
        jitter=JITTER,
        seed=options.seed,
    )
    fitted.fit(options.steps, RATE)
    mean, _ = fitted.predict(torch.from_numpy((asked - shift) / spread))
    return np.asarray(mean[:, 0].numpy() * size + level, dtype=np.float64)

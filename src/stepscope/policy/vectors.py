"""Vectors in parameter space: dictionaries of tensors keyed by ``named_parameters()`` names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.results.arrays import ARRAYS_METADATA
from stepscope.results.files import whole

ParameterVector = Mapping[str, Tensor]


def dot(a: ParameterVector, b: ParameterVector) -> float:
    """Inner product sum_i a_i b_i, accumulated tensor by tensor in float64."""
    return float(sum(torch.dot(a[n].reshape(-1).double(), b[n].reshape(-1).double()) for n in a))


def norm(a: ParameterVector) -> float:
    """Euclidean norm, accumulated in float64."""
    return math.sqrt(dot(a, a))


def cosine(a: ParameterVector, b: ParameterVector) -> float:
    """Cosine of the angle between two vectors; nan when one of them is zero."""
    scale = norm(a) * norm(b)
    return dot(a, b) / scale if scale > 0 else float("nan")


def add(*vectors: ParameterVector) -> dict[str, Tensor]:
    """The sum of vectors over the same parameters."""
    first, *rest = vectors
    total = {n: t.clone() for n, t in first.items()}
    for vector in rest:
        for n, t in vector.items():
            total[n] += t
    return total


def scale(a: ParameterVector, factor: float) -> dict[str, Tensor]:
    """``factor * a``."""
    return {n: factor * t for n, t in a.items()}


def multiply(a: ParameterVector, b: ParameterVector) -> dict[str, Tensor]:
    """Elementwise product, as for a diagonal preconditioner."""
    return {n: a[n] * t for n, t in b.items()}


def zeros_like(a: ParameterVector) -> dict[str, Tensor]:
    """The zero vector over the same parameters."""
    return {n: torch.zeros_like(t) for n, t in a.items()}


def save(vector: ParameterVector, path: Path) -> None:
    """Write the vector as safetensors, atomically."""
    plain = {n: t.detach().contiguous().cpu() for n, t in vector.items()}
    whole(path, lambda partial: save_file(plain, str(partial), ARRAYS_METADATA))


def load(path: Path) -> dict[str, Tensor]:
    """Read a vector written by :func:`save`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}); copy or write it again"
        ) from error


@contextmanager
def shifted(parameters: Mapping[str, nn.Parameter], direction: ParameterVector, lr: float) -> Iterator[None]:
    """Set parameters to ``params + lr * direction`` inside the block; restored bitwise afterwards."""
    with _restored(parameters, direction):
        with torch.no_grad():
            for n, t in direction.items():
                parameters[n].add_(t.to(parameters[n].dtype), alpha=lr)
        yield


@contextmanager
def placed(parameters: Mapping[str, nn.Parameter], values: ParameterVector) -> Iterator[None]:
    """Set parameters to ``values`` inside the block; restored bitwise afterwards."""
    with _restored(parameters, values):
        with torch.no_grad():
            for n, t in values.items():
                parameters[n].copy_(t)
        yield


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> Iterator[None]:
    kept = {n: parameters[n].detach().clone() for n in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for n, t in kept.items():
                parameters[n].copy_(t)

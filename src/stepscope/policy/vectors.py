"""Vectors in parameter space: dictionaries of tensors keyed by ``named_parameters()`` names.

Those of a sharded policy have sharded tensors (:mod:`stepscope.policy.shards`). A *stack* of vectors has
tensors of shape (row, ...parameter shape), whose rows are one vector each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.group import current
from stepscope.policy.shards import dealt, is_sharded, of_parts, part, sum_over_parts, whole
from stepscope.results import FloatArray, IntArray, files
from stepscope.results.arrays import ARRAYS_METADATA

ParameterVector = Mapping[str, Tensor]


def dot(a: ParameterVector, b: ParameterVector) -> float:
    """Inner product sum_i a_i b_i, accumulated tensor by tensor in float64."""
    return float(sum_over_parts(torch.as_tensor(sum(_products(a, b))), a.values()))


def dots_by_name(a: ParameterVector, b: ParameterVector) -> dict[str, float]:
    """The inner product of each parameter's own coordinates."""
    return dict(zip(a, sum_over_parts(torch.stack(_products(a, b)), a.values()).tolist(), strict=True))


def stack_dots(stack: ParameterVector, a: ParameterVector) -> FloatArray:
    """(row,) inner products of a stack of vectors with one vector, accumulated in float64."""
    total: Tensor | float = 0.0
    for n, rows in stack.items():
        own = part(rows).flatten(1).double()
        total = total + (own @ part(a[n]).reshape(-1).to(own.device).double()).cpu()
    assert isinstance(total, Tensor)
    found: FloatArray = sum_over_parts(total, stack.values()).numpy()
    return found


def mixed(stack: ParameterVector, weights: FloatArray) -> dict[str, Tensor]:
    """The vector sum_r weights_r stack_r; with (row', row) weights the stack of those."""
    found = {}
    for n, rows in stack.items():
        own = part(rows)
        chosen = torch.as_tensor(weights, dtype=own.dtype, device=own.device)
        found[n] = of_parts(torch.tensordot(chosen, own, 1), rows, leading=chosen.dim() - 1)
    return found


def rows(stack: ParameterVector, index: IntArray) -> dict[str, Tensor]:
    """Some rows of a stack, as a stack."""
    return {n: of_parts(part(t)[torch.as_tensor(index)], t) for n, t in stack.items()}


def row(stack: ParameterVector, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One row of a stack, as a vector of another type."""
    return {n: of_parts(part(t)[index].to(dtype), t, leading=0) for n, t in stack.items()}


def add_multiples(stack: ParameterVector, weights: FloatArray, a: ParameterVector) -> None:
    """Add weights_r times a vector to each row of a stack, in place."""
    for n, rows in stack.items():
        own = part(rows)
        factors = torch.as_tensor(weights, dtype=own.dtype, device=own.device)
        own += factors.reshape(-1, *[1] * (own.dim() - 1)) * part(a[n]).to(own)


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


def vector_bytes(parameters: ParameterVector) -> int:
    """What one vector takes on a process, of numbers of 4 bytes at least."""
    held = sum(p.numel() * max(4, p.element_size()) for p in parameters.values())
    return -(-held // (current().size if any(map(is_sharded, parameters.values())) else 1))


def save(vector: ParameterVector, path: Path) -> None:
    """Write the vector as safetensors, atomically; one tensor is gathered and written at a time.

    Of a sharded vector every process calls this, and the first one writes.
    """
    split = any(map(is_sharded, vector.values()))
    if split and not current().is_main:
        for tensor in vector.values():
            whole(tensor)
        return
    if split:
        files.whole(path, lambda partial: _write(vector, partial))
        return
    plain = {n: t.detach().contiguous().cpu() for n, t in vector.items()}
    files.whole(path, lambda partial: save_file(plain, str(partial), ARRAYS_METADATA))


def _write(vector: ParameterVector, path: Path) -> None:
    """The layout of safetensors, whose own writer wants all tensors at once.

    That is the header's length, the header, and each tensor's numbers in its order.
    """
    header: dict[str, Any] = {"__metadata__": ARRAYS_METADATA}
    stop = 0
    for name, tensor in vector.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        kind = _KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in vector.values():
            numbers = whole(tensor.detach()).contiguous().cpu()
            file.write(numbers.reshape(-1).view(torch.uint8).numpy().data)


_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load(path: Path, like: ParameterVector | None = None) -> dict[str, Tensor]:
    """Read a vector written by :func:`save`.

    Args:
        path: the file.
        like: the parameters of a sharded policy, of which each process gets its own part: the first one reads
            a tensor at a time and deals it out. None reads it whole, here.

    Raises:
        CheckpointError: the file is missing or damaged, or has other parameters.
    """
    try:
        if like is None:
            return dict(load_file(str(path)))
        group = current()
        about = group.from_main(lambda: _about(path, like))
        with ExitStack() as stack:
            stored: Any = stack.enter_context(safe_open(path, framework="pt")) if group.is_main else None
            rows = {
                name: dealt(None if stored is None else stored.get_tensor(name), own, about[name], group)
                for name, own in like.items()
            }
        return {name: of_parts(rows[name], own) for name, own in like.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}); copy or write it again"
        ) from error


def _about(path: Path, like: ParameterVector) -> dict[str, torch.dtype]:
    """The types of the tensors in a file, which are those of given parameters."""
    names = {kind: dtype for dtype, kind in _KINDS.items()}
    with safe_open(path, framework="pt") as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
    shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
    expected = {name: tuple(own.shape) for name, own in like.items()}
    if odd := sorted(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name)):
        raise CheckpointError(
            f"{path}: {odd[0]} has shape {shapes.get(odd[0])}, expected {expected.get(odd[0])}; rebuild the "
            "step"
        )
    return {name: names[found.get_dtype()] for name, found in slices.items()}


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


def _products(a: ParameterVector, b: ParameterVector) -> list[Tensor]:
    """Of each parameter's coordinates that this process holds."""
    return [torch.dot(part(a[n]).reshape(-1).double(), part(b[n]).reshape(-1).double()) for n in a]

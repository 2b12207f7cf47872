"""Per-sequence gradients of a block of sequences, held in memory or on disk, and their inner products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stepscope.policy.gradients.layer_gradient import LayerGradient, ghost_inner, orient
from stepscope.policy.group import current
from stepscope.policy.shards import part
from stepscope.policy.vectors import ParameterVector

Metrics = Mapping[str, ParameterVector | None]
"""Name to diagonal metric P by parameter name; None is the identity."""

CHUNK_BYTES = 32 * 2**20
NUMBER_BYTES = 4
ROW_BLOCK = 32
"""Smallest block of rows in square products; of more rows than this, one triangle of blocks is multiplied."""


class GradientStore:
    """The gradients of ``count`` sequences, one matrix per parameter.

    A parameter is kept as a dense (seq, rows * cols) matrix or, where that takes less than half the room (a
    vocabulary-sized matrix against a short text), as the factors it came in. With a directory, dense matrices
    live in memory-mapped files there.

    Inner products are float64, multiplied in the type of the gradients; one for each metric: a diagonal P by
    parameter name, or None for the identity.
    """

    def __init__(self, count: int, metrics: Metrics, *, directory: Path | None = None) -> None:
        self._count = count
        self._metrics = metrics
        self._directory = directory
        self._dense: dict[str, Tensor] = {}
        self._factors: dict[str, list[tuple[slice, LayerGradient]]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._transposed: dict[str, bool] = {}

    def put(self, gradient: LayerGradient, rows: slice) -> None:
        """Keep the gradient of the sequences at ``rows`` of this block."""
        name, (height, width) = gradient.name, gradient.shape
        if name not in self._shapes:
            self._shapes[name], self._transposed[name] = gradient.shape, gradient.transposed
            if 2 * gradient.factor_numel >= height * width:
                like = gradient.dense(0, 1)
                self._dense[name] = self._allocate(name, height * width, like.dtype, like.device)
        if name in self._dense:
            out = self._dense[name][rows].view(rows.stop - rows.start, height, width)
            gradient.dense(out=out)
        else:
            self._factors.setdefault(name, []).append((rows, gradient))

    def hold(self, gradient: LayerGradient, rows: slice) -> None:
        """Keep the gradient in the form it came in, without a copy."""
        self._shapes[gradient.name], self._transposed[gradient.name] = gradient.shape, gradient.transposed
        self._factors.setdefault(gradient.name, []).append((rows, gradient))

    def _allocate(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = self._count * numel
        if self._directory is not None:
            path = self._directory / f"{len(self._dense)}.gradients"
            found = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        else:
            found = torch.zeros(size, dtype=dtype, device=device)
        return found.view(self._count, numel)

    def exchange(self, device: torch.device) -> None:
        """Put the rows of all processes together: each then holds the gradients of the whole block.

        Args:
            device: where gradients are.
        """
        group = current()
        if group.size == 1 or group.lockstep:
            return
        types = {name: dense.dtype for name, dense in self._dense.items()}
        own = {name: (shape, self._transposed[name], types.get(name)) for name, shape in self._shapes.items()}
        every: dict[str, tuple[tuple[int, int], bool, torch.dtype | None]] = {}
        for about in group.gather(own):
            for name, (shape, transposed, dtype) in about.items():
                every[name] = shape, transposed, dtype or every.get(name, (shape, transposed, None))[2]
        for name, (shape, transposed, dtype) in every.items():
            self._shapes[name], self._transposed[name] = shape, transposed
            pieces = self._factors.pop(name, [])
            if dtype is None:
                told = group.gather([(rows, gradient.to("cpu")) for rows, gradient in pieces])
                self._factors[name] = [(rows, g.to(device)) for some in told for rows, g in some]
                continue
            if name not in self._dense:
                self._dense[name] = self._allocate(name, shape[0] * shape[1], dtype, device)
            for rows, gradient in pieces:
                self._dense[name][rows] += gradient.dense().flatten(1)
            group.sum_([self._dense[name]])
        self._shapes = {name: self._shapes[name] for name in every}

    def _chunks(self, name: str, turn: Iterator[int] | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Slices of the parameter's rows and the (seq, numbers) matrix of this block there.

        Args:
            name: of the parameter.
            turn: whose turn it is to have the next slice; all slices are this process's without.
        """
        height, width = self._shapes[name]
        step = max(1, min(height, CHUNK_BYTES // max(1, self._count * width * NUMBER_BYTES)))
        for start in range(0, height, step):
            stop = min(start + step, height)
            if turn is not None and next(turn) != current().rank:
                continue
            if name in self._dense:
                yield start, stop, self._dense[name][:, start * width : stop * width]
            else:
                pieces = self._factors[name]
                parts = [g.dense(start, stop).flatten(1) for _, g in pieces]
                chunk = torch.cat(parts) if len(parts) > 1 else parts[0]
                if len(chunk) != self._count:
                    full = chunk.new_zeros(self._count, chunk.shape[1])
                    full[torch.cat([torch.arange(r.start, r.stop) for r, _ in pieces])] = chunk
                    chunk = full
                yield start, stop, chunk

    def square(self) -> dict[str, Tensor]:
        """(seq, seq) inner products g_i' P g_j of this block's gradients; parameters are shared out."""
        group = current()
        total = {m: torch.zeros(self._count, self._count, dtype=torch.float64) for m in self._metrics}
        turn = itertools.cycle([group.rank] if group.lockstep else range(group.size))
        for name in self._shapes:
            flat = {
                metric: None
                if w is None
                else orient(part(w[name]), self._shapes[name], self._transposed[name])
                for metric, w in self._metrics.items()
            }
            ghost = self._ghost(name) if any(w is None for w in flat.values()) else None
            if ghost is not None and next(turn) == group.rank:
                for metric in (m for m, w in flat.items() if w is None):
                    _accumulate(total, metric, ghost)
            if ghost is not None and all(w is None for w in flat.values()):
                continue
            for start, stop, matrix in self._chunks(name, turn):
                for metric, weights in flat.items():
                    if weights is None and ghost is not None:
                        continue
                    weighted = _weigh(matrix, weights, start, stop)
                    _accumulate(total, metric, _symmetric_product(weighted, matrix))
        group.sum_(total.values())
        return total

    def _ghost(self, name: str) -> Tensor | None:
        """Inner products straight from the factors where that costs less than making the matrices."""
        pieces = self._factors.get(name)
        if not pieces:
            return None
        height, width = self._shapes[name]
        positions = max(g.factor_numel for _, g in pieces) / (height + width)
        if positions**2 * (height + width) >= height * width * (1 + positions / self._count):
            return None
        result = torch.zeros(self._count, self._count, dtype=torch.float64)
        for rows, a in pieces:
            for cols, b in pieces:
                if rows.start <= cols.start:
                    product = ghost_inner(a, b)
                    if product is None:
                        return None
                    result[rows, cols] = product.double().cpu()
                    result[cols, rows] = product.double().cpu().T
        return result

    def paired(self, gradient: LayerGradient, rows: slice) -> dict[str, Tensor]:
        """(seq,) inner products h_i' P g_i with other gradients h of the block's sequences at ``rows``."""
        return self._multiplied(gradient, lambda others, chunk: torch.linalg.vecdot(others, chunk[rows]))

    def cross(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """(other, seq) inner products h_e' P g_i with the gradients h of other sequences."""
        return self._multiplied(gradient, lambda others, chunk: others @ chunk.T)

    def _multiplied(
        self, gradient: LayerGradient, multiply: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Products of P times other gradients with the block's own, added up over chunks of the parameter."""
        total: dict[str, Tensor] = {}
        if gradient.name not in self._shapes:
            return total
        flat = self._oriented(gradient)
        for start, stop, chunk in self._chunks(gradient.name):
            others = gradient.dense(start, stop).flatten(1)
            for metric, weights in flat.items():
                _accumulate(total, metric, multiply(_weigh(others, weights, start, stop), chunk))
        return total

    def norms(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """(other,) squared norms h_e' P h_e of the gradients of other sequences."""
        total: dict[str, Tensor] = {}
        flat = self._oriented(gradient)
        for start, stop in gradient.row_slices(len(gradient.dense(0, 1)), CHUNK_BYTES, NUMBER_BYTES):
            matrix = gradient.dense(start, stop).flatten(1)
            for metric, weights in flat.items():
                weighted = _weigh(matrix, weights, start, stop)
                _accumulate(total, metric, torch.linalg.vecdot(weighted, matrix))
        return total

    def _oriented(self, gradient: LayerGradient) -> dict[str, Tensor | None]:
        name = gradient.name
        return {m: None if w is None else gradient.oriented(part(w[name])) for m, w in self._metrics.items()}


def _weigh(matrix: Tensor, weights: Tensor | None, start: int, stop: int) -> Tensor:
    return matrix if weights is None else matrix * weights[start:stop].reshape(-1).to(matrix.dtype)


def _symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """A b' known to be symmetric: only its lower triangle of blocks is multiplied."""
    count = len(a)
    size = max(ROW_BLOCK, count // 32)
    if count <= size:
        return a @ b.T
    result = a.new_empty(count, count)
    for start in range(0, count, size):
        stop = min(start + size, count)
        block = a[start:] @ b[start:stop].T
        result[start:, start:stop] = block
        result[start:stop, start:] = block.T
    return result


def _accumulate(total: dict[str, Tensor], key: str, value: Tensor) -> None:
    more = value.detach().double().cpu()
    if key in total:
        total[key] += more
    else:
        total[key] = more

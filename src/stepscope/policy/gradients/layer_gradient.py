"""The gradient of one parameter for every sequence of a micro-batch, kept as factors until it is needed.

A matrix parameter of shape (rows, cols) has, per sequence, the gradient sum_t left_t (x) right_t over token
positions t. Products with it need the whole matrix only in slices of rows, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """sum_t left_t (x) right_t: the weight of a linear map. left (seq, pos, rows), right (seq, pos, cols)."""

    left: Tensor
    right: Tensor

    @property
    def numel(self) -> int:
        """Numbers held per sequence."""
        return int(self.left.shape[1] * (self.left.shape[2] + self.right.shape[2]))

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """(seq, stop - start, cols) of the matrix."""
        left = self.left[..., start:stop].transpose(1, 2)
        return torch.bmm(left, self.right) if out is None else torch.bmm(left, self.right, out=out)

    def dot(self, u: Tensor) -> Tensor:
        """(seq,) inner product with u (rows, cols): sum_t left_t' u right_t, never making the matrix."""
        narrow = u.shape[0] <= u.shape[1]
        product = (self.right @ u.T) * self.left if narrow else (self.left @ u) * self.right
        return product.sum((1, 2))


@dataclass(frozen=True)
class Lookup:
    """Row ids[t] gets values_t: an embedding. ids: (seq, pos), values: (seq, pos, cols)."""

    ids: Tensor
    values: Tensor

    @property
    def numel(self) -> int:
        """Numbers held per sequence."""
        return int(self.ids.shape[1] * (1 + self.values.shape[2]))

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """(seq, stop - start, cols) of the matrix."""
        seqs, _, cols = self.values.shape
        if out is None:
            out = self.values.new_empty(seqs, stop - start, cols)
        out.zero_()
        inside = (self.ids >= start) & (self.ids < stop)
        row, pos = inside.nonzero(as_tuple=True)
        target = row * (stop - start) + self.ids[row, pos] - start
        out.view(-1, cols).index_add_(0, target, self.values[row, pos])
        return out

    def dot(self, u: Tensor) -> Tensor:
        """(seq,) inner product with u (rows, cols)."""
        return (u[self.ids] * self.values).sum((1, 2))


@dataclass(frozen=True)
class Whole:
    """The matrix itself, (seq, rows, cols): biases and norms (cols = 1), and parameters of the slow path."""

    values: Tensor

    @property
    def numel(self) -> int:
        """Numbers held per sequence."""
        return int(self.values.shape[1] * self.values.shape[2])

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """(seq, stop - start, cols) of the matrix."""
        found = self.values[:, start:stop]
        return found if out is None else out.copy_(found)

    def dot(self, u: Tensor) -> Tensor:
        """(seq,) inner product with u (rows, cols)."""
        return (self.values * u).sum((1, 2))


Part = Outer | Lookup | Whole


def joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same sum in fewer parts: products of two factors are one over all their positions."""
    outer = [part for part in parts if isinstance(part, Outer)]
    if len(outer) < 2:
        return tuple(parts)
    one = Outer(torch.cat([p.left for p in outer], 1), torch.cat([p.right for p in outer], 1))
    return (one, *(part for part in parts if not isinstance(part, Outer)))


def matrix_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """A parameter's shape seen as (rows, cols): the first axis against all others; scalars are (1, 1)."""
    rows = int(shape[0]) if len(shape) else 1
    cols = 1
    for n in shape[1:]:
        cols *= int(n)
    return rows, cols


def orient(vector: Tensor, shape: tuple[int, int], transposed: bool) -> Tensor:
    """A tensor of a parameter's shape as (rows, cols) = ``shape`` of its gradient as it is kept."""
    return vector.reshape(shape[::-1]).T.contiguous() if transposed else vector.reshape(shape)


def restore(stack: Tensor, transposed: bool) -> Tensor:
    """(n, rows, cols) in the form of kept gradients as (n, numbers of the parameter in its own order)."""
    return (stack.transpose(1, 2) if transposed else stack).flatten(1)


@dataclass(frozen=True)
class LayerGradient:
    """Per-sequence gradient of one parameter; several parts (tied weights, repeated calls) add up.

    A tall matrix is kept transposed (its gradient is made faster that way), so a vector over the parameters
    must be brought into the same form with :meth:`oriented` before it meets the gradient.

    Attributes:
        name: ``named_parameters()`` name.
        shape: (rows, cols) of the gradient as it is kept.
        parts: one per use of the parameter in the forward pass.
        transposed: whether it is the transpose of the parameter's matrix.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    transposed: bool = False

    def oriented(self, vector: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (rows, cols) of this gradient."""
        return orient(vector, self.shape, self.transposed)

    @property
    def factor_numel(self) -> int:
        """Numbers held per sequence as long as it stays in factors."""
        return sum(part.numel for part in self.parts)

    def to(self, device: torch.device | str) -> LayerGradient:
        """The same on a device."""
        parts = tuple(type(p)(*(getattr(p, f.name).to(device) for f in fields(p))) for p in self.parts)
        return LayerGradient(self.name, self.shape, parts, self.transposed)

    def dense(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """(seq, stop - start, cols) of the gradient, written to ``out`` where given."""
        end = self.shape[0] if stop is None else stop
        first, *others = self.parts
        total = first.rows(start, end, out)
        for part in others:
            more = part.rows(start, end)
            total = total + more if out is None else total.add_(more)
        return total

    def dot(self, u: Tensor) -> Tensor:
        """(seq,) inner product with an oriented u (rows, cols)."""
        first, *others = self.parts
        total = first.dot(u)
        for part in others:
            total = total + part.dot(u)
        return total

    def row_slices(self, num_sequences: int, bytes_limit: int, itemsize: int) -> list[tuple[int, int]]:
        """Slices of rows whose dense form, for ``num_sequences`` sequences, keeps within ``bytes_limit``."""
        rows, cols = self.shape
        step = max(1, min(rows, bytes_limit // max(1, num_sequences * cols * itemsize)))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def ghost_inner(a: LayerGradient, b: LayerGradient) -> Tensor | None:
    """(seq_a, seq_b) inner products sum_ts (left_t.left_s)(right_t.right_s) without making any matrix.

    None where the form does not allow it (more than one part, or not a product of two factors).
    """
    (p,), (q,) = (a.parts, b.parts) if len(a.parts) == len(b.parts) == 1 else ((None,), (None,))
    if not (isinstance(p, Outer) and isinstance(q, Outer)):
        return None
    seqs_a, pos_a, _ = p.left.shape
    seqs_b, pos_b, _ = q.left.shape
    table = (p.left.flatten(0, 1) @ q.left.flatten(0, 1).T) * (
        p.right.flatten(0, 1) @ q.right.flatten(0, 1).T
    )
    return table.view(seqs_a, pos_a, seqs_b, pos_b).sum((1, 3))

"""Per-sequence gradients of a sharded model: every process has all sequences, of its rows of each parameter.

A process runs a part of a micro-batch, so what its layers see and send back are factors of the gradients of
its own sequences, of whole parameters. The processes tell each other their factors, which are small
(positions x (rows + cols) where a gradient has rows x cols), and each keeps the rows of its own part of the
parameter. Whoever consumes gradients then does with its part what one process does with the whole, and what
is a sum over coordinates is added up at the end.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from stepscope.policy.gradients.layer_gradient import LayerGradient, Lookup, Outer, Part, Whole
from stepscope.policy.group import Group
from stepscope.policy.shards import span


def exchanged(gradient: LayerGradient, parameter: Tensor, group: Group, count: int) -> LayerGradient:
    """The gradients of all sequences of a micro-batch, of the rows that this process holds of a parameter.

    Args:
        gradient: of this process's part of the micro-batch, of the whole parameter.
        parameter: which one.
        group: the processes; each has the same parameter's gradient at hand, of as many sequences.
        count: sequences of the micro-batch; what is beyond fills up its parts.
    """
    rows = span(parameter)

    def told(values: Tensor) -> Tensor:
        return group.concatenated(values)[:count]

    def held(part: Part) -> Part:
        if isinstance(part, Outer):
            left, right = told(part.left), told(part.right)
            return Outer(left, right[..., rows]) if gradient.transposed else Outer(left[..., rows], right)
        if isinstance(part, Lookup):
            ids, values = told(part.ids), told(part.values)
            inside = (ids >= rows.start) & (ids < rows.stop)
            return Lookup((ids - rows.start) * inside, values * inside.unsqueeze(-1))
        return Whole(told(part.values)[:, :, rows] if gradient.transposed else told(part.values)[:, rows])

    own = rows.stop - rows.start
    height, width = gradient.shape
    shape = (height, own) if gradient.transposed else (own, width)
    return replace(gradient, shape=shape, parts=tuple(map(held, gradient.parts)))

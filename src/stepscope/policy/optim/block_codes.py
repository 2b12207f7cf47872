"""Tensors kept in 8 bits, blocks at a time, as bitsandbytes keeps moments.

(Dettmers et al. 2022, arXiv:2110.02861; ``bitsandbytes/optim/optimizer.py`` and ``backends`` at 0.50.)

Element i stands for ``map[code_i] * absmax[i // 256]``: the map has 256 numbers of [-1, 1], and absmax is the
largest magnitude of a block. A code is that of the number of the map nearest to what was stored, so it says
no more of it than an interval: between the midpoints to its neighbours, times absmax. That is how the GPU's
kernel rounds (``csrc/kernels.cu``); on a CPU the numbers are first rounded to multiples of 2^-15
(``csrc/cpu_ops.cpp``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements with one absmax."""

CODES = 256
"""Numbers of a map."""

CPU_SLACK = 2.0**-16
"""By how much of absmax what a CPU stores may lie outside the interval of its code."""


@dataclass(frozen=True, repr=False)
class BlockCodes:
    """A tensor in 8 bits.

    Attributes:
        code: uint8, of the tensor's shape.
        absmax: float32, one for each block of the flattened tensor.
        numbers: float32, the map, ascending.
        slack: by how much of absmax the intervals are wider on both sides.

    Pinned by ``tests/policy/test_block_codes.py`` on what bitsandbytes makes of the same tensors.
    """

    code: Tensor
    absmax: Tensor
    numbers: Tensor
    slack: float = 0.0

    @classmethod
    def problem(cls, code: Any, absmax: Any, numbers: Any) -> str:
        """What is wrong with the parts of such a tensor, or ""."""
        if not all(isinstance(part, Tensor) for part in (code, absmax, numbers)):
            return "codes without a map and the magnitude of each block"
        if code.dtype != torch.uint8:
            return f"codes of type {code.dtype}, expected uint8"
        blocks = -(-code.numel() // BLOCK)
        if tuple(absmax.shape) != (blocks,) or absmax.dtype != torch.float32:
            return (
                f"magnitudes of shape {tuple(absmax.shape)} and type {absmax.dtype}, expected {blocks} in "
                f"float32, one for each {BLOCK} elements"
            )
        if tuple(numbers.shape) != (CODES,) or numbers.dtype != torch.float32:
            return (
                f"a map of shape {tuple(numbers.shape)} and type {numbers.dtype}, expected {CODES} in float32"
            )
        if not bool((numbers.diff() > 0).all() and numbers[0] >= -1 and numbers[-1] <= 1):
            return "a map that is not ascending within -1 and 1"
        return "" if bool((absmax >= 0).all() and absmax.isfinite().all()) else "magnitudes that are no such"

    def to(self, device: torch.device) -> BlockCodes:
        """The same on a device."""
        return replace(
            self, code=self.code.to(device), absmax=self.absmax.to(device), numbers=self.numbers.to(device)
        )

    @property
    def value(self) -> Tensor:
        """What the codes stand for, in float32 as bitsandbytes computes it."""
        return self._scaled(self.numbers)

    @property
    def low(self) -> Tensor:
        """The least that was stored as these codes."""
        return self._scaled(self._ends[0])

    @property
    def high(self) -> Tensor:
        """The most that was stored as these codes."""
        return self._scaled(self._ends[1])

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Each element uniformly from what its code stands for."""
        low = self.low
        part = torch.rand(low.shape, generator=generator, dtype=low.dtype).to(low.device)
        return low + part * (self.high - low)

    @property
    def zeros(self) -> int:
        """Elements that were stored as 0 in blocks that are not 0 as a whole."""
        alive = self.absmax.gt(0).repeat_interleave(BLOCK)[: self.code.numel()]
        return int((alive & self.numbers[self.code.flatten().long()].eq(0)).sum())

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """(256,) lower and (256,) upper ends of what the codes stand for.

        The codes beside that of 0 reach to 0: the GPU's kernel keeps the sign of what it stores, and takes
        the neighbour where the nearest is 0 and the sign would be lost.
        """
        numbers = self.numbers
        least = -1.0 if numbers[0] < 0 else 0.0
        inner = (numbers[:-1] + numbers[1:]) / 2
        low = torch.cat([inner.new_tensor([least]), inner])
        high = torch.cat([inner, inner.new_ones(1)])
        if least < 0:
            low[1:] = torch.where(numbers[:-1] == 0, 0.0, low[1:])
            high[:-1] = torch.where(numbers[1:] == 0, 0.0, high[:-1])
        return (low - self.slack).clamp(least, 1), (high + self.slack).clamp(least, 1)

    def _scaled(self, table: Tensor) -> Tensor:
        flat = table[self.code.flatten().long()]
        scale = self.absmax.repeat_interleave(BLOCK)[: flat.numel()]
        return (flat * scale).view(self.code.shape)

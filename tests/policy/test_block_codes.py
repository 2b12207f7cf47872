"""Tensors in 8 bits: what codes stand for, and between which ends what was stored lay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from stepscope.policy.optim.block_codes import CPU_SLACK, BlockCodes


def drawn(signed: bool, *, count: int = 256 * 300 + 77) -> Tensor:
    """Moments of many sizes, the first block zero."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(count, generator=generator) * torch.rand(count, generator=generator) ** 3
    values[:256] = 0
    return values if signed else values**2


def nearest(values: Tensor, numbers: Tensor) -> BlockCodes:
    """Encoded as the kernel for GPUs does it (``csrc/kernels.cu``): the nearest number, the sign kept."""
    padded = torch.cat([values, values.new_zeros(-len(values) % 256)]).view(-1, 256)
    absmax = padded.abs().amax(1)
    scaled = values / absmax.repeat_interleave(256)[: len(values)].clamp(min=1e-38)
    edges = (numbers[:-1] + numbers[1:]) / 2
    code = torch.bucketize(scaled, edges)
    lost = numbers[code].signbit() != scaled.signbit()
    code = torch.where(lost & (numbers[0] < 0), code + torch.where(scaled > 0, 1, -1), code)
    return BlockCodes(code.to(torch.uint8), absmax, numbers)


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_the_librarys(signed: bool) -> None:
    numbers = functional.create_dynamic_map(signed=signed)
    values = drawn(signed).view(59, -1)
    code, state = functional.quantize_blockwise(values, code=numbers, blocksize=256)
    ours = BlockCodes(code, state.absmax, numbers)
    theirs = functional.dequantize_blockwise(code, absmax=state.absmax, code=numbers, blocksize=256)
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=0)
    assert ours.value.shape == values.shape


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_stored_lies_between_the_ends(signed: bool) -> None:
    numbers, values = functional.create_dynamic_map(signed=signed), drawn(signed)
    code, state = functional.quantize_blockwise(values, code=numbers, blocksize=256)
    by_cpu = BlockCodes(code, state.absmax, numbers, CPU_SLACK)
    by_gpu = nearest(values, numbers)
    room = 1e-6 * by_gpu.absmax.repeat_interleave(256)[: len(values)]
    for codes in (by_cpu, by_gpu):
        assert ((codes.low - room <= values) & (values <= codes.high + room)).all()
        assert ((codes.low <= codes.value) & (codes.value <= codes.high)).all()
        moved = codes.drawn(torch.Generator().manual_seed(0))
        assert ((codes.low <= moved) & (moved <= codes.high)).all()
        lost, told = (values - codes.value).norm(), (moved - codes.value).norm()
        assert 0.8 < float(lost / told) < 1.25  # a uniform draw is of the size of what encoding really loses
    # the CPU's coarser rounding leaves the narrow ends, which are those of the kernel for GPUs
    narrow = replace(by_cpu, slack=0.0)
    assert not ((narrow.low - room <= values) & (values <= narrow.high + room)).all()
    assert by_gpu.zeros == int(by_gpu.value[256:].eq(0).sum())


def sound() -> dict[str, Any]:
    return {
        "code": torch.zeros(2, 300, dtype=torch.uint8),
        "absmax": torch.ones(3),
        "numbers": functional.create_dynamic_map(signed=True),
    }


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("absmax", None, "without a map"),
        ("code", torch.zeros(2, 300), "codes of type torch.float32"),
        ("absmax", torch.ones(2), "expected 3 in float32"),
        ("absmax", -torch.ones(3), "magnitudes that are no such"),
        ("absmax", torch.full((3,), torch.inf), "magnitudes that are no such"),
        ("numbers", torch.zeros(16), "a map of shape"),
        ("numbers", torch.linspace(1, -1, 256), "not ascending"),
        ("numbers", torch.linspace(-1, 2, 256), "not ascending within"),
        ("numbers", torch.full((256,), torch.nan), "not ascending"),
    ],
)
def test_damaged_parts_are_told(part: str, value: Any, problem: str) -> None:
    assert BlockCodes.problem(**sound()) == ""
    assert problem in BlockCodes.problem(**(sound() | {part: value}))

"""Other states that would have been kept as the same codes: what keeping tensors in 8 bits loses of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from stepscope.policy import vectors
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.block_codes import BlockCodes
from stepscope.results.step import StoredTensor


def drawn_state(state: OptimizerState) -> OptimizerState:
    """With each tensor in 8 bits drawn once, uniformly and independently from what its codes stand for."""
    generator = torch.Generator().manual_seed(0)
    return _with(state, lambda _, codes: codes.drawn(generator))


def extreme_states(state: OptimizerState) -> Iterator[OptimizerState]:
    """With each tensor in 8 bits at the low or high end of what its codes stand for, in all combinations."""
    for ends in product((True, False), repeat=len(state.codes)):
        low = dict(zip(state.codes, ends, strict=True))
        yield _with(state, lambda key, codes, low=low: codes.low if low[key] else codes.high)  # type: ignore[misc]


def stored_tensors(state: OptimizerState) -> dict[str, StoredTensor]:
    """What keeping it in 8 bits lost of each tensor: the draw of :func:`drawn_state`, and the farthest ends.

    Args:
        state: of any optimizer; there is nothing of one that keeps no tensor so.

    Pinned by ``tests/measure/test_storage.py`` on moments before they were encoded.
    """
    found = {}
    drawn = drawn_state(state).tensors() if state.codes else {}
    for key, codes in state.codes.items():
        own = {name: state.tensors()[key][name] for name in codes}
        moved = vectors.add({name: drawn[key][name] for name in codes}, vectors.scale(own, -1))
        ends = {n: torch.maximum(c.high - c.value, c.value - c.low) for n, c in codes.items()}
        length = vectors.norm(own)
        found[key] = StoredTensor(
            typical=vectors.norm(moved) / length if length else float("nan"),
            worst=vectors.norm(ends) / length if length else float("nan"),
            zeros=sum(c.zeros for c in codes.values()) / sum(c.code.numel() for c in codes.values()),
        )
    return found


def _with(state: OptimizerState, choose: Callable[[str, BlockCodes], Tensor]) -> OptimizerState:
    """With other tensors in place of those kept in 8 bits, whose keys are fields."""
    kept = state.tensors()
    others = {
        key: {**kept[key], **{n: choose(key, c).to(kept[key][n].dtype) for n, c in codes.items()}}
        for key, codes in state.codes.items()
    }
    return replace(state, **others)  # type: ignore[arg-type]

"""Passes of a policy over a batch: cut into micro-batches, gathered, run, un-padded and shown here alone.

Whatever runs a model over more sequences than fit at once does so through :func:`sweep`, within a
:class:`Budget`: the one place that knows how large a micro-batch may be and where it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track as track_progress
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, make_batch
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

T = TypeVar("T")
_bars: list[str] = []  # the one on the terminal


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a computation may use at a time; no number depends on it beyond round-off.

    Attributes:
        max_sequences: most sequences in a micro-batch.
        max_tokens: most padded tokens in a micro-batch, or None for no limit.
        memory_bytes: for gradients that are kept; activations of a micro-batch come on top.
        scratch: existing folder to keep gradients in, on disk, or None for memory alone.
        progress: show progress bars on standard error, where that is a terminal.
    """

    max_sequences: int = 16
    max_tokens: int | None = None
    memory_bytes: int = 4 * 2**30
    scratch: Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse a micro-batch of nothing.

        Raises:
            MeasurementError: ``max_sequences`` is below 1.
        """
        if self.max_sequences < 1:
            raise MeasurementError(f"max_sequences is {self.max_sequences}, expected at least 1")


def track(items: Sequence[T], what: str, budget: Budget) -> Iterator[T]:
    """The items one after the other, with a progress bar on standard error where the budget allows one.

    None is shown where standard error is no terminal, nor inside a loop that shows one.
    """
    if not budget.progress or _bars or not sys.stderr.isatty():
        yield from items
        return
    _bars.append(what)
    try:
        yield from track_progress(items, what, console=Console(stderr=True), transient=True)
    finally:
        _bars.pop()


def lengths(rollouts: Rollouts) -> list[int]:
    """Tokens of each sequence, prompt and response."""
    rows = zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True)
    return [len(prompt) + len(response) for prompt, response in rows]


def by_length(rollouts: Rollouts) -> list[int]:
    """Sequences from the longest to the shortest: the order with the least padding."""
    totals = lengths(rollouts)
    return sorted(range(len(totals)), key=lambda i: (-totals[i], i))


def cut(rollouts: Rollouts, order: Sequence[int], budget: Budget) -> list[slice]:
    """The micro-batches of some sequences, as slices of ``order``."""
    totals = lengths(rollouts)
    most = float("inf") if budget.max_tokens is None else budget.max_tokens
    pieces, start, widest = [], 0, 0
    for stop, i in enumerate(order):
        count, widest = stop - start, max(widest, totals[i])
        if count and (count == budget.max_sequences or widest * (count + 1) > most):
            pieces.append(slice(start, stop))
            start, widest = stop, totals[i]
    return [*pieces, slice(start, len(order))] if order else []


def gather(policy: Policy, rollouts: Rollouts, chosen: Sequence[int]) -> TokenBatch:
    """Some sequences of a batch, padded, on the policy's device."""
    return make_batch(
        [rollouts.prompt_token_ids[i] for i in chosen],
        [rollouts.response_token_ids[i] for i in chosen],
        device=policy.device,
        seq_index=chosen,
        response_masks=None
        if rollouts.response_masks is None
        else [rollouts.response_masks[i] for i in chosen],
    )


def longest(policy: Policy, rollouts: Rollouts, count: int = 4) -> TokenBatch:
    """The few longest sequences of a batch, for a check of the model."""
    return gather(policy, rollouts, by_length(rollouts)[:count])


def sweep(
    policy: Policy,
    rollouts: Rollouts,
    run: Callable[[TokenBatch], T],
    *,
    budget: Budget,
    order: Sequence[int] | None = None,
    what: str = "",
) -> Iterator[tuple[TokenBatch, T]]:
    """The micro-batches, one at a time, each with what ``run`` makes of it.

    Args:
        policy: on whose device the micro-batches are.
        rollouts: the sequences.
        run: called with one micro-batch after the other.
        budget: how large they are.
        order: which sequences, in which order; default all, longest first.
        what: title of the progress bar; none is shown without.
    """
    chosen = by_length(rollouts) if order is None else order
    pieces = cut(rollouts, chosen, budget)
    for piece in track(pieces, what, budget) if what else pieces:
        batch = gather(policy, rollouts, chosen[piece])
        yield batch, run(batch)


def sweep_rows(
    policy: Policy,
    rollouts: Rollouts,
    run: Callable[[TokenBatch], Tensor],
    *,
    budget: Budget,
    what: str = "",
) -> list[Tensor]:
    """What ``run`` says of each sequence, without padding and in the order of the batch.

    Args:
        policy: on whose device the micro-batches are.
        rollouts: the sequences.
        run: a micro-batch to (seq,) or (seq, tok, ...) values.
        budget: how large the micro-batches are.
        what: title of the progress bar; none is shown without.

    Returns:
        A scalar or a (tok, ...) tensor for each sequence.
    """
    found: dict[int, Tensor] = {}
    for batch, values in sweep(policy, rollouts, run, budget=budget, what=what):
        found |= zip(batch.seq_index.tolist(), batch.unpad(values), strict=True)
    return [found[i] for i in range(len(rollouts))]

"""Passes of a policy over a batch: cut into micro-batches, gathered, run, un-padded and shown here alone.

Whatever runs a model over more sequences than fit at once does so through :func:`sweep`, within a
:class:`Budget`: the one place that knows how large a micro-batch may be and where it runs.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from rich.console import Console
from rich.progress import track as track_progress
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, make_batch
from stepscope.policy.profiler import watched
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

T = TypeVar("T")
_bars: list[str] = []  # the one on the terminal
_most_tokens: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # padded, of a micro-batch of a model
logger = logging.getLogger(__name__)


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


def track(items: Iterable[T], what: str, budget: Budget, *, total: int | None = None) -> Iterator[T]:
    """The items one after the other, with a progress bar on standard error where the budget allows one.

    None is shown where standard error is no terminal, nor inside a loop that shows one.

    Args:
        items: what to go through.
        what: title of the bar.
        budget: whether one is shown.
        total: how many there are, where they cannot be counted.
    """
    if not budget.progress or _bars or not sys.stderr.isatty():
        yield from items
        return
    _bars.append(what)
    try:
        yield from track_progress(items, what, total, console=Console(stderr=True), transient=True)
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
    divisible: bool = True,
    what: str = "",
) -> Iterator[tuple[TokenBatch, T]]:
    """The micro-batches, one at a time, each with what ``run`` makes of it.

    Where the memory does not suffice for a micro-batch, it and all after it, in this sweep and later ones of
    the model, have half its padded tokens, and a line says so.

    Args:
        policy: on whose device the micro-batches are.
        rollouts: the sequences.
        run: called with one micro-batch after the other; again with a part of one that ran out of memory.
        budget: how large they are.
        order: which sequences, in which order; default all, longest first.
        divisible: whether a micro-batch may be run in parts.
        what: title of the progress bar; none is shown without.

    Raises:
        MeasurementError: the memory does not suffice for a single sequence, or for a micro-batch that is not
            divisible.
    """
    chosen = by_length(rollouts) if order is None else order
    known = fitting(policy, budget) if divisible else budget
    waiting = deque(cut(rollouts, chosen, known))
    run = watched(run)

    def pieces() -> Iterator[slice]:
        while waiting:
            yield waiting.popleft()

    for piece in track(pieces(), what, budget, total=len(waiting)) if what else pieces():
        batch = gather(policy, rollouts, chosen[piece])
        found = _within_memory(run, batch, divisible and len(batch) > 1)
        if found is None:
            _learn(policy, batch)
            waiting.clear()
            smaller = cut(rollouts, chosen[piece.start :], fitting(policy, budget))
            waiting.extend(slice(piece.start + s.start, piece.start + s.stop) for s in smaller)
            continue
        yield batch, found[0]


def _within_memory(run: Callable[[TokenBatch], T], batch: TokenBatch, divisible: bool) -> tuple[T] | None:
    """What a function makes of a micro-batch; None where the memory did not suffice.

    Raises:
        MeasurementError: the micro-batch is not divisible.
    """
    try:
        return (run(batch),)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if not divisible:
            raise too_large(batch) from error
    clear_device_cache(garbage_collection=True)
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory did not suffice."""
    found: bool = should_reduce_batch_size(error)
    return found


def too_large(batch: TokenBatch) -> MeasurementError:
    """What to say where the memory does not suffice for a micro-batch that cannot be cut."""
    count, length = batch.input_ids.shape
    cure = "a smaller batch_size" if count > 1 else "--precision bfloat16, shorter responses"
    return MeasurementError(
        f"out of memory with {count} sequence(s) of {length} tokens at a time; use {cure}, or a device with "
        "more memory"
    )


def _learn(policy: Policy, batch: TokenBatch) -> None:
    """From now on micro-batches of a model have at most half the padded tokens of this one."""
    _most_tokens[policy.model] = max(1, batch.input_ids.numel() // 2)
    logger.warning(
        "out of memory with %d sequences of %d tokens; going on with micro-batches of half the tokens",
        *batch.input_ids.shape,
    )


def fitting(policy: Policy, budget: Budget) -> Budget:
    """The budget within what is known of the memory that passes of this model take."""
    known = _most_tokens.get(policy.model)
    if known is None or (budget.max_tokens is not None and budget.max_tokens <= known):
        return budget
    return replace(budget, max_tokens=known)


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

"""Passes of a policy over a batch: cut into micro-batches, gathered, run, un-padded and shown here alone.

Whatever runs a model over more sequences than fit at once does so through :func:`sweep` (generation through
:func:`in_pieces`), within a :class:`Budget`: the one place that knows how large a micro-batch may be and
where it runs, and that halves it where the memory does not suffice.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from stepscope.console import bar, bar_shown
from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, make_batch
from stepscope.policy.group import current
from stepscope.policy.memory import Use, room
from stepscope.policy.profiler import watched
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

T = TypeVar("T")
Width = tuple[int, int]
"""Tokens of a prompt and of its response, which are padded apart."""

_bars: list[str] = []  # the one on the terminal
_most_tokens: WeakKeyDictionary[nn.Module, dict[Use, int]] = WeakKeyDictionary()  # of a micro-batch, padded
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a computation may use at a time; no number depends on it beyond round-off.

    Attributes:
        max_sequences: most sequences in a micro-batch.
        max_tokens: most padded tokens in a micro-batch, or None for what is estimated to fit the memory at
            hand.
        memory_bytes: for gradients that are kept; activations of a micro-batch come on top.
        scratch: existing folder to keep gradients in, on disk, or None for memory alone.
        progress: show progress bars on standard error, where that is a terminal, and in notebooks.
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

    def times(self, count: int) -> Budget:
        """What several processes may use together."""
        most = None if self.max_tokens is None else count * self.max_tokens
        return replace(self, max_sequences=count * self.max_sequences, max_tokens=most)


def track(items: Iterable[T], what: str, budget: Budget, *, total: int | None = None) -> Iterator[T]:
    """The items one after the other, with a progress bar where the budget allows one.

    It is on standard error, or below the cell of a notebook; none is shown where there is neither, nor inside
    a loop that shows one.

    Args:
        items: what to go through.
        what: title of the bar.
        budget: whether one is shown.
        total: how many there are, where they cannot be counted.
    """
    if not budget.progress or _bars or not bar_shown():
        yield from items
        return
    _bars.append(what)
    try:
        yield from bar(items, what, total)
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


def own_share(rollouts: Rollouts) -> list[int]:
    """This process's sequences of a batch, longest first: about as many tokens as the others have.

    All of them where it measures alone. Which are whose depends on their lengths only, not on any budget.
    """
    return current().share(by_length(rollouts))


def widths(rollouts: Rollouts, order: Sequence[int]) -> list[Width]:
    """Tokens of prompt and response of some sequences."""
    return [(len(rollouts.prompt_token_ids[i]), len(rollouts.response_token_ids[i])) for i in order]


def padded(items: Sequence[Width]) -> int:
    """Columns of a micro-batch: the longest prompt and the longest response, whosever they are."""
    return max(prompt for prompt, _ in items) + max(response for _, response in items)


def cut(items: Sequence[Width], budget: Budget) -> list[slice]:
    """The micro-batches of items of such widths, as slices of their order."""
    most = float("inf") if budget.max_tokens is None else budget.max_tokens
    pieces, start, widest = [], 0, (0, 0)
    for stop, item in enumerate(items):
        count, together = stop - start, (max(widest[0], item[0]), max(widest[1], item[1]))
        if count and (count == budget.max_sequences or sum(together) * (count + 1) > most):
            pieces.append(slice(start, stop))
            start, together = stop, item
        widest = together
    return [*pieces, slice(start, len(items))] if items else []


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
    """The micro-batches, one at a time, each with what ``run`` makes of it; see :func:`in_pieces`.

    In a group in lockstep a micro-batch is that of all processes, which have a part of it each, of one shape.

    Args:
        policy: on whose device the micro-batches are.
        rollouts: the sequences.
        run: called with one micro-batch after the other; again with a part of one that ran out of memory.
        budget: how large they are.
        order: which sequences, in which order; default this process's share (:func:`own_share`).
        divisible: whether a micro-batch may be run in parts.
        what: title of the progress bar; none is shown without.

    Raises:
        TooLargeError: the memory does not suffice for a single sequence, or for a micro-batch that is not
            divisible.
    """
    chosen = own_share(rollouts) if order is None else order
    run, group = watched(run), current()

    def one(piece: slice) -> tuple[TokenBatch, T]:
        batch = gather(policy, rollouts, chosen[piece])
        if group.lockstep:
            batch = batch.part(group.rank, group.size)
        return batch, run(batch)

    items = widths(rollouts, chosen)
    yield from in_pieces(policy, items, one, budget=budget, divisible=divisible, what=what)


def in_pieces(
    policy: Policy,
    items: Sequence[Width],
    run: Callable[[slice], T],
    *,
    budget: Budget,
    use: Use = "passes",
    divisible: bool = True,
    what: str = "",
) -> Iterator[T]:
    """What ``run`` makes of items, as many at a time as the budget and the memory at hand allow.

    Where the memory does not suffice for a piece, it and all after it, here and in later calls for the model,
    have half its padded tokens, and a line says so. In a group in lockstep a piece is that of all processes,
    and memory that does not suffice ends them.

    Args:
        policy: whose model runs.
        items: their widths.
        run: called with one slice of the items after the other; again with a part of one that ran out of
            memory.
        budget: how large pieces are.
        use: what the memory is for.
        divisible: whether a piece that the budget allows may be run in parts.
        what: title of the progress bar; none is shown without.

    Raises:
        TooLargeError: the memory does not suffice for a single item, or for a piece that is not divisible.
    """

    def from_start(start: int) -> list[slice]:
        known = fitting(policy, budget, items[start:], use) if divisible else budget
        if group.lockstep:
            known = known.times(group.size)
        return [slice(start + s.start, start + s.stop) for s in cut(items[start:], known)]

    group = current()
    waiting = deque(from_start(0))

    def pieces() -> Iterator[slice]:
        while waiting:
            yield waiting.popleft()

    for piece in track(pieces(), what, budget, total=len(waiting)) if what else pieces():
        count, width = piece.stop - piece.start, padded(items[piece])
        try:
            found = run(piece)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if count > 1:
                _learn(policy, use, count, width)
            if not divisible or count == 1 or group.lockstep:  # the others are in the middle of theirs
                raise TooLargeError(count, width) from error
        else:
            yield found
            continue
        clear_device_cache(garbage_collection=True)
        waiting.clear()
        waiting.extend(from_start(piece.start))


class TooLargeError(MeasurementError):
    """The memory does not suffice for a micro-batch that cannot be cut."""

    def __init__(self, count: int, length: int) -> None:
        cure = "a smaller batch_size" if count > 1 else "--precision bfloat16, shorter responses"
        super().__init__(
            f"out of memory with {count} sequence(s) of {length} tokens at a time; use {cure}, or a device "
            "with more memory"
        )


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory did not suffice."""
    found: bool = should_reduce_batch_size(error)
    return found


def _learn(policy: Policy, use: Use, count: int, width: int) -> None:
    """From now on micro-batches of a model have at most half the padded tokens of this one."""
    _most_tokens.setdefault(policy.model, {})[use] = max(1, count * width // 2)
    logger.warning(
        "out of memory with %d sequences of %d tokens; going on with micro-batches of half the tokens",
        count,
        width,
    )


def fitting(policy: Policy, budget: Budget, items: Sequence[Width], use: Use = "passes") -> Budget:
    """The budget with a number of padded tokens that is estimated to fit, within what is known not to.

    Args:
        policy: whose model runs.
        budget: what is asked for; its own ``max_tokens`` counts where it has one.
        items: widths of what is to be cut.
        use: what the memory is for.
    """
    if not items:
        return budget
    most = budget.max_tokens
    if most is None and len(items) > 1 and budget.max_sequences > 1:
        most = room(
            policy, use, narrowest=min(map(sum, items)), widest=padded(items), kept_bytes=budget.memory_bytes
        )
    if most is not None and current().lockstep:
        most = int(current().least(most))
    known = _most_tokens.get(policy.model, {}).get(use)
    limits = [limit for limit in (most, known) if limit is not None]
    return replace(budget, max_tokens=min(limits)) if limits else budget


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
        A scalar or a (tok, ...) tensor for each sequence, on all processes that measure together.
    """
    found: dict[int, Tensor] = {}
    for batch, values in sweep(policy, rollouts, run, budget=budget, what=what):
        found |= batch.rows(values)
    return list(current().rows(found).values())

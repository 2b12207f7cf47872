"""Gram matrices of per-sequence gradients under a memory budget; one pass over the batch if they fit.

K[i, j] = g_i' P g_j with g_i the gradient of sequence i's objective and P a diagonal metric. The square
kernel is computed from one side. Gradients that exceed the budget are split into blocks of sequences: one
block is held while the later ones stream past, (blocks + 1) / 2 passes in all; or they go to disk, one pass.
Of several processes each differentiates its share of every block and of what streams past, and all hold the
block.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.gradients.layer_gradient import LayerGradient, matrix_shape
from stepscope.policy.gradients.products import check_metrics, compute_dtype
from stepscope.policy.gradients.store import GradientStore, Metrics
from stepscope.policy.gradients.stream import (
    SequenceGradients,
    coverage_of,
    stream,
)
from stepscope.policy.group import current
from stepscope.policy.passes import Budget, TooLargeError, cut, fitting, lengths, widths
from stepscope.policy.shards import is_sharded
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Rollouts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grams:
    """Inner products of gradients, float64, one entry per metric.

    Attributes:
        square: (seq, seq).
        cross: (other, seq), where other sequences were given.
        other_norms: (other,) h_e' P h_e of the other sequences.
        blocks: into how many blocks the memory budget split the sequences.
    """

    square: dict[str, Tensor]
    cross: dict[str, Tensor]
    other_norms: dict[str, Tensor]
    blocks: int


def gram(
    policy: Policy,
    gradients: SequenceGradients,
    *,
    preconditioner: ParameterVector | None = None,
    other: SequenceGradients | None = None,
    budget: Budget = Budget(),
) -> Tensor:
    """The (seq, seq) kernel g_i' P g_j, or (other, seq) with other gradients; see :func:`grams`."""
    found = grams(policy, gradients, metrics={"metric": preconditioner}, other=other, budget=budget)
    return found.square["metric"] if other is None else found.cross["metric"]


def grams(
    policy: Policy,
    gradients: SequenceGradients,
    *,
    metrics: Metrics,
    other: SequenceGradients | None = None,
    budget: Budget = Budget(),
) -> Grams:
    """Kernels under several metrics at once, for the model passes of one.

    Args:
        policy: its trainable parameters are differentiated.
        gradients: those of sequences i, j.
        metrics: name to diagonal P (by parameter name), or None for the identity.
        other: those of further sequences e, for the rectangular kernel.
        budget: gradients are held in its memory or, where it has a scratch folder, all of them in files there
            (removed afterwards).

    Raises:
        MeasurementError: a metric does not fit the policy, or the budget does not hold one sequence.
    """
    check_metrics(policy, metrics)
    order = gradients.order
    theirs = [] if other is None else other.order
    size = _block_size(policy, gradients.rollouts, max(1, len(order)), budget)
    starts = range(0, max(1, len(order)), size)
    blocks = [slice(start, min(start + size, len(order))) for start in starts]
    square = _zeros(metrics, len(order), len(order))
    cross, norms = _zeros(metrics, len(theirs), len(order)), _zeros(metrics, len(theirs))
    order = [i for block in blocks for share in current().deal(order[block]) for i in share]
    alone = current().size == 1 and len(blocks) == 1 and other is None
    if not (alone and _square_at_once(policy, gradients, square, metrics, budget)):
        for block in blocks:
            with _stored(policy, gradients, order[block], metrics, budget) as store:
                for m, k in store.square().items():
                    square[m][block, block] = k
                if later := order[block.stop :]:
                    beside = _zeros(metrics, len(later), block.stop - block.start)
                    _stream_past(policy, gradients, later, store, beside, budget=budget)
                    for m, k in beside.items():
                        square[m][block.stop :, block] = k
                        square[m][block, block.stop :] = k.T
                if other is not None:
                    beside = {m: k[:, block] for m, k in cross.items()}
                    own = norms if block.start == 0 else {}
                    _stream_past(policy, other, theirs, store, beside, norms=own, budget=budget)
    count, beyond = len(gradients), 0 if other is None else len(other)
    return Grams(
        square={m: _placed(k, (count, count), order, order) for m, k in square.items()},
        cross={m: _placed(k, (beyond, count), theirs, order) for m, k in cross.items()}
        if other is not None
        else {},
        other_norms={m: _placed(n, (beyond,), theirs) for m, n in norms.items()} if other is not None else {},
        blocks=len(blocks),
    )


def _placed(values: Tensor, shape: tuple[int, ...], *places: list[int]) -> Tensor:
    """Values at their places in the whole batch, and exactly 0 elsewhere."""
    found = values.new_zeros(shape)
    found[torch.meshgrid(*(torch.tensor(p, dtype=torch.long) for p in places), indexing="ij")] = values
    return found


def _zeros(metrics: Metrics, *shape: int) -> dict[str, Tensor]:
    return {m: torch.zeros(shape, dtype=torch.float64) for m in metrics}


@contextmanager
def _stored(
    policy: Policy, gradients: SequenceGradients, order: list[int], metrics: Metrics, budget: Budget
) -> Iterator[GradientStore]:
    """The gradients of some sequences, the processes' shares in turn, held as long as the block lasts."""
    place = current().place_of_share(len(order))
    start, own = place.start, order[place]
    with tempfile.TemporaryDirectory(dir=budget.scratch) as files:
        store = GradientStore(len(order), metrics, directory=Path(files) if budget.scratch else None)

        def put(gradient: LayerGradient, rows: slice) -> None:
            store.put(gradient, slice(start + rows.start, start + rows.stop))

        stream(policy, gradients, put, order=own, budget=budget)
        store.exchange(policy.device)
        yield store


def _square_at_once(
    policy: Policy, gradients: SequenceGradients, square: dict[str, Tensor], metrics: Metrics, budget: Budget
) -> bool:
    """All sequences in one micro-batch: each layer's products are added up and its gradients forgotten.

    Returns:
        Whether they fit.
    """
    items = widths(gradients.rollouts, gradients.order)
    budget = fitting(policy, budget, items)
    if len(cut(items, budget)) != 1:
        return False
    total = _zeros(metrics, len(items), len(items))

    def consume(gradient: LayerGradient, rows: slice) -> None:
        layer = GradientStore(rows.stop, metrics)
        layer.hold(gradient, rows)
        for m, k in layer.square().items():
            total[m] += k

    try:
        stream(policy, gradients, consume, divisible=False, budget=budget)
    except TooLargeError:
        if len(items) == 1:
            raise
        return False
    square.update(total)
    return True


def _stream_past(
    policy: Policy,
    gradients: SequenceGradients,
    order: list[int],
    store: GradientStore,
    products: Mapping[str, Tensor],
    *,
    norms: Mapping[str, Tensor] | None = None,
    budget: Budget,
) -> None:
    """Put the inner products of streamed sequences with the stored ones in ``products`` (and own norms)."""
    mine = torch.tensor(current().share(range(len(order))), dtype=torch.long)

    def consume(gradient: LayerGradient, rows: slice) -> None:
        for m, k in store.cross(gradient).items():
            products[m][mine[rows]] += k
        if norms:
            for m, k in store.norms(gradient).items():
                norms[m][mine[rows]] += k

    own = [order[i] for i in mine.tolist()]
    stream(policy, gradients, consume, order=own, in_parts=not norms, budget=budget)
    current().sum_([*products.values(), *(norms or {}).values()])


def _block_size(policy: Policy, rollouts: Rollouts, count: int, budget: Budget) -> int:
    """Sequences whose gradients fit the budget, in equal blocks; factors where they are the smaller form."""
    if budget.scratch:
        return count
    coverage = coverage_of(policy, rollouts)
    longest = max(lengths(rollouts))
    factors: dict[str, int] = {}
    for tap in coverage.taps:
        for _, name in tap.params:
            rows, cols = matrix_shape(policy.parameters[name].shape)
            held = longest * (cols + (1 if tap.kind == "embedding" else rows))
            factors[name] = factors.get(name, 0) + held
    per_sequence = 0
    for name, param in policy.parameters.items():
        held = factors.get(name, param.numel())
        numbers = held if 2 * held < param.numel() else param.numel()
        numbers = -(-numbers // current().size) if is_sharded(param) else numbers
        per_sequence += numbers * torch.empty((), dtype=compute_dtype(param)).element_size()
    fits = budget.memory_bytes // per_sequence
    if fits < 1:
        raise MeasurementError(
            f"the gradient of one sequence takes {per_sequence / 2**20:.0f} MiB, more than the memory budget "
            f"of {budget.memory_bytes / 2**20:.0f} MiB; raise it, give a scratch folder, or use a random "
            "projection"
        )
    blocks = -(-count // fits)
    logger.info(
        "kernel: %d sequences, %d parameters, %.2f GiB of gradients, %d block(s)",
        count,
        sum(p.numel() for p in policy.parameters.values()),
        per_sequence * count / 2**30,
        blocks,
    )
    return -(-count // blocks)

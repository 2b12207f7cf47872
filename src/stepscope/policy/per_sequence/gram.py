"""Gram matrices of per-sequence gradients under a memory budget; one pass over the batch if they fit.

K[i, j] = g_i' P g_j with g_i the gradient of sequence i's objective and P a diagonal metric. The square
kernel is computed from one side. Gradients that exceed the budget are split into blocks of sequences: one
block is held while the later ones stream past, (blocks + 1) / 2 passes in all; or they go to disk, one pass.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.gradients import Objective
from stepscope.policy.passes import Budget, by_length, cut, lengths
from stepscope.policy.per_sequence.coverage import Coverage
from stepscope.policy.per_sequence.layer_gradient import LayerGradient, matrix_shape
from stepscope.policy.per_sequence.products import check_vector, compute_dtype
from stepscope.policy.per_sequence.store import GradientStore, square_norms
from stepscope.policy.per_sequence.stream import (
    StreamOptions,
    coverage_of,
    stream,
)
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Rollouts

Metrics = Mapping[str, ParameterVector | None]
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
    rollouts: Rollouts,
    objective: Objective,
    *,
    preconditioner: ParameterVector | None = None,
    other: tuple[Rollouts, Objective] | None = None,
    other_as_trained: bool = True,
    double: bool = False,
    **options: Unpack[StreamOptions],
) -> Tensor:
    """The (seq, seq) kernel g_i' P g_j, or (other, seq) with another batch; see :func:`grams`."""
    found = grams(
        policy,
        rollouts,
        objective,
        metrics={"metric": preconditioner},
        other=other,
        other_as_trained=other_as_trained,
        double=double,
        **options,
    )
    return found.square["metric"] if other is None else found.cross["metric"]


def grams(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    *,
    metrics: Metrics,
    other: tuple[Rollouts, Objective] | None = None,
    other_as_trained: bool = True,
    double: bool = False,
    **options: Unpack[StreamOptions],
) -> Grams:
    """Kernels under several metrics at once, for the model passes of one.

    Args:
        policy: its trainable parameters are differentiated.
        rollouts: sequences i, j.
        objective: of ``rollouts``; (seq,) or (seq, tok).
        metrics: name to diagonal P (by parameter name), or None for the identity.
        other: further sequences e and their objective, for the rectangular kernel.
        other_as_trained: the option ``as_trained`` of the gradients of ``other``.
        double: multiply in float64 where gradients are float32; sums over parameters are in float64 anyway.
        **options: see :class:`stepscope.policy.per_sequence.stream.StreamOptions`.
            Gradients are held in the budget's memory or, where it has a scratch folder, all in files there
            (removed afterwards).

    Raises:
        MeasurementError: a metric does not fit the policy, or the budget does not hold one sequence.
    """
    for name, weights in metrics.items():
        if weights is not None:
            check_vector(policy, weights, f"metric {name!r}")
    order = by_length(rollouts)
    coverage = coverage_of(policy, rollouts)
    budget = options.get("budget", Budget())
    scratch = budget.scratch
    size = len(order) if scratch else _block_size(policy, rollouts, coverage, budget.memory_bytes)
    blocks = [slice(start, min(start + size, len(order))) for start in range(0, len(order), size)]
    square = {m: torch.zeros(len(order), len(order), dtype=torch.float64) for m in metrics}
    num_other = 0 if other is None else len(other[0])
    cross = {m: torch.zeros(num_other, len(order), dtype=torch.float64) for m in metrics}
    norms = {m: torch.zeros(num_other, dtype=torch.float64) for m in metrics}
    for b, block in enumerate(blocks):
        with tempfile.TemporaryDirectory(dir=scratch) as files:
            store = GradientStore(block.stop - block.start, directory=Path(files) if scratch else None)
            alone = len(blocks) == 1 and other is None
            if alone and len(cut(rollouts, order, budget)) == 1:
                _square_at_once(policy, rollouts, objective, order, metrics, square, double, options)
                continue
            stream(policy, rollouts, objective, store.put, order=order[block], **options)
            for m, k in store.square(metrics, double=double).items():
                square[m][block, block] = k
            later = slice(block.stop, len(order))
            if later.start < later.stop:
                beside = {m: torch.zeros(len(order) - block.stop, size, dtype=torch.float64) for m in metrics}
                _stream_past(
                    policy, rollouts, objective, order[later], store, metrics, beside, None, double, options
                )
                for m, k in beside.items():
                    square[m][later, block] = k
                    square[m][block, later] = k.T
            if other is not None:
                lengths = by_length(other[0])
                theirs: StreamOptions = {**options, "as_trained": other_as_trained}
                beside = {
                    m: torch.zeros(num_other, block.stop - block.start, dtype=torch.float64) for m in metrics
                }
                found = {m: torch.zeros(num_other, dtype=torch.float64) for m in metrics}
                _stream_past(
                    policy,
                    *other,
                    lengths,
                    store,
                    metrics,
                    beside,
                    found if b == 0 else None,
                    double,
                    theirs,
                )
                for m, k in beside.items():
                    cross[m][lengths, block] = k
                    if b == 0:
                        norms[m][lengths] = found[m]
    back = torch.argsort(torch.tensor(order))
    return Grams(
        square={m: k[back][:, back] for m, k in square.items()},
        cross={m: k[:, back] for m, k in cross.items()} if other is not None else {},
        other_norms=norms if other is not None else {},
        blocks=len(blocks),
    )


def _square_at_once(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    order: list[int],
    metrics: Metrics,
    square: dict[str, Tensor],
    double: bool,
    options: StreamOptions,
) -> None:
    """All sequences in one micro-batch: each layer's products are added up and its gradients forgotten."""

    def consume(gradient: LayerGradient, rows: slice) -> None:
        layer = GradientStore(rows.stop)
        layer.hold(gradient, rows)
        for m, k in layer.square(metrics, double=double).items():
            square[m] += k

    stream(policy, rollouts, objective, consume, order=order, **options)


def _stream_past(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    order: list[int],
    store: GradientStore,
    metrics: Metrics,
    products: dict[str, Tensor],
    norms: dict[str, Tensor] | None,
    double: bool,
    options: StreamOptions,
) -> None:
    """Add the inner products of streamed sequences with the stored ones to ``products`` (and own norms)."""

    def consume(gradient: LayerGradient, rows: slice) -> None:
        for m, k in store.cross(gradient, metrics, double=double).items():
            products[m][rows] += k
        if norms is not None:
            for m, k in square_norms(gradient, metrics).items():
                norms[m][rows] += k

    stream(policy, rollouts, objective, consume, order=order, **options)


def _block_size(policy: Policy, rollouts: Rollouts, coverage: Coverage, memory_bytes: int) -> int:
    """Sequences whose gradients fit the budget, in equal blocks; factors where they are the smaller form."""
    count = len(rollouts)
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
        per_sequence += numbers * torch.empty((), dtype=compute_dtype(param)).element_size()
    fits = memory_bytes // per_sequence
    if fits < 1:
        raise MeasurementError(
            f"the gradient of one sequence takes {per_sequence / 2**20:.0f} MiB, more than the memory budget "
            f"of {memory_bytes / 2**20:.0f} MiB; raise it, give a scratch folder, or use a random projection"
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

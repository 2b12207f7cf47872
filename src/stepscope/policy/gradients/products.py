"""Products of per-sequence gradients with given vectors, and their sums over groups, from one stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.gradients.layer_gradient import LayerGradient, restore
from stepscope.policy.gradients.store import GradientStore, Metrics
from stepscope.policy.gradients.stream import SequenceGradients, stream
from stepscope.policy.group import current
from stepscope.policy.passes import Budget
from stepscope.policy.shards import of_parts, part
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, vector_bytes
from stepscope.results import FloatArray, IntArray

CHUNK_BYTES = 32 * 2**20
"""Working memory of one slice of a layer's dense gradients."""


def per_sequence_dot(
    policy: Policy,
    gradients: SequenceGradients,
    u: ParameterVector,
    *,
    budget: Budget = Budget(),
) -> FloatArray:
    """(seq,) inner products u . grad objective_i, in memory that does not grow with the number of sequences.

    For a matrix parameter U: sum_t d_t' U x_t with layer inputs x and output gradients d; no gradient matrix
    is ever made.

    Args:
        policy: its trainable parameters are differentiated.
        gradients: of what.
        u: a vector over all trainable parameters, by name.
        budget: what may be used at a time.

    Raises:
        MeasurementError: u lacks a trainable parameter or has one of another shape.
    """
    check_vector(policy, u, "u")
    direction: dict[str, Tensor] = {}
    order = current().share(gradients.order)
    total = torch.zeros(len(order), dtype=torch.float64, device=policy.device)

    def consume(gradient: LayerGradient, rows: slice) -> None:
        name = gradient.name
        if name not in direction:
            direction[name] = gradient.oriented(part(u[name])).to(policy.device, compute_dtype(u[name]))
        total[rows] += gradient.dot(direction[name])

    stream(policy, gradients, consume, order=order, in_parts=True, budget=budget)
    result: FloatArray = current().scatter(total, order, len(gradients)).cpu().numpy()
    return result


def per_sequence_dots(
    policy: Policy,
    gradients: SequenceGradients,
    directions: Mapping[str, Tensor],
    *,
    budget: Budget = Budget(),
) -> FloatArray:
    """(direction, seq) inner products with many vectors at once, for little more than the price of one.

    Args:
        policy: its trainable parameters are differentiated.
        gradients: of what.
        directions: name to (direction, ...parameter shape), as :func:`group_gradients` gives.
        budget: what may be used at a time.
    """
    order = current().share(gradients.order)
    count = len(next(iter(directions.values())))
    stacks: dict[str, Tensor] = {}
    total = torch.zeros(count, len(order), dtype=torch.float64, device=policy.device)

    def consume(gradient: LayerGradient, rows: slice) -> None:
        name = gradient.name
        if name not in stacks:
            stacks[name] = torch.stack([gradient.oriented(t) for t in part(directions[name])])
        stack = stacks[name]
        size = rows.stop - rows.start
        for start, stop in gradient.row_slices(size, CHUNK_BYTES, stack.element_size()):
            total[:, rows] += stack[:, start:stop].flatten(1) @ gradient.dense(start, stop).flatten(1).T

    stream(policy, gradients, consume, order=order, in_parts=True, budget=budget)
    result: FloatArray = current().scatter(total.T, order, len(gradients)).T.cpu().numpy()
    return result


def paired_dots(
    policy: Policy,
    first: SequenceGradients,
    second: SequenceGradients,
    metrics: Metrics,
    *,
    budget: Budget = Budget(),
) -> dict[str, FloatArray]:
    """(seq,) inner products grad first_i . P . grad second_i of two gradients of the same sequence.

    Costs two gradient passes. The first gradients of a block are held while the second stream past; a block
    has as many sequences as the budget's memory holds, at most its ``max_sequences``. Where both are one and
    the same, these are squared norms: one pass, and nothing is held.

    Args:
        policy: its trainable parameters are differentiated.
        first: of what.
        second: of what, for the same sequences.
        metrics: name to diagonal P (by parameter name), or None for the identity.
        budget: what may be used at a time.

    Raises:
        MeasurementError: a metric does not fit the policy.
    """
    check_metrics(policy, metrics)
    order = current().share(first.order)
    own = vector_bytes(policy.parameters)
    size = max(1, min(budget.max_sequences, budget.memory_bytes // own))
    held = replace(budget, max_sequences=size, progress=False)
    found = {m: np.zeros(len(first)) for m in metrics}
    if second is first:
        nothing = GradientStore(0, metrics)

        def square(gradient: LayerGradient, rows: slice) -> None:
            for metric, squares in nothing.norms(gradient).items():
                found[metric][order[rows]] += squares.numpy()

        stream(policy, first, square, order=order, budget=budget)
    blocks = range(0, current().largest_share(len(first.order)), size)
    for start in () if second is first else blocks:
        block = order[start : start + size]
        store = GradientStore(len(block), metrics)
        stream(policy, first, store.put, order=block, budget=held)

        def consume(
            gradient: LayerGradient, rows: slice, store: GradientStore = store, block: list[int] = block
        ) -> None:
            for metric, products in store.paired(gradient, rows).items():
                found[metric][block[rows]] += products.numpy()

        stream(policy, second, consume, order=block, in_parts=True, budget=held)
    current().sum_(torch.from_numpy(values) for values in found.values())
    return found


def group_gradients(
    policy: Policy,
    gradients: SequenceGradients,
    groups: IntArray,
    *,
    budget: Budget = Budget(),
) -> dict[str, Tensor]:
    """Gradients summed within groups of sequences, by one pass: name to (group, ...parameter shape).

    Args:
        policy: its trainable parameters are differentiated.
        gradients: of what.
        groups: (seq,) group number of each sequence, 0, 1, ...
        budget: what may be used at a time.
    """
    members = np.asarray(groups)[None, :] == np.arange(int(groups.max()) + 1)[:, None]
    return weighted_gradients(policy, gradients, members.astype(np.float64), budget=budget)


def weighted_gradients(
    policy: Policy,
    gradients: SequenceGradients,
    weights: FloatArray,
    *,
    budget: Budget = Budget(),
) -> dict[str, Tensor]:
    """Weighted sums of the sequences' gradients, many in one pass: name to (sum, ...parameter shape).

    Args:
        policy: its trainable parameters are differentiated.
        gradients: of what.
        weights: (sum, seq) weight of each sequence's gradient in each sum.
        budget: what may be used at a time.
    """
    order = current().share(gradients.order)
    params = policy.parameters
    held = {n: part(p) for n, p in params.items()}
    share = torch.as_tensor(weights[:, order], device=policy.device)
    total: dict[str, Tensor] = {}
    transposed: dict[str, bool] = {}

    def consume(gradient: LayerGradient, rows: slice) -> None:
        name = gradient.name
        if name not in total:
            dtype = compute_dtype(params[name])
            total[name] = torch.zeros(len(weights), *gradient.shape, dtype=dtype, device=policy.device)
            transposed[name] = gradient.transposed
        target = total[name]
        size = rows.stop - rows.start
        own = share[:, rows].to(target.dtype)
        for start, stop in gradient.row_slices(size, CHUNK_BYTES, target.element_size()):
            block = own @ gradient.dense(start, stop).flatten(1)
            target[:, start:stop] += block.view(len(own), stop - start, -1)

    stream(policy, gradients, consume, order=order, in_parts=True, budget=budget)
    sums = {
        n: restore(total[n], transposed[n]).reshape(len(weights), *p.shape)
        if n in total
        else torch.zeros(len(weights), *p.shape, dtype=compute_dtype(p), device=policy.device)
        for n, p in held.items()
    }
    if current().lockstep:
        return {n: of_parts(t, params[n], leading=1) for n, t in sums.items()}
    current().sum_(sums.values())
    return sums


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type gradients are computed in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def check_vector(policy: Policy, vector: ParameterVector, what: str) -> None:
    """Refuse a parameter vector that does not fit the policy's trainable parameters.

    Raises:
        MeasurementError: a parameter is missing, unknown, or of another shape.
    """
    params = policy.parameters
    missing = [n for n in params if n not in vector]
    extra = [n for n in vector if n not in params]
    if missing or extra:
        raise MeasurementError(
            f"{what} does not fit the policy: {len(missing)} trainable parameters missing "
            f"({', '.join(missing[:2])}), {len(extra)} unknown ({', '.join(extra[:2])}); "
            "build it from this policy's own parameters"
        )
    for name, param in params.items():
        if vector[name].shape != param.shape:
            raise MeasurementError(
                f"{what}: {name} has shape {tuple(vector[name].shape)}, expected {tuple(param.shape)}"
            )


def check_metrics(policy: Policy, metrics: Metrics) -> None:
    """Refuse a metric that does not fit the policy's trainable parameters.

    Raises:
        MeasurementError: a parameter is missing, unknown, or of another shape.
    """
    for name, weights in metrics.items():
        if weights is not None:
            check_vector(policy, weights, f"metric {name!r}")

"""Derivatives of sums over response tokens with respect to the trainable parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from stepscope.errors import MeasurementError
from stepscope.policy import vectors
from stepscope.policy.forward import Reading, TokenBatch, TokenOutputs, forward
from stepscope.policy.group import current
from stepscope.policy.numerics.attention import mathematical_attention
from stepscope.policy.numerics.differentiation import frozen_padding, lacks_a_rule, lanes, whole_function
from stepscope.policy.numerics.finiteness import first_not_finite
from stepscope.policy.numerics.linear import sparing_linear
from stepscope.policy.passes import Budget, by_length, fitting, out_of_memory, padded, sweep, widths
from stepscope.policy.sharding import Replaced, along, pulled_back, sharded, with_tangent
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, Rollouts

Objective = Callable[[TokenOutputs, TokenBatch], Tensor]
"""A differentiable function of what the policy says: (seq,) or (seq, tok), zero on padding."""

Readings = Callable[[TokenBatch], Mapping[Hashable, Reading]]
"""What an objective reads off the distributions of a micro-batch beside, by key."""

Values = Mapping[str, Tensor] | Replaced
Mode = Literal["auto", "forward", "double_backward"]
logger = logging.getLogger(__name__)

MOST_DIRECTIONS = 8
"""Most directions that share a forward pass; of which no more than an eighth of a pass each is then left."""


@dataclass(frozen=True, eq=False)
class WeightedLogprobs:
    """The objective sum_k w_ik l_ik, (seq, tok): with a step's token weights its gradient is -grad Loss.

    Attributes:
        weights: one (tok,) array per sequence of the batch it is used on.
    """

    weights: Sequence[FloatArray]

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """w_ik l_ik."""
        return batch.pad(self.weights, outputs.logprobs) * outputs.logprobs


def nothing_read(batch: TokenBatch) -> Mapping[Hashable, Reading]:
    """For objectives of log-probs and entropies."""
    return {}


def concerned(rollouts: Rollouts, objective: Objective) -> list[int]:
    """Sequences that an objective depends on, longest first; the others add exactly 0 and need no pass."""
    order = by_length(rollouts)
    if isinstance(objective, WeightedLogprobs):
        return [i for i in order if np.any(objective.weights[i])]
    return order


def response_logprob(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    """l_k per token: the objective whose sum over a response is S_i."""
    return outputs.logprobs


def response_entropy(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    """H_k per token: the objective whose sum over a response is its entropies at given prefixes."""
    return outputs.entropies


def gradient(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    *,
    as_trained: bool = True,
    readings: Readings = nothing_read,
    budget: Budget = Budget(),
) -> dict[str, Tensor]:
    """Gradient of the objective summed over all sequences (and tokens): one forward and one backward.

    Parameters the objective does not depend on get a zero gradient; sequences it does not, no pass.

    Args:
        policy: its trainable parameters are differentiated.
        rollouts: the sequences.
        objective: (seq,) or (seq, tok).
        as_trained: leave out what a training does (embeddings of padding tokens, DoRA's norm);
            otherwise the gradient is that of the function.
        readings: what the objective reads off the distributions beside.
        budget: how large micro-batches are.
    """
    params, split = policy.parameters, sharded(policy.model) is not None
    total = {n: torch.zeros_like(p) for n, p in params.items()}

    def pulled(batch: TokenBatch) -> tuple[Tensor | None, ...]:
        temperature = rollouts.temperature
        outputs = forward(policy.model, batch, temperature=temperature, readings=readings(batch))
        return pulled_back(policy.model, objective(outputs, batch).sum(), list(params.values()))

    with nullcontext() if as_trained else whole_function(policy.model):
        order = current().share(concerned(rollouts, objective))
        for _, grads in sweep(policy, rollouts, pulled, budget=budget, order=order, what="gradient"):
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    total[name] += grad
    if not split:
        current().sum_(total.values())
    if problem := first_not_finite(total.items()):
        raise MeasurementError(
            f"the gradient is not finite: {problem}; measure with --precision float64, or an earlier "
            "checkpoint"
        )
    return total


def directional_derivative(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    direction: ParameterVector,
    *,
    mode: Mode = "auto",
    as_trained: bool = True,
    budget: Budget = Budget(),
) -> list[Tensor]:
    """Derivative of the objective along a direction; see :func:`directional_derivatives`."""
    (found,) = directional_derivatives(
        policy, rollouts, objective, [direction], mode=mode, as_trained=as_trained, budget=budget
    )
    return found


def directional_derivatives(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    directions: Iterable[ParameterVector],
    *,
    mode: Mode = "auto",
    as_trained: bool = True,
    budget: Budget = Budget(),
) -> Iterator[list[Tensor]]:
    """Derivatives of the objective along directions, for every sequence or every token, exactly.

    Each entry is a scalar for an objective of shape (seq,), and (tok,) without padding for (seq, tok).
    ``forward`` is forward-mode differentiation: about two forward passes, no graph kept; several directions
    at a time share the first of the two, where torch can batch all operations of the model.
    ``double_backward`` differentiates the linear map v -> grad(v . objective) . direction in v: about twice
    as slow, holds a graph, and needs no forward-mode rules. ``auto`` takes forward mode and, where the model
    has an operation without a forward-mode rule, says so and takes the other; of a sharded model, which takes
    one direction at a time, the other are central differences. Attention runs on the mathematical backend,
    the only one with either rule.

    Args:
        policy: not changed.
        rollouts: the sequences.
        objective: (seq,) or (seq, tok).
        directions: by parameter name, the same names in each; parameters they lack stay put. As many are
            asked for at a time as are taken together.
        mode: how to differentiate.
        as_trained: leave out what a training does (embeddings of padding tokens, DoRA's norm);
            otherwise the derivative is that of the function.
        budget: how large micro-batches are, and the memory for directions.
    """
    split = sharded(policy.model) is not None
    count = 1 if split or mode == "double_backward" else _at_a_time(policy, rollouts, budget)
    waiting = iter(directions)

    params: dict[str, Tensor] = {}
    chunk: list[ParameterVector] = []

    def slopes(batch: TokenBatch) -> Sequence[Tensor]:
        nonlocal mode, count

        def value(values: Values) -> Tensor:
            outputs = forward(policy.model, batch, temperature=rollouts.temperature, params=values)
            return objective(outputs, batch)

        def single(direction: ParameterVector) -> Tensor:
            nonlocal mode
            if mode != "double_backward":
                try:
                    return pushed_forward(value, direction)
                except (NotImplementedError, RuntimeError) as error:
                    if mode == "forward" or not lacks_a_rule(error):
                        raise
                    other = "central differences" if split else "double backward"
                    logger.warning("token derivatives by %s: %s", other, error)
                    mode = "double_backward"
            if split:
                return central_difference(value, params, direction)
            return _double_backward(value, params, cast(direction))

        meant = frozen_padding(policy.model) if as_trained else whole_function(policy.model)
        with mathematical_attention(), meant:
            if len(chunk) > 1 and count > 1:
                try:
                    return _pushed_together(value, params, [cast(direction) for direction in chunk]).unbind()
                except (NotImplementedError, RuntimeError) as error:
                    if out_of_memory(error) and len(batch) > 1:
                        raise
                    logger.debug("directions one at a time: %s", error)
                    count = 1
            return [single(direction) for direction in chunk]

    def cast(direction: ParameterVector) -> dict[str, Tensor]:
        return {n: t.to(params[n].dtype) for n, t in direction.items()}

    while chunk := list(islice(waiting, count)):
        params = {n: policy.parameters[n].detach() for n in chunk[0]}
        found: list[dict[int, Tensor]] = [{} for _ in chunk]
        sizes = _smaller(budget, len(chunk), policy, rollouts)
        for batch, values in sweep(policy, rollouts, slopes, budget=sizes):
            for rows, own in zip(found, values, strict=True):
                rows |= batch.rows(own)
        for rows in found:
            yield list(current().rows(rows).values())


def _at_a_time(policy: Policy, rollouts: Rollouts, budget: Budget) -> int:
    """Directions that are taken together: those that the budget's memory holds beside their stack."""
    each = sum(p.nbytes for p in policy.parameters.values())
    most = min(MOST_DIRECTIONS, budget.memory_bytes // (2 * each))
    items = widths(rollouts, range(len(rollouts)))
    tokens = fitting(policy, budget, items).max_tokens
    if tokens is not None:
        most = min(most, tokens // padded(items))
    return max(1, most)


def _smaller(budget: Budget, count: int, policy: Policy, rollouts: Rollouts) -> Budget:
    """The budget for several directions at a time, of which each has the activations of a pass to itself.

    Together they are as many rows as one pass has; more leave the caches, and take longer.
    """
    if count == 1:
        return budget
    tokens = fitting(policy, budget, widths(rollouts, range(len(rollouts)))).max_tokens
    return replace(
        budget,
        max_sequences=max(1, budget.max_sequences // count),
        max_tokens=None if tokens is None else max(1, tokens // count),
    )


def _pushed_together(
    value: Callable[[Values], Tensor],
    params: dict[str, Tensor],
    tangents: Sequence[ParameterVector],
) -> Tensor:
    """(direction, ...) derivatives of a function of parameter values, which is computed once."""
    stacks = {n: torch.stack([tangent[n] for tangent in tangents]) for n in params}

    def pushed(tangent: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.jvp(value, (params,), (tangent,))[1]
        return found

    with torch.no_grad(), sparing_linear(), lanes(len(tangents)):
        together: Tensor = torch.func.vmap(pushed)(stacks)
    return together


def pushed_forward(value: Callable[[Values], Tensor], direction: ParameterVector) -> Tensor:
    """The derivative of a function of parameter values along a tangent, in forward mode; no graph is kept."""
    with torch.no_grad(), forward_ad.dual_level(), sparing_linear():
        output, derivative = forward_ad.unpack_dual(value(with_tangent(direction)))  # type: ignore[no-untyped-call]
        return torch.zeros_like(output) if derivative is None else derivative


def central_difference(
    value: Callable[[Values], Tensor], params: ParameterVector, direction: ParameterVector
) -> Tensor:
    """The derivative of a function of parameters along a direction, by differences.

    Its step moves the values by eps^(1/3) of their size, or the parameters where these move more; the error
    is about eps^(2/3), 4e-11 in float64 and 2e-5 in float32.

    Args:
        value: of parameter values.
        params: where it is taken.
        direction: by parameter name.
    """
    dtype = next(iter(params.values())).dtype
    share = torch.finfo(dtype).eps ** (1 / 3)
    length = vectors.norm(direction)
    if length == 0:
        with torch.no_grad():
            return torch.zeros_like(value(along(direction, torch.zeros((), dtype=dtype))))

    def at(reach: float) -> tuple[Tensor, Tensor]:
        stop = torch.tensor(reach, dtype=dtype)
        with torch.no_grad():
            return value(along(direction, stop)), value(along(direction, -stop))

    reach = share * max(vectors.norm(params), share) / length
    above, below = at(reach)
    group = current()
    moved = group.most(float((above - below).abs().max()) / 2)
    size = group.most(float((above + below).abs().max()) / 2)
    if moved > share * size > 0:
        reach *= share * size / moved
        above, below = at(reach)
    slope: Tensor = (above - below) / (2 * reach)
    return slope


def _double_backward(
    value: Callable[[Values], Tensor], params: Mapping[str, Tensor], tangent: Mapping[str, Tensor]
) -> Tensor:
    """J tangent as the derivative of the linear function v -> (J' v) . tangent, at v = 0."""
    with torch.enable_grad():
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        output = value(leaves)
        weights = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, list(leaves.values()), weights, create_graph=True, allow_unused=True
        )
        total = (
            sum((g * tangent[n]).sum() for n, g in zip(leaves, pulled, strict=True) if g is not None)
            + 0 * weights.sum()
        )
        (derivative,) = torch.autograd.grad(total, weights)
    return derivative

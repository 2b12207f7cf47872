"""Products of Hessians with vectors in parameter space, many vectors to one graph.

The Hessian of F = sum_i s_i f_i, f_i a function of what the policy says of sequence i, is symmetric, so that
H u is the derivative of grad F . u: the gradient of a micro-batch is made once, with its graph, and pulled
back along one vector after the other, several at a time where torch can batch every operation of the model.
Nothing here needs forward-mode rules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, TokenOutputs, forward
from stepscope.policy.gradients.derivatives import MOST_DIRECTIONS
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.group import current
from stepscope.policy.numerics.attention import mathematical_attention
from stepscope.policy.numerics.differentiation import whole_function
from stepscope.policy.numerics.finiteness import first_not_finite
from stepscope.policy.passes import Budget, by_length, fitting, out_of_memory, sweep, widths
from stepscope.policy.sharding import sharded
from stepscope.policy.state import Policy
from stepscope.policy.vectors import vector_bytes
from stepscope.results import FloatArray

logger = logging.getLogger(__name__)

Functions = Callable[[TokenOutputs, TokenBatch], Sequence[Tensor]]
"""What the policy says of a micro-batch to one (seq,) tensor for each function."""


@dataclass(frozen=True)
class Curved:
    """One function F: its gradient, and its Hessian times each of some vectors.

    Attributes:
        gradient: grad F by parameter name.
        products: name to (vector, ...parameter shape) H u.
    """

    gradient: dict[str, Tensor]
    products: dict[str, Tensor]


def hessian_products(
    policy: Policy,
    functions: Functions,
    sequences: SequenceGradients,
    vectors: Mapping[str, Tensor],
    *,
    shares: FloatArray,
    num_functions: int = 1,
    budget: Budget = Budget(),
) -> list[Curved]:
    """Gradients and Hessian-vector products of sum_i shares_i f_i, for several functions f at once.

    Args:
        policy: not changed; differentiated as the function that it is (embeddings of padding and DoRA's norm
            included), in the model's own precision.
        functions: of what the policy says; their objective in ``sequences`` is not looked at.
        sequences: the batch, and what is read off its distributions.
        vectors: name to (vector, ...parameter shape), over all trainable parameters.
        shares: (seq,) weight of each sequence; those of weight 0 need no pass.
        num_functions: how many functions there are.
        budget: how large micro-batches are, and the memory for vectors; they hold fewer sequences than other
            passes, since the graph of the gradient is held beside that of the function, and that of each
            vector that is pulled back with others.

    Returns:
        One for each function.

    Raises:
        MeasurementError: the parameters are sharded, or a product is not finite.
    """
    if sharded(policy.model) is not None:
        raise MeasurementError(
            "Hessian-vector products need whole parameters, and these are sharded; measure without --shard"
        )
    rollouts, params = sequences.rollouts, policy.parameters
    weights = torch.as_tensor(shares)
    stacks = {n: vectors[n].to(p.dtype) for n, p in params.items()}
    count = len(next(iter(stacks.values())))
    lanes = min(MOST_DIRECTIONS, max(1, budget.memory_bytes // (4 * vector_bytes(params))))
    chosen = [i for i in by_length(rollouts) if shares[i] != 0]
    tokens = fitting(policy, budget, widths(rollouts, chosen)).max_tokens
    sizes = replace(
        budget,
        max_sequences=max(1, budget.max_sequences // 2),
        max_tokens=None if tokens is None else max(1, tokens // (2 * lanes)),
    )

    def pulled(batch: TokenBatch) -> list[tuple[Sequence[Tensor | None], list[list[Tensor | None]]]]:
        nonlocal lanes
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        along = list(leaves.values())
        with torch.enable_grad(), mathematical_attention(), whole_function(policy.model):
            outputs = forward(
                policy.model,
                batch,
                temperature=rollouts.temperature,
                params=leaves,
                readings=sequences.readings(batch),
            )
            share = weights[batch.seq_index.cpu()]
            found: list[tuple[Sequence[Tensor | None], list[list[Tensor | None]]]] = []
            for values in functions(outputs, batch):
                total = (values * share.to(values)).sum()
                grads = torch.autograd.grad(
                    total, along, create_graph=True, allow_unused=True, retain_graph=True
                )
                moved, start = [], 0
                while start < count:
                    part = slice(start, min(start + lanes, count))
                    try:
                        moved.append(_pulled_back(grads, along, {n: t[part] for n, t in stacks.items()}))
                    except (NotImplementedError, RuntimeError) as error:
                        if out_of_memory(error) or lanes == 1:
                            raise
                        logger.debug("Hessian-vector products one at a time: %s", error)
                        lanes = 1
                        continue
                    start = part.stop
                found.append(([None if g is None else g.detach() for g in grads], moved))
        return found

    curved = [_nothing(params, count) for _ in range(num_functions)]
    for _, every in sweep(policy, rollouts, pulled, budget=sizes, order=current().share(chosen)):
        for own, (grads, moved) in zip(curved, every, strict=True):
            _add(own, grads, moved)
    for own in curved:
        current().sum_(own.gradient.values())
        current().sum_(own.products.values())
        if problem := first_not_finite([*own.gradient.items(), *own.products.items()]):
            raise MeasurementError(
                f"a Hessian-vector product is not finite: {problem}; measure with --precision float64"
            )
    return curved


def _pulled_back(
    grads: Sequence[Tensor | None], along: Sequence[Tensor], stacks: Mapping[str, Tensor]
) -> list[Tensor | None]:
    """For each parameter (vector, ...) the derivative of grads . u, for the vectors u of some stacks."""
    live = [(g, u) for g, u in zip(grads, stacks.values(), strict=True) if g is not None and g.requires_grad]
    if not live:
        return [None] * len(along)
    outputs = [g for g, _ in live]
    if len(live[0][1]) == 1:
        found = torch.autograd.grad(
            outputs, along, [u[0] for _, u in live], retain_graph=True, allow_unused=True
        )
        return [None if h is None else h.unsqueeze(0) for h in found]
    return list(
        torch.autograd.grad(
            outputs,
            along,
            [u for _, u in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    )


def _nothing(params: Mapping[str, Tensor], count: int) -> Curved:
    return Curved(
        {n: torch.zeros_like(p) for n, p in params.items()},
        {n: p.new_zeros(count, *p.shape) for n, p in params.items()},
    )


def _add(own: Curved, grads: Sequence[Tensor | None], moved: Sequence[Sequence[Tensor | None]]) -> None:
    """Add what one micro-batch gives."""
    for total, grad in zip(own.gradient.values(), grads, strict=True):
        if grad is not None:
            total += grad
    start = 0
    for columns in moved:
        size = next((len(h) for h in columns if h is not None), 0)
        for total, part in zip(own.products.values(), columns, strict=True):
            if part is not None:
                total[start : start + size] += part
        start += size

"""Derivatives of sums over response tokens with respect to the trainable parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepscope.policy.forward import TokenBatch, TokenOutputs, batches, forward
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Rollouts

Objective = Callable[[TokenOutputs, TokenBatch], Tensor]
"""A differentiable function of what the policy says: (seq,) or (seq, tok), zero on padding."""


def gradient(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    *,
    max_sequences: int = 16,
    keep_logits: bool = False,
) -> dict[str, Tensor]:
    """Gradient of the objective summed over all sequences (and tokens): one forward and one backward.

    Parameters the objective does not depend on get a zero gradient.
    """
    params = policy.parameters
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for batch in batches(rollouts, max_sequences=max_sequences, device=policy.device):
        outputs = forward(policy.model, batch, temperature=rollouts.temperature, keep_logits=keep_logits)
        value = objective(outputs, batch).sum()
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                total[name] += grad
    return total


def directional_derivative(
    policy: Policy,
    rollouts: Rollouts,
    objective: Objective,
    direction: ParameterVector,
    *,
    max_sequences: int = 16,
    keep_logits: bool = False,
) -> list[Tensor]:
    """Forward-mode derivative d objective / d params . direction, one tensor per sequence of the batch.

    Each entry is a scalar for an objective of shape (seq,), and (tok,) without padding for (seq, tok).
    Memory does not grow with the number of layers: no graph is kept. Attention runs on the mathematical
    backend, the only one with a forward-mode rule.
    """
    params = {n: policy.parameters[n].detach() for n in direction}
    tangent = {n: t.to(params[n].dtype) for n, t in direction.items()}
    found: dict[int, Tensor] = {}
    for batch in batches(rollouts, max_sequences=max_sequences, device=policy.device):

        def value(values: dict[str, Tensor], batch: TokenBatch = batch) -> Tensor:
            outputs = forward(
                policy.model, batch, temperature=rollouts.temperature, params=values, keep_logits=keep_logits
            )
            return objective(outputs, batch)

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            _, derivative = torch.func.jvp(value, (params,), (tangent,))
        for row, i in enumerate(batch.seq_index.tolist()):
            entry = derivative[row]
            found[i] = entry[batch.response_mask[row]] if entry.dim() else entry
    return [found[i] for i in range(len(rollouts))]

"""The estimator of a quantity as a function of the parameters, to be differentiated twice.

Of a response y that the policy at hand drew, and other parameters theta',

    f(theta') = sum_k (rho_{<=k} - rho_{<k}) (R'_k - b_k) + sum_k f'_k
    rho_{<=k} = exp(sum_{j<=k} (l'_j - l_j))

is the importance-weighted value of ``measure.quantity.estimators.per_decision``, whose mean is F(theta') for
every theta'. Its Hessian at theta'= theta is therefore an unbiased estimator of Hess F, and along one
direction it is, response by response, the second derivative of ``measure.change.second_order.second``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepscope.measure.quantity.estimators import ProbeValues
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.hessian import Functions


def curved_functions(probe: ProbeValues) -> tuple[Functions, int]:
    """(seq,) f of each response; on policy and per token also what it says of the number of tokens.

    Per token F/N takes two: f with the mean taken off every value, and the same for the length.

    Args:
        probe: values at the parameters where the derivatives are taken.

    Returns:
        The functions of a micro-batch, and how many there are.
    """
    quantity = probe.quantity
    ahead_baseline, length_ahead = map(torch.from_numpy, (probe.baseline.values, probe.length_ahead))

    def functions(outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, ...]:
        mask = batch.response_mask.to(outputs.logprobs)
        prefix = quantity.prefix_values(outputs, batch) * mask
        token = quantity.token_values(outputs, batch) * mask
        value = (prefix + token).sum(-1)
        if not quantity.on_policy:
            return (value,)
        rows, width = batch.seq_index.cpu(), mask.shape[1]

        def of(table: Tensor) -> Tensor:
            return table[rows, :width].to(mask)

        moved = (outputs.logprobs - outputs.logprobs.detach()) * mask
        through = moved.cumsum(-1)
        growth = (through.exp() - (through - moved).exp()) * mask
        returns = (_after(prefix - probe.offset * mask) + _after(token) + token) * mask
        value = value + (growth * (returns - of(ahead_baseline))).sum(-1)
        if not quantity.per_token:
            return (value,)
        return value, (growth * of(length_ahead)).sum(-1)

    return functions, 2 if quantity.on_policy and quantity.per_token else 1


def _after(values: Tensor) -> Tensor:
    """(seq, tok) sum over the positions behind each one."""
    return values.flip(-1).cumsum(-1).flip(-1) - values

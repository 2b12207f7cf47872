"""The function of a probe batch whose gradient estimates a quantity's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from stepscope.measure.quantity.estimators import ProbeValues
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import Objective


def quantity_objective(probe: ProbeValues) -> Objective:
    """Surrogate whose mean over the probe batch (or expectation, enumerated) has the gradient grad F.

        g_i = sum_k (f_k - offset) + sum_k (R_k - b_k) l_k, over E[n] per token

    with R_k, b_k and the offset (Fbar per token and on policy) held fixed; the second sum only on policy.

    Args:
        probe: values at the parameters where the gradient is taken.

    Returns:
        An objective of shape (seq,) for ``policy.gradients``; use ``readings_of`` for its quantity.
    """
    quantity, offset = probe.quantity, probe.offset
    divisor = probe.mean_length if quantity.per_token else 1.0
    ahead = torch.from_numpy(probe.ahead)

    def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        values = quantity.prefix_values(outputs, batch) + quantity.token_values(outputs, batch)
        values = values - offset * batch.response_mask.to(values.dtype)
        if quantity.on_policy:
            width = outputs.logprobs.shape[1]
            returns = ahead[batch.seq_index.cpu(), :width].to(outputs.logprobs)
            values = values + returns * outputs.logprobs
        return values.sum(-1) / divisor

    return objective

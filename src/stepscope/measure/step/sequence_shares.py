"""Whose gradient it is: the share of each sequence in the gradient's squared norm, so that a spike has names.

With a_i = sum_k w_ik grad l_ik of sequence i and a = -grad Loss, their sum and the gradients of the terms,

    share_i = <a_i, a>/|a|^2,    effective number = (sum share_i)^2 / sum share_i^2

The shares of sequences and terms add up to 1; one below 0 pulls against the rest. The effective number is the
batch's size where all have one share, and 1 where one sequence has all. Clipping, momentum and preconditioner
have no part in it. One backward pass makes products and norms, and no sequence's gradient as a whole. Pinned
by ``tests/measure/test_sequence_shares.py`` against the gradient of each sequence alone.
"""

from __future__ import annotations

import numpy as np
import torch

from stepscope.errors import MeasurementError
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.gradients.layer_gradient import LayerGradient
from stepscope.policy.gradients.products import CHUNK_BYTES, compute_dtype
from stepscope.policy.gradients.stream import SequenceGradients, stream
from stepscope.policy.group import current
from stepscope.policy.passes import Budget
from stepscope.policy.shards import part
from stepscope.policy.state import Policy
from stepscope.results.step import SequenceShares
from stepscope.stats import Estimate, exact

SUM_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-2}
"""How far the sequences' gradients may be from adding up to the batch's, in units of the sum of their norms.

Round-off is a share of what is added, however much of it cancels."""


def sequence_shares(policy: Policy, step: Step, *, budget: Budget = Budget()) -> SequenceShares | None:
    """The share of each sequence in the gradient before clipping, and the norm of its own.

    Args:
        policy: where the step starts; not changed.
        step: the step.
        budget: what may be used at a time.

    Returns:
        None where the gradient is 0.

    Raises:
        MeasurementError: the shares do not add up to 1, though the loss has no terms beside its sequences.
    """
    total = vectors.norm(step.ascent)
    if total == 0:
        return None
    gradients = SequenceGradients(step.update, weighted_logprobs(step.token_weights))
    order = current().share(gradients.order)
    whole: dict[str, torch.Tensor] = {}
    own = torch.zeros(2, len(order), dtype=torch.float64, device=policy.device)

    def consume(gradient: LayerGradient, rows: slice) -> None:
        name = gradient.name
        if name not in whole:
            ascent = step.ascent[name]
            whole[name] = gradient.oriented(part(ascent)).to(policy.device, compute_dtype(ascent))
        size = rows.stop - rows.start
        for start, stop in gradient.row_slices(size, CHUNK_BYTES, whole[name].element_size()):
            dense = gradient.dense(start, stop).flatten(1)
            own[0, rows] += dense @ whole[name][start:stop].flatten()
            own[1, rows] += dense.square().sum(1)

    stream(policy, gradients, consume, order=order, budget=budget)
    products, squares = current().scatter(own.T, order, len(step.update)).T.cpu().numpy()
    shares = products / total**2
    _refuse_missing(policy, step, float(shares.sum()), float(np.sqrt(squares).sum()) / total)
    square = float(np.sum(shares**2))
    return SequenceShares(
        share=tuple(shares.tolist()),
        norm=tuple(np.sqrt(squares).tolist()),
        largest=int(shares.argmax()),
        effective=float(shares.sum()) ** 2 / square if square else float("nan"),
    )


def _refuse_missing(policy: Policy, step: Step, added: float, cancelling: float) -> None:
    """Refuse gradients of sequences that do not add up to that of the batch, which other hooks have made.

    Args:
        policy: in which type they were computed.
        step: with the components of its loss.
        added: sum of all shares.
        cancelling: sum of the sequences' norms over the norm of their sum.
    """
    limit = SUM_LIMIT.get(policy.dtype, 0.1) * max(1.0, cancelling)
    if set(step.components) <= {"momentum", "decay", "sequences"} and not abs(added - 1) <= limit:
        raise MeasurementError(
            f"the gradients of the batch's sequences add up to {added:.6g} of the batch's own gradient, "
            f"expected 1 to {limit:g}; measure with --precision float64, and report this architecture if "
            "that does not help"
        )


def sequence_share_figures(found: SequenceShares, count: int) -> dict[str, Estimate]:
    """The headline figures of the sequences' shares.

    Args:
        found: of the step.
        count: prompts of the update batch.
    """
    return {
        "gradient_share_largest": exact(
            found.share[found.largest],
            count,
            "share of the gradient",
            f"<g_i, g>/|g|^2 of sequence {found.largest}, the largest; exact for this update batch",
        ),
        "gradient_sequences_effective": exact(
            found.effective,
            count,
            "sequences",
            f"(sum s)^2/sum s^2 of s_i = <g_i, g>/|g|^2 over {len(found.share)} sequences; "
            "exact for this update batch",
        ),
    }

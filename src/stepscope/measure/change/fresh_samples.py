"""The change of a quantity by sampling afresh at the shifted parameters: slow, noisy, and free of weights.

An independent check of ``measure.change``: it knows nothing of importance weights, derivatives or baselines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from stepscope.errors import MeasurementError
from stepscope.measure.change.sweep import Line
from stepscope.measure.quantity.quantities import make_quantity, unit_of, why_trivial
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted
from stepscope.results import FloatArray, Rollouts
from stepscope.stats import Estimate, clustered_estimate


def resample_change(
    policy: Policy,
    step: Line,
    sample: Callable[[], Rollouts],
    *,
    lr: float,
    quantity: str = "entropy",
    normalisation: str = "per_token",
    reference: nn.Module | None = None,
) -> Estimate:
    """F(params + lr * direction) - F(params), each from samples drawn at those very parameters.

    Args:
        policy: where the step starts; restored bitwise.
        step: anything with ``direction`` and ``lr``.
        sample: draws a batch from the policy as it is when called; called twice. When both calls ask the same
            prompts the difference is paired by prompt.
        lr: learning rate.
        quantity: its name.
        normalisation: ``per_token`` or ``per_seq``.
        reference: reference model of ``kl``.

    Returns:
        The change, with an error clustered by prompt (delta method per token).

    Raises:
        MeasurementError: the quantity is constant by definition in this normalisation.
    """
    before_batch = sample()
    before, before_influence = _level(policy, before_batch, quantity, normalisation, reference)
    with shifted(policy.parameters, step.direction, lr):
        after_batch = sample()
        after, after_influence = _level(policy, after_batch, quantity, normalisation, reference)
    total = len(before_batch) + len(after_batch)
    influence = np.concatenate(
        [
            after_influence * (total / len(after_batch)),
            before_influence * (-total / len(before_batch)),
        ]
    )
    paired = set(before_batch.prompt_keys) == set(after_batch.prompt_keys)
    tags = ("", "") if paired else ("after ", "before ")
    clusters = [tags[0] + p for p in after_batch.prompt_keys] + [
        tags[1] + p for p in before_batch.prompt_keys
    ]
    bound = make_quantity(quantity, before_batch, policy=policy, reference=reference)
    return clustered_estimate(
        after - before,
        influence,
        clusters,
        unit=unit_of(bound, normalisation),
        method=f"sampled afresh at both ends, {'paired by prompt' if paired else 'different prompts'}",
    )


def _level(
    policy: Policy, rollouts: Rollouts, name: str, normalisation: str, reference: nn.Module | None
) -> tuple[float, FloatArray]:
    """The quantity on a batch drawn from the policy as it is, and its (seq,) influence values."""
    quantity = make_quantity(name, rollouts, policy=policy, reference=reference)
    trivial = why_trivial(quantity, normalisation, "on_policy")
    if trivial:
        raise MeasurementError(trivial)
    totals = quantity.base.per_seq
    if normalisation == "per_seq":
        mean = float(totals.mean())
        return mean, totals - mean
    lengths = rollouts.num_tokens.astype(np.float64)
    ratio = float(totals.sum() / lengths.sum())
    return ratio, (totals - ratio * lengths) / lengths.mean()

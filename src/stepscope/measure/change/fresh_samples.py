"""The change of a quantity by sampling afresh at the shifted parameters: slow, noisy, and free of weights.

An independent check: it knows nothing of importance weights, derivatives or baselines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stepscope.measure.change.measured import StepLike
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.estimators import Sampled, value
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted
from stepscope.results import Rollouts
from stepscope.stats import Estimate, clustered_estimate


def resample_change(
    policy: Policy,
    step: StepLike,
    sample: Callable[[], Rollouts],
    *,
    lr: float,
    quantity: str | Quantity = "entropy",
    budget: Budget = Budget(),
) -> Estimate:
    """F(params + lr * direction) - F(params), each from samples drawn at those very parameters.

    Args:
        policy: where the step starts; restored bitwise.
        step: anything with ``direction`` and ``lr``.
        sample: draws a batch from the policy as it is when called; called twice. When both calls ask the same
            prompts the difference is paired by prompt.
        lr: learning rate.
        quantity: a name, or a quantity, on policy.
        budget: what may be used at a time.

    Returns:
        The change, with an error clustered by prompt (delta method per token).

    Raises:
        MeasurementError: the quantity is constant by definition.
    """
    before_batch = sample()
    before = _level(policy, before_batch, quantity, budget)
    with shifted(policy.parameters, step.direction, lr):
        after_batch = sample()
        after = _level(policy, after_batch, quantity, budget)
    total = len(before_batch) + len(after_batch)
    residuals = np.concatenate(
        [
            after.residuals * (total / len(after_batch)),
            before.residuals * (-total / len(before_batch)),
        ]
    )
    paired = set(before_batch.prompt_keys) == set(after_batch.prompt_keys)
    tags = ("", "") if paired else ("after ", "before ")
    clusters = [tags[0] + p for p in after_batch.prompt_keys] + [
        tags[1] + p for p in before_batch.prompt_keys
    ]
    return clustered_estimate(
        after.value - before.value,
        residuals,
        clusters,
        unit=make_quantity(quantity, before_batch, policy=policy).unit,
        method=f"sampled afresh at both ends, {'paired by prompt' if paired else 'different prompts'}",
    )


def _level(policy: Policy, rollouts: Rollouts, quantity: str | Quantity, budget: Budget) -> Sampled:
    """The quantity on a batch drawn from the policy as it is."""
    chosen = make_quantity(quantity, rollouts, policy=policy)
    values = values_at(policy, rollouts, (chosen,), budget=budget).quantity(0)
    return value(probe_values(chosen, values, rollouts))

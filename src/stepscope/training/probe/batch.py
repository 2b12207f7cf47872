"""What the batch of the step under way says about the gradient's noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from stepscope.measure.noise.scale import from_products
from stepscope.measure.step.reconstruct import CLIP_EPSILON, weighted_logprobs
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.stats import Estimate

MIN_PROMPTS = 3
"""Fewest prompts in a batch whose noise scale has an error."""

SAME_NORM = 0.01
"""Largest relative difference between the gradient in use and that of the captured token weights."""


def products_of_batch(
    policy: Policy, update: Rollouts, weights: tuple[FloatArray, ...], budget: Budget
) -> FloatArray:
    """(seq, seq) inner products of the sequences' gradients."""
    found = gram(policy, SequenceGradients(update, weighted_logprobs(weights)), budget=budget)
    return np.asarray(found.numpy(), dtype=np.float64)


def noise_of_batch(products: FloatArray, update: Rollouts, norm: float, limit: float) -> Estimate:
    """The noise scale of the batch in prompts, flagged where the captured weights do not give its gradient.

    Args:
        products: (seq, seq) inner products of the sequences' gradients.
        update: the batch.
        norm: of the gradient in use.
        limit: clipping threshold; 0 for none.
    """
    count = update.num_prompts
    if count < MIN_PROMPTS:
        nan = float("nan")
        reason = f"{count} prompts in the batch, a noise scale with an error needs {MIN_PROMPTS}"
        return Estimate(nan, nan, count, "prompts", "sgd metric", reliable=False, reason=reason)
    full = math.sqrt(max(0.0, float(products.sum())))
    expected = full * min(1.0, limit / (full + CLIP_EPSILON)) if limit > 0 else full
    found = from_products(
        products, update.prompt_index, unit="squared gradient norm", method="sgd metric"
    ).prompts
    if abs(expected - norm) <= SAME_NORM * max(expected, norm):
        return found
    reason = (
        f"the token weights give a gradient of norm {expected:.3g}, the optimizer gets {norm:.3g}: "
        "the loss has a part that does not go through the log-probs"
    )
    return replace(found, reliable=False, reason=reason)

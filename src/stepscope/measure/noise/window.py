"""Gradient noise scale of a training under way, from the gradients of successive steps.

Between steps AdamW keeps the first moment m, a running mean of past gradients. The gradient g_t of a step
and the bias-corrected m of the steps before it come from independent batches, so that, while the true
gradient G changes little,

    E[g_t . m_{t-1} / (1 - b1^{t-1})] = |G|^2        E|g_t|^2 = |G|^2 + tr S / B

with B prompt groups a step and S the covariance of one group's gradient (McCandlish et al. 2018, appendix A,
has the second; the first replaces its small batch). Both are averaged over a window of steps before their
quotient is taken. Nothing of the size of the parameters is kept.
"""

from __future__ import annotations

import numpy as np

from stepscope.intervals import student
from stepscope.results import FloatArray
from stepscope.stats import Estimate, jackknife, leave_out

MIN_BLOCKS = 3
"""Fewest blocks of steps that give an error."""


def window_noise_scale(products: FloatArray, *, prompts_per_step: float, block: int) -> Estimate:
    """B (mean |g|^2 - mean g . m) / (mean g . m): prompt groups at which gradient and noise are equal.

    The gradients are those the optimizer sees, after clipping. Successive steps share most of m, so the
    standard error is a jackknife over blocks of steps.

    Args:
        products: (step, 2) inner product g_t . m_{t-1} / (1 - b1^{t-1}) and squared norm |g_t|^2 of
            successive steps.
        prompts_per_step: B.
        block: steps in a block, about the memory 1/(1 - b1) of the first moment.

    Returns:
        The noise scale in prompts; n is the number of steps, the interval Student's t over blocks. No number
        where the signal is not resolved from zero; flagged where there are too few steps for an error.
    """
    method = f"gradients of {len(products)} successive steps, jackknife over blocks of {block}"
    labels = np.arange(len(products)) // block
    blocks = int(labels[-1]) + 1 if len(products) else 0
    if blocks < MIN_BLOCKS:
        value = _quotient(products, prompts_per_step) if len(products) else float("nan")
        reason = f"{len(products)} steps, {MIN_BLOCKS} blocks of {block} give an error; wait for more"
        return Estimate(value, float("nan"), len(products), "prompts", method, reliable=False, reason=reason)
    _, ratio = jackknife(leave_out(lambda kept: _quotient(products[kept], prompts_per_step), labels))
    strength = float(products[:, 0].mean())
    _, spread = jackknife(leave_out(lambda kept: float(products[kept, 0].mean()), labels))
    value, reach, reason = _quotient(products, prompts_per_step), student(blocks), ""
    if not strength > reach * spread:
        value = ratio = float("nan")
        reason = (
            f"the signal ({strength:.2g} ± {spread:.2g}) is within {reach:.2g} standard errors of zero; "
            "a longer window is needed"
        )
    return Estimate(
        value=value,
        stderr=ratio,
        n=len(products),
        unit="prompts",
        method=f"{method}, {blocks} of them",
        reliable=not reason,
        reason=reason,
        low=value - reach * ratio,
        high=value + reach * ratio,
    )


def _quotient(products: FloatArray, prompts_per_step: float) -> float:
    """Noise over signal; nan where the signal is not positive."""
    signal, total = (float(v) for v in products.mean(0))
    return prompts_per_step * (total - signal) / signal if signal > 0 else float("nan")

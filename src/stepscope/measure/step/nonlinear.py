"""How far shares of a step are from its parts, where the step is not linear in its gradient.

No split of D(c a) - D(0) over sequences is exact: of what the batch adds to the step that the state makes
without a gradient. What there is instead depends on the optimizer:

- The derivative at the batch, J c c_i with J = D'(c a) (``optimizer``). It says what a small change of the
  weight of sequence i would do, and adds up to J c a, which is not D(c a) - D(0); |J c a - (D(c a) - D(0))|
  over |D(c a) - D(0)| says how far it is from that.
- The secant P = (D(c a) - D(0)) / a, where D treats each coordinate by itself (``fixed``). It adds up exactly
  and is no derivative; what happens to a coordinate is shared in proportion to what each sequence has in
  its gradient.

(Own derivation. The secant is what integrated gradients give along the straight path from no gradient,
Sundararajan et al. 2017, arXiv:1703.01365.)
"""

from __future__ import annotations

from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.optim.base import Through
from stepscope.policy.state import Policy
from stepscope.stats import Estimate

NEAR = 0.2
"""Largest distance, as a share of the batch's part, at which the derivative stands for it."""


def neglected_part(policy: Policy, step: Step) -> Estimate:
    """|J c a - own| / |own|, with own = D(c a) - D(0): how far the derivative is from the batch's part.

    No error: for this update batch. Above 0.2 it is flagged.
    """
    assert policy.optimizer is not None
    state, clip = policy.optimizer, step.clip_coefficient
    own = state.update(policy.parameters, step.ascent, clip=clip, lr=step.lr).made_of(step.ascent)
    derivative = state.slope(policy.parameters, step.ascent, clip=clip, lr=step.lr).along(
        vectors.scale(step.ascent, clip)
    )
    size = vectors.norm(own)
    missed = vectors.norm(vectors.add(derivative, vectors.scale(own, -1.0)))
    share = missed / size if size > 0 else float("nan")
    near = share <= NEAR
    return Estimate(
        share,
        float("nan"),
        step.update.num_prompts,
        "share of the batch's part",
        "|derivative of the step at the batch, along the batch - the batch's part| / |the batch's part|",
        reliable=near,
        reason="" if near else f"more than {NEAR:.0%}",
    )


def nonlinear_doubt(policy: Policy, step: Step, through: Through) -> str:
    """Why shares of a step are not its parts, in words; empty for a step that is linear in its gradient."""
    assert policy.optimizer is not None
    if not (why := policy.optimizer.nonlinear):
        return ""
    if through == "optimizer":
        away = neglected_part(policy, step)
        return (
            f"{why}: this is the derivative at the batch, which misses the batch's part of the step by "
            f"{away.value:.0%}; see re-made steps (measure --validate)"
        )
    metric = step.metric()
    turned = sum(int(t.count_nonzero()) for t in metric.values()) / sum(t.numel() for t in metric.values())
    return (
        f"{why}: each of the {turned:.2%} of the coordinates that the batch turns is shared by what each "
        "sequence has in its gradient; see re-made steps (measure --validate)"
    )

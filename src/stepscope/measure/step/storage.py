"""What a step would be had the file kept the optimizer's moments finely: the loss by storing them in 8 bits.

An optimizer with moments in 8 bits decodes them, takes its step and encodes what it then has. Of the moments
before encoding the codes tell an interval each (:mod:`stepscope.policy.optim.block_codes`). The step that the
*training* takes is known exactly, since it decodes the same codes. The step that the same optimizer *in 32
bits* would take from there is known up to the intervals, and this is how far it may differ:

- typically: the moments are drawn once, uniformly and independently from their intervals (seeded; over the
  coordinates of a model the draw averages out);
- at worst: every coordinate of the direction at the ends of its intervals where it differs most; since the
  direction is monotone in each moment, its extremes are at the corners.

It is the loss of the last encoding. Those before it have gone into the moments themselves: a second moment
whose relative change in a step, 1 - b2 or so, is below half the gap of the map stays where it is until a
gradient is large. No file tells how much that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.block_codes import BLOCK
from stepscope.policy.optim.storage import drawn_state, extreme_states, stored_tensors
from stepscope.policy.state import Policy
from stepscope.results.step import Storage
from stepscope.stats import Estimate, exact


def storage_loss(policy: Policy, step: Step) -> Storage | None:
    """How far the step of the same optimizer in 32 bits may be from this one.

    Args:
        policy: with its optimizer's state.
        step: rebuilt from it.

    Returns:
        None where the file keeps nothing in 8 bits.

    Pinned by ``tests/measure/test_storage.py`` on moments before they were encoded.
    """
    state = policy.optimizer
    if state is None or not state.codes:
        return None
    length = vectors.norm(step.direction)

    def made(other: OptimizerState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Direction and the gradient's part."""
        update = other.update(policy.parameters, step.ascent, clip=step.clip_coefficient, lr=step.lr)
        part = update.made_of(step.ascent)
        return vectors.add(part, *update.parts.values()), part

    _, own = made(state)
    other, part = made(drawn_state(state))
    typical = vectors.norm(vectors.add(other, vectors.scale(step.direction, -1)))
    farthest = vectors.zeros_like(step.direction)
    for corner in extreme_states(state):
        for name, value in made(corner)[0].items():
            torch.maximum(farthest[name], (value - step.direction[name]).abs(), out=farthest[name])
    kept = sum(codes.code.numel() for codes in next(iter(state.codes.values())).values())
    return Storage(
        kept_in=f"8 bits in blocks of {BLOCK}",
        share=kept / sum(t.numel() for t in step.direction.values()),
        tensors=stored_tensors(state),
        gradient_part=vectors.norm(vectors.add(part, vectors.scale(own, -1))) / vectors.norm(own),
        direction=typical / length,
        direction_worst=vectors.norm(farthest) / length,
        cosine=vectors.cosine(other, step.direction),
    )


def storage_figures(found: Storage, count: int) -> dict[str, Estimate]:
    """The headline figures of what 8 bits lost.

    Args:
        found: of the step.
        count: prompts of the update batch.
    """
    how = (
        f"moments kept in {found.kept_in}: the step is the training's own, and this is how far that of the "
        "same optimizer in 32 bits may be from it by the last encoding; "
    )
    drawn = how + "moments drawn once uniformly from what their codes stand for"
    corners = how + "every coordinate at the ends of what its codes stand for"
    unit = "share of the step's norm"
    return {
        "storage_error": exact(found.direction, count, unit, drawn),
        "storage_error_worst": exact(found.direction_worst, count, unit, corners),
    }

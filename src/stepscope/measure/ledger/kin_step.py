"""Kinship of the step of a checkpoint: what its tokens act on, each share with its interval.

With P of the step in place of the displacement that a recorded training makes, a token's effect at a context
x is

    K[x, ik] = w_ik grad H_x . P . grad l_ik

per unit of the learning rate; sums over the pairs of a kin and errors are those of
:mod:`stepscope.measure.ledger.kinship` and :mod:`stepscope.measure.ledger.kin_sums`. A share depends on how
many prompts are in the batch: a position has G - 1 responses to its prompt beside it and (B - 1) G to others.
The mean over pairs does not, so that the shares of a batch of B' prompts are those of this one with its sum
over other prompts times (B' - 1)/(B - 1). A large batch thus says most precisely what a small one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.ledger.kin_sums import KinFigure, KinSteps
from stepscope.measure.ledger.kinship import KinOptions, kin_step, split_by_kin
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import IntArray, Rollouts
from stepscope.results.kinship import BATCH, FORMULAS, FRESH, OTHER_PROMPTS, WHOLE, StepKin, StepKinship
from stepscope.stats import Estimate

UNIT = "nats/token per unit of lr"


def kinship(
    policy: Policy,
    step: Step,
    *,
    fresh: Rollouts | None = None,
    prompts: int | None = None,
    options: KinOptions = KinOptions(),
    budget: Budget = Budget(),
) -> StepKinship:
    """Split what the tokens of a step do to the entropy by what they act on.

    To first order, at fixed prefixes: own position, rest of the own response, other responses to the prompt,
    other prompts. Exact given the batch, but for the own position where it has more distinct tokens than
    ``options.tokens``; intervals take the batch's prompts for a sample.

    Args:
        policy: the checkpoint; not changed.
        step: from ``reconstruct_step``.
        fresh: further responses to the batch's prompts, at which the entropy is looked at, too.
        prompts: the shares are those of a batch of so many prompts; by default of this one.
        options: how many tokens are looked at for their own position.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the optimizer has no preconditioner; or shares are asked for of no prompts or, where
            the batch has one prompt, of another number.

    Costs three gradient passes over the batch and one over the positions for each look, and two over as many
    sequences as there are tokens looked at.
    """
    if prompts is not None and prompts < 1:
        raise MeasurementError(f"kinship: shares of a batch of {prompts} prompts, expected at least 1")
    looks = {BATCH: step.update} | ({} if fresh is None else {FRESH: fresh})
    split = split_by_kin(policy, step, looks, {WHOLE: step.metric()}, options=options, budget=budget)
    found = kin_step(split, step.update, policy.step + 1)
    sums, asked = KinSteps.of([found], [1.0]), len(found.prompts)
    wanted = asked if prompts is None else prompts
    if asked < 2 and wanted != asked:
        raise MeasurementError(
            f"kinship: a batch of {asked} prompt says nothing of {wanted} prompts; take one of two or more"
        )
    scale = {OTHER_PROMPTS: (wanted - 1) / (asked - 1) if asked > 1 else 1.0}
    return StepKinship(
        lr=step.lr,
        num_prompts=asked,
        num_sequences=len(step.update),
        of_prompts=wanted,
        tokens=found.tokens,
        drawn=found.drawn,
        positions=found.positions,
        kin=tuple(row for look in looks for row in _look(sums, look, scale, split.pairs[look])),
        totals={look: sums.total(look, WHOLE).estimate(UNIT, "all tokens") for look in looks},
        theory={name: sums.at_tokens(name) for name in FORMULAS},
    )


def _look(
    sums: KinSteps, look: str, scale: Mapping[str, float], pairs: Mapping[str, IntArray]
) -> list[StepKin]:
    """The kin of one look, with shares of a whole in which each kin is scaled."""
    figures = {kin: sums.figure(look, kin, WHOLE) for kin in sums.kins(look)}
    scaled = {kin: figure.times(scale.get(kin, 1.0)) for kin, figure in figures.items()}
    first, *rest = scaled.values()
    whole = first
    for other in rest:
        whole = whole.plus(other)
    known = whole.estimate(UNIT, "all tokens")
    doubt = "" if known.resolved else "the whole that it is a share of is not resolved from zero"
    return [
        StepKin(
            look=look,
            kin=kin,
            influence=figure.estimate(UNIT, "first order, fixed prefixes"),
            share=scaled[kin].over(whole).estimate("share", "of what all tokens do").doubted(doubt),
            per_pair=_each(sums, look, kin, pairs[kin]),
            draw_stderr=math.sqrt(figure.draw),
            pairs=int(pairs[kin][0].sum()),
        )
        for kin, figure in figures.items()
    ]


def _each(sums: KinSteps, look: str, kin: str, pairs: IntArray) -> Estimate:
    """Of one pair, given the number of positions; no number where there is none.

    Where the pairs are of one prompt alone there is no error: its part is the whole.
    """
    part = sums.steps[0].part(look, kin, WHOLE)
    parts, of = part.done + part.received, pairs.sum(0).astype(np.float64)
    alone = np.count_nonzero(of) == 1
    if alone:
        parts = parts * np.nan
    done, number = (
        KinFigure(float(own), by_prompt, np.zeros(1), 0.0)
        for own, by_prompt in ((part.done.sum(), parts), (pairs[0].sum(), of))
    )
    found = done.over(number).estimate(UNIT, "mean over pairs, given the number of positions")
    return found.doubted("its pairs are of one prompt, which tells no error" if alone else "")

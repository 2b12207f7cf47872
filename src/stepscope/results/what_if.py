"""A what-if of a ledger as stored: ``what_if.json`` and ``what_if.parquet`` in a folder of its rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepscope.results.records import FloatArray, IntArray, Record
from stepscope.results.tables import Table, TextArray
from stepscope.stats import Estimate, Number

WHAT_IF = "what_if"
"""Folder beside a ledger with a folder for each rule."""

RETRAINED = "retrained"
"""Folder beside a ledger with the trainings without the tokens of a rule, by rule and dose."""

SUMMARY, CURVES = "what_if.json", "what_if.parquet"
"""Names of the files."""

RECORDED, HELD, REWEIGHTED, AGAIN = "recorded", "held", "reweighted", "retrained"
"""Paths: as it was, two predictions (:mod:`stepscope.measure.ledger.without`), and trained again."""

SPEAKS = 0.5
"""Smallest effective share of a reweighted batch that still speaks for the shifted policy."""

AGREES = 0.5
"""Share of the realised difference that a prediction may be off and still agree."""


@dataclass(frozen=True, repr=False)
class WhatIfCurves(Table):
    """``what_if.parquet``: a row per quantity, dose, path and place; of the recorded path with dose 0.

    Attributes:
        quantity: the quantity.
        dose: share of the tokens' weight that is taken away.
        path: ``recorded``, ``held``, ``reweighted`` or ``retrained``.
        step: number of optimizer steps before the place.
        level: the quantity there, on the probe prompts.
        level_stderr: its standard error.
        difference: from the recorded path at the same step, paired by prompt.
        difference_stderr: its standard error.
        difference_low: lower end of its 95 % interval.
        difference_high: upper end.
        gap: ``retrained`` less this path, paired by prompt; nan where nothing was trained again.
        gap_low: lower end of its 95 % interval.
        gap_high: upper end.
        distance: |theta - theta recorded|, in parameter space.
        apart: |theta retrained - theta|; nan where nothing was trained again.
        effective: smallest effective share of a batch up to the place, in ``reweighted``; 1 elsewhere.
    """

    quantity: TextArray
    dose: FloatArray
    path: TextArray
    step: IntArray
    level: FloatArray
    level_stderr: FloatArray
    difference: FloatArray
    difference_stderr: FloatArray
    difference_low: FloatArray
    difference_high: FloatArray
    gap: FloatArray
    gap_low: FloatArray
    gap_high: FloatArray
    distance: FloatArray
    apart: FloatArray
    effective: FloatArray

    def of(self, quantity: str, dose: float, path: str) -> WhatIfCurves:
        """The curve of one path."""
        return self.where((self.quantity == quantity) & (self.dose == dose) & (self.path == path))


@dataclass(frozen=True, repr=False)
class Outcome(Record):
    """What leaving out a dose of a rule's tokens does to one quantity by the last step.

    Attributes:
        quantity: its name.
        unit: of all figures but the dose.
        dose: share of the tokens' weight that is taken away.
        first_order: -dose times the sum of their entries, clipping and second moments held; None where the
            ledger has no account of the quantity.
        through_optimizer: the same with nothing held; nan where the ledger has no such entries.
        held: predicted difference, gradients held where they were.
        reweighted: predicted difference, recorded responses reweighted.
        trusted: last step up to which every reweighted batch had an effective share of at least a half.
        retrained: realised difference; None where nothing was trained again.
        horizons: last step up to which a prediction agrees with the training: at every place up to it the
            interval of the gap has 0 in it, or the gap is below half of the realised difference. By path;
            empty where nothing was trained again.
    """

    quantity: str
    unit: str
    dose: float
    first_order: Estimate | None
    through_optimizer: Number
    held: Estimate
    reweighted: Estimate
    trusted: int
    retrained: Estimate | None
    horizons: Mapping[str, int]


@dataclass(frozen=True, repr=False)
class WhatIf(Record):
    """``what_if.json``: what a training would have come to without the tokens of a rule.

    Attributes:
        rule: which tokens, as ``stepscope.rules.TokenRule`` reads it.
        first_step: number of the first step in which they are left out.
        last_step: of the last.
        tokens: number of tokens of the rule in the recorded batches.
        all_tokens: of all tokens there.
        weight: their share of the sum of absolute token weights.
        num_prompts: probe prompts.
        samples: responses to each.
        outcomes: by quantity and dose.
    """

    rule: str
    first_step: int
    last_step: int
    tokens: int
    all_tokens: int
    weight: float
    num_prompts: int
    samples: int
    outcomes: tuple[Outcome, ...]


def trusted(curve: WhatIfCurves) -> int:
    """The last step up to which the recorded responses speak for the shifted policy; see :class:`Outcome`."""
    return int(curve.step[curve.effective >= SPEAKS].max())


def horizon(curve: WhatIfCurves, realised: WhatIfCurves) -> int:
    """The last step up to which a predicted curve agrees with a realised one; see :class:`Outcome`.

    Args:
        curve: of a prediction, with gaps.
        realised: of the training, at the same places.
    """
    inside = (curve.gap_low <= 0) & (curve.gap_high >= 0)
    close = abs(curve.gap) <= AGREES * abs(realised.difference)
    last = int(curve.step[0])
    for step, agrees in zip(curve.step, inside | close, strict=True):
        if not agrees:
            break
        last = int(step)
    return last

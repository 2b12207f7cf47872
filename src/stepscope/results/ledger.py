"""The ledger as stored: ``ledger.json``, ``ledger.parquet``, ``ledger_steps.parquet``, and their parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from stepscope.results.records import FloatArray, IntArray, Record
from stepscope.results.tables import Table, TextArray
from stepscope.stats import Estimate, Number, estimate_from_sums

LEDGER, TOKENS, STEPS = "ledger.json", "ledger.parquet", "ledger_steps.parquet"
FOLDS, TOKEN_FOLDS, ROLLUPS = "ledger_folds.parquet", "ledger_token_folds.parquet", "ledger_rollups.parquet"
"""Names of the files."""

LEDGER_PAGE = "ledger.html"
"""The page."""

PARTS = "ledger_parts"
"""Folder beside them with what is finished of a ledger."""


@dataclass(frozen=True, repr=False)
class GroupSums(Record):
    """A figure with what each group of probe prompts adds to its error.

    Attributes:
        value: the figure.
        groups: (group,) residuals, as ``stats.estimate_from_sums`` takes them.
    """

    value: Number
    groups: FloatArray

    def plus(self, other: GroupSums, factor: float = 1.0) -> GroupSums:
        """``self + factor * other``, errors paired by group."""
        return GroupSums(self.value + factor * other.value, self.groups + factor * other.groups)

    def scaled(self, factor: float) -> GroupSums:
        """``factor`` times it."""
        return GroupSums(factor * self.value, factor * self.groups)

    def estimate(self, unit: str, method: str) -> Estimate:
        """With its error, clustered by the groups."""
        return estimate_from_sums(self.value, self.groups, unit=unit, method=method)


def total(sums: Iterable[GroupSums]) -> GroupSums:
    """The sum of figures, errors paired by group."""
    first, *rest = sums
    for other in rest:
        first = first.plus(other)
    return first


@dataclass(frozen=True, repr=False)
class PlaceFigures(Record):
    """What one place of a path adds to the account of one quantity.

    Attributes:
        level: the quantity there.
        products: its gradient there times sums of displacements, by name.
        changes: from there to a neighbouring place where it was looked at, by importance weights.
        doubt: why these weights cannot be trusted; empty where nothing speaks against them.
    """

    level: GroupSums
    products: Mapping[str, GroupSums]
    changes: Mapping[str, GroupSums]
    doubt: str


@dataclass(frozen=True, repr=False)
class LedgerPlace(Record):
    """What a place of a path adds to the account of every quantity.

    Attributes:
        figures: in the order of the quantities.
        baselines: rung of the baseline ladder of each.
    """

    figures: tuple[PlaceFigures, ...]
    baselines: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class LedgerEnds(Record):
    """Every quantity at both ends of a path, from samples drawn there.

    Attributes:
        before: before the first step.
        after: after the last.
    """

    before: tuple[GroupSums, ...]
    after: tuple[GroupSums, ...]


@dataclass(frozen=True, repr=False)
class LedgerFolds(Table):
    """``ledger_folds.parquet``: what each fold of the probe says of the batch of a step, a row each.

    Attributes:
        step: number of the optimizer step.
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        fold: of the probe prompts.
        share: of the probe sequences.
        tokens: sum of the entries of its tokens.
        bonus: entry of an entropy bonus.
        decay: entry of a decay inside the gradient.
    """

    step: IntArray
    quantity: TextArray
    through: TextArray
    fold: IntArray
    share: FloatArray
    tokens: FloatArray
    bonus: FloatArray
    decay: FloatArray


@dataclass(frozen=True, repr=False)
class Account(Record):
    """The account of one quantity.

    Attributes:
        quantity: its name in the ledger; ``_fixed_prefix`` at the prefixes of the start.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        unit: of all figures.
        before: the quantity before the first step.
        after: the quantity after the last.
        predicted: tokens, bonus, momentum before and decay together.
        realised: after less before, each from samples drawn there.
        closing_error: realised less predicted, paired by prompt.
        chained: the change from place to place by importance weights, summed; from the probe's own samples.
        curvature: chained less predicted: what the mean of two gradients leaves out, mostly without
            sampling error.
        tokens: all entries of tokens.
        bonus: what an entropy bonus did; 0 without one.
        momentum_before: what the moments before the first step did.
        decay: what weight decay did.
        rounding: the sum along the displacements as they are, less ``predicted``: what is in no part.
        interpolation: how far ``predicted`` is off because the gradient is taken at every K-th place only: a
            third of the difference to every 2K-th.
        through_optimizer: sum of the entries of tokens with nothing held; None where they were not made.
    """

    quantity: str
    normalisation: str
    version: str
    unit: str
    before: Estimate
    after: Estimate
    predicted: Estimate
    realised: Estimate
    closing_error: Estimate
    chained: Estimate
    curvature: Estimate
    tokens: Estimate
    bonus: Estimate
    momentum_before: Estimate
    decay: Estimate
    rounding: Estimate
    interpolation: Estimate
    through_optimizer: Estimate | None


@dataclass(frozen=True, repr=False)
class Ledger(Record):
    """``ledger.json``: what became of some quantities between two steps of a training.

    The figures at the top are those of the first quantity.

    Attributes:
        first_step: number of the first step in the account; 1 is the training's first.
        last_step: of the last.
        every: the gradient of the quantities was taken at every so many steps.
        num_prompts: probe prompts.
        num_folds: parts of them from which the errors of tokens come.
        quantity: the first quantity.
        predicted: see :class:`Account`.
        realised: see :class:`Account`.
        closing_error: see :class:`Account`.
        momentum_before: see :class:`Account`.
        decay: see :class:`Account`.
        accounts: of all quantities.
    """

    first_step: int
    last_step: int
    every: int
    num_prompts: int
    num_folds: int
    quantity: str
    predicted: Estimate
    realised: Estimate
    closing_error: Estimate
    momentum_before: Estimate
    decay: Estimate
    accounts: tuple[Account, ...]


@dataclass(frozen=True, repr=False)
class LedgerTokens(Table):
    """``ledger.parquet``: a row per token of every batch, quantity and way.

    Attributes:
        step: number of the optimizer step whose batch it is in.
        sequence_id: place of its sequence in the batch.
        position: from 0 in the response.
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        influence: what the token did to the quantity over the rest of the path.
        own_step: the part of it through its own step.
        later: the rest, through the moments of later steps.
        stderr: standard error of ``influence``; nan with a single fold.
    """

    step: IntArray
    sequence_id: IntArray
    position: IntArray
    quantity: TextArray
    through: TextArray
    influence: FloatArray
    own_step: FloatArray
    later: FloatArray
    stderr: FloatArray


@dataclass(frozen=True, repr=False)
class LedgerTokenFolds(Table):
    """``ledger_token_folds.parquet``: what each fold of the probe says of a token, all entries of ``fixed``.

    The rows are those of ``ledger.parquet`` with ``fixed``, in their order. Errors of tokens are correlated,
    since all are judged by one probe: a sum over tokens has its error from the folds' own sums.

    Attributes:
        step: number of the optimizer step whose batch it is in.
        sequence_id: place of its sequence in the batch.
        position: from 0 in the response.
        quantity: the quantity.
        folds: by fold: the entry from this fold of the probe prompts alone.
    """

    step: IntArray
    sequence_id: IntArray
    position: IntArray
    quantity: TextArray
    folds: Mapping[str, FloatArray]


@dataclass(frozen=True, repr=False)
class LedgerSteps(Table):
    """``ledger_steps.parquet``: a row per step and quantity.

    Attributes:
        step: number of the optimizer step.
        quantity: the quantity.
        change: what the step itself did, along its displacement as it is.
        tokens: all entries of its batch, over the rest of the path.
        own_step: the part of these through the step itself.
        bonus: what an entropy bonus in its loss did, over the rest of the path.
        momentum_before: what the moments before the first step did in this one.
        decay: what weight decay did in this step (over the rest of the path where it is in the gradient).
        level: the quantity after the step; nan where it was not looked at.
        level_stderr: its standard error.
    """

    step: IntArray
    quantity: TextArray
    change: FloatArray
    tokens: FloatArray
    own_step: FloatArray
    bonus: FloatArray
    momentum_before: FloatArray
    decay: FloatArray
    level: FloatArray
    level_stderr: FloatArray


def fold_sums(shares: FloatArray, rows: FloatArray) -> GroupSums:
    """A figure that each fold of the probe gives by itself, weighted by its share of the sequences."""
    value = float(shares @ rows)
    return GroupSums(value, np.asarray(shares * (rows - value), dtype=np.float64))

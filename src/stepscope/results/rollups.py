"""``ledger_rollups.parquet``: the entries of a ledger added up by class of token, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

from stepscope.results.records import BoolArray, FloatArray, IntArray
from stepscope.results.tables import Table, TextArray
from stepscope.stats import Estimate


@dataclass(frozen=True, repr=False)
class LedgerRollups(Table):
    """A row per quantity, way to divide the tokens, and class.

    Two intervals are given: ``low`` and ``high`` are about the batches as they were, with the probe's
    prompts as a sample; those ``over_prompts`` take the training's prompts as a sample, too.

    Attributes:
        quantity: the quantity.
        by: how tokens are divided: a name of ``rules.token_classes.WAYS``, or a user's own.
        label: the class.
        place: order of the class among its own.
        tokens: number of tokens in it.
        influence: sum of their entries.
        stderr: its standard error over probe prompts; nan with a single fold.
        low: lower end of its 95 % interval.
        high: upper end.
        stderr_over_prompts: standard error over probe prompts and training prompts.
        low_over_prompts: lower end of that interval.
        high_over_prompts: upper end.
        own_step: the part of the sum through the tokens' own steps.
        share: of the sum over all tokens.
        share_stderr: its standard error over probe prompts.
        share_low: lower end of its interval.
        share_high: upper end.
        share_low_over_prompts: lower end over probe and training prompts.
        share_high_over_prompts: upper end.
        reliable: whether the intervals can be trusted.
        reason: why not.
    """

    quantity: TextArray
    by: TextArray
    label: TextArray
    place: IntArray
    tokens: IntArray
    influence: FloatArray
    stderr: FloatArray
    low: FloatArray
    high: FloatArray
    stderr_over_prompts: FloatArray
    low_over_prompts: FloatArray
    high_over_prompts: FloatArray
    own_step: FloatArray
    share: FloatArray
    share_stderr: FloatArray
    share_low: FloatArray
    share_high: FloatArray
    share_low_over_prompts: FloatArray
    share_high_over_prompts: FloatArray
    reliable: BoolArray
    reason: TextArray

    def of(self, quantity: str, by: str) -> LedgerRollups:
        """The classes of one way, in their order."""
        return self.where((self.quantity == quantity) & (self.by == by))

    def estimate(self, row: int, unit: str, folds: int) -> Estimate:
        """The sum of a class, over probe prompts."""
        return self._estimate(row, ("influence", "stderr", "low", "high"), unit, folds)

    def share_estimate(self, row: int, folds: int) -> Estimate:
        """Its share of the sum over all tokens, over probe prompts."""
        return self._estimate(row, ("share", "share_stderr", "share_low", "share_high"), "", folds)

    def _estimate(self, row: int, names: tuple[str, str, str, str], unit: str, folds: int) -> Estimate:
        value, stderr, low, high = (float(getattr(self, name)[row]) for name in names)
        return Estimate(
            value,
            stderr,
            folds,
            unit,
            f"sum over {int(self.tokens[row]):,} tokens, from {folds} folds of the probe prompts",
            bool(self.reliable[row]),
            str(self.reason[row]),
            low,
            high,
        )

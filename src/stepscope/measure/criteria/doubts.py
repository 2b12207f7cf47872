"""When a figure of a leaderboard hangs on too few items for its error to be known."""

from __future__ import annotations

from stepscope.measure.quantity.importance_weights import effective_sample_size
from stepscope.results import FloatArray

FEW_ITEMS = 10
"""Sums over fewer items than this hang on single ones: their errors are not known."""

FEW_CARRIERS = 50
"""Nor are those of sums that fewer items than this carry, in effect."""

FEW_SQUARES = 20
"""The same for sums of squares, as in Pearson's correlation."""


def few_items(selected: float) -> str:
    """Why a share says nothing of other batches: few items are selected; empty where many are."""
    return f"hangs on {max(1.0, selected):.2g} items, fewer than {FEW_ITEMS}" if selected < FEW_ITEMS else ""


def carried(weights: FloatArray, fewest: int) -> str:
    """Why a sum over items says nothing of other batches: few items carry it; empty where many do."""
    size = effective_sample_size(weights)
    return f"{size:.2g} items carry the sum, in effect, fewer than {fewest}" if size < fewest else ""

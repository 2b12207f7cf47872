"""How well scores rank a truth: correlations, captured shares and agreement, with and without each prompt.

Every statistic is computed for the batch and for resamples of its prompts at once. A resample is a number of
copies per prompt (0 or 1 where groups of prompts are left out), so a statistic of it is a weighted statistic
of the batch: ranks are cumulative weights in an order that is sorted once, and no resample is ever sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

from stepscope.measure.ties import without_round_off
from stepscope.results import BoolArray, FloatArray, IntArray

SHARES = (0.0002, 0.01, 0.1)
"""Shares of the tokens that a criterion may select."""

LARGE = 0.1
"""Share of the items with the largest |truth| that AUC asks a criterion to find."""

MOST_IN_PAIRS = 512
"""Most items whose pairs enter the error of Kendall's tau; more are thinned at random."""

PAIRS_PAY = 250
"""Items a correlation, among all scores and truths, up to which tau of all pairs takes less than sorting."""

ROWS = 64
"""Items whose pairs with as many are looked at together."""

MOST_GROUPS = 64
"""Most groups of prompts that are left out one by one; more prompts are pooled at random."""

BLOCK = 2_000_000
"""Most numbers in one (resample, item) array."""


@dataclass(frozen=True)
class Comparison:
    """Statistics of every score against every truth; the first resample is the batch itself.

    Attributes:
        spearman: (resample, score, truth) rank correlation.
        kendall: (resample, score, truth) tau-b; of at most 512 items in all resamples but the first.
        pearson: (resample, score, truth).
        sign_agreement: (resample, score, truth) share of items, among those where neither is zero, whose
            signs agree; nan for magnitudes.
        auc: (resample, score, truth) chance that an item of the tenth with the largest |truth| has a larger
            |score| than one of the others, ties counting half.
        captured: (share, resample, score, truth) share of the total |truth| on the items selected by
            |score|; ties at the edge share what is left.
        best: (share, resample, truth) the same for the best possible selection.
    """

    spearman: FloatArray
    kendall: FloatArray
    pearson: FloatArray
    sign_agreement: FloatArray
    auc: FloatArray
    captured: FloatArray
    best: FloatArray


def left_out(clusters: IntArray, seed: int = 0) -> FloatArray:
    """(1 + group, cluster) copies of each cluster: once each first, then none of each group's in turn.

    Of one cluster only the first: nothing is left without it.

    Args:
        clusters: (item,) prompt of each item, 0, 1, ...
        seed: of the groups, where there are more than 64 prompts.
    """
    count = int(clusters.max()) + 1
    groups = np.arange(count)
    if count > MOST_GROUPS:
        groups = np.random.default_rng(seed).permutation(count) % MOST_GROUPS
    kept = groups != np.arange(min(count, MOST_GROUPS) if count > 1 else 0)[:, None]
    return np.concatenate([np.ones((1, count)), kept]).astype(np.float64)


@dataclass(frozen=True)
class Order:
    """Values in ascending order, ties in groups.

    Attributes:
        order: (item,) indices that sort the values.
        starts: (group,) where each group of equal values starts in that order.
        group: (item,) group of each item.
    """

    order: IntArray
    starts: IntArray
    group: IntArray

    @classmethod
    def of(cls, values: FloatArray) -> Order:
        """Sort once."""
        order = np.argsort(values, kind="stable")
        new = np.concatenate([[True], np.diff(values[order]) > 0])
        group = np.empty(len(values), dtype=np.int64)
        group[order] = np.cumsum(new) - 1
        return cls(order, np.flatnonzero(new), group)

    def placed(self, weights: FloatArray) -> Placed:
        """Where each group stands in every resample, for (resample, item) weights."""
        own = weights[:, self.order]
        if len(self.starts) < len(self.order):
            own = np.add.reduceat(own, self.starts, axis=1)
        return Placed(self.group, own, np.cumsum(own, axis=1))


@dataclass(frozen=True)
class Placed:
    """An order in every resample.

    Attributes:
        group: (item,) group of each item.
        own: (resample, group) weight of each group.
        through: (resample, group) weight of it and all below.
    """

    group: IntArray
    own: FloatArray
    through: FloatArray

    def ranks(self) -> FloatArray:
        """(resample, item) mid-ranks about their mean: weight below plus half of one's group, less half."""
        return np.asarray((self.through - self.own / 2 - self.through[:, -1:] / 2)[:, self.group])

    def selected(self, share: float) -> FloatArray:
        """(resample, item) part of each item among the ``share`` largest; at least one item is selected."""
        total = self.through[:, -1:]
        room = np.maximum(1.0, share * total) - (total - self.through)
        first = int(np.argmax((room > 0).any(0)))
        own = self.own[:, first:]
        taken = np.clip(room[:, first:], 0.0, own)
        part = np.zeros_like(self.own)
        np.divide(taken, own, out=part[:, first:], where=own > 0)
        return np.asarray(part[:, self.group])


def compare(
    scores: FloatArray,
    signed: BoolArray,
    truths: FloatArray,
    clusters: IntArray,
    *,
    counts: FloatArray | None = None,
    seed: int = 0,
) -> Comparison:
    """Statistics of scores against truths, for the batch and for resamples of its prompts.

    Args:
        scores: (score, item).
        signed: (score,) True: compared with the truth; False: compared with its magnitude.
        truths: (truth, item).
        clusters: (item,) prompt of each item.
        counts: (resample, cluster) copies of each prompt, see :func:`left_out`; the batch alone by default.
        seed: of the thinning for Kendall's tau.
    """
    scores, truths = without_round_off(scores), without_round_off(truths)
    names, index = np.unique(clusters, return_inverse=True)
    counts = np.ones((1, len(names))) if counts is None else counts
    shape = (len(counts), len(scores), len(truths))
    spearman, auc = np.full(shape, np.nan), np.full(shape, np.nan)
    captured = np.full((len(SHARES), *shape), np.nan)
    best = np.full((len(SHARES), len(counts), len(truths)), np.nan)
    sizes = np.abs(truths)
    orders = [Order.of(x) for x in scores]
    size_orders = [Order.of(np.abs(x)) if s else o for x, s, o in zip(scores, signed, orders, strict=True)]
    truth_orders = {True: [Order.of(y) for y in truths], False: [Order.of(y) for y in sizes]}
    large = [y >= np.quantile(y, 1 - LARGE) for y in sizes]
    step = max(1, BLOCK // scores.shape[1])
    for start in range(0, len(counts), step):
        rows = slice(start, start + step)
        weights = counts[rows][:, index]
        total = [weights * y for y in sizes]
        ranked = {s: [o.placed(weights).ranks() for o in truth_orders[s]] for s in (True, False)}
        for t, order in enumerate(truth_orders[False]):
            largest = order.placed(weights)
            for q, share in enumerate(SHARES):
                best[q, rows, t] = _share(largest.selected(share), total[t])
        for c, (own, by_size) in enumerate(zip(orders, size_orders, strict=True)):
            sizes_placed = by_size.placed(weights)
            size_ranks = sizes_placed.ranks()
            ranks = size_ranks if by_size is own else own.placed(weights).ranks()
            selected = [sizes_placed.selected(share) for share in SHARES]
            for t in range(len(truths)):
                spearman[rows, c, t] = _correlation(ranks, ranked[bool(signed[c])][t], weights)
                auc[rows, c, t] = _auc(size_ranks, weights, large[t])
                for q, part in enumerate(selected):
                    captured[q, rows, c, t] = _share(part, total[t])
    pearson, agreement = _moments(scores, signed, truths, index, counts)
    return Comparison(
        spearman=spearman,
        kendall=_kendall(scores, signed, truths, index, counts, seed),
        pearson=pearson,
        sign_agreement=agreement,
        auc=auc,
        captured=captured,
        best=best,
    )


def _share(selected: FloatArray, total: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.einsum("ri,ri->r", selected, total) / total.sum(1))


def _ratio(numerator: FloatArray, squared: FloatArray) -> FloatArray:
    """Numerator / sqrt(squared), nan where there is no variance."""
    found = np.full(numerator.shape, np.nan)
    np.divide(numerator, np.sqrt(np.maximum(squared, 0.0)), out=found, where=squared > 0)
    return found


def _correlation(x: FloatArray, y: FloatArray, weights: FloatArray) -> FloatArray:
    """(resample,) weighted correlation of values whose weighted means are zero."""
    wx = weights * x
    squares = np.einsum("ri,ri->r", wx, x) * np.einsum("ri,ri,ri->r", weights, y, y)
    return _ratio(np.einsum("ri,ri->r", wx, y), squares)


def _auc(ranks: FloatArray, weights: FloatArray, large: BoolArray) -> FloatArray:
    """(resample,) area under the curve from mid-ranks about their mean (Mann & Whitney 1947)."""
    inside = weights[:, large].sum(1)
    outside = weights.sum(1) - inside
    excess = np.einsum("ri,ri->r", weights[:, large], ranks[:, large])
    found = np.full(len(ranks), np.nan)
    np.divide(excess, inside * outside, out=found, where=inside * outside > 0)
    return found + 0.5


def _moments(
    scores: FloatArray, signed: BoolArray, truths: FloatArray, index: IntArray, counts: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Pearson correlations and sign agreements, from sums over each prompt."""
    members = (np.arange(counts.shape[1])[:, None] == index).astype(np.float64)
    shape = (len(counts), len(scores), len(truths))
    pearson, agreement = np.full(shape, np.nan), np.full(shape, np.nan)
    total = (counts @ members.sum(1))[:, None]
    for c, score in enumerate(scores):
        y = truths if signed[c] else np.abs(truths)
        x, y = _standard(score), _standard(y)
        mean_x = (counts @ members @ x)[:, None] / total
        mean_y = counts @ (members @ y.T) / total
        var_x = (counts @ members @ x**2)[:, None] / total - mean_x**2
        var_y = counts @ (members @ (y**2).T) / total - mean_y**2
        cov = counts @ (members @ (x * y).T) / total - mean_x * mean_y
        pearson[:, c] = _ratio(cov, np.where(var_x > 1e-12, var_x, 0.0) * var_y)
        if signed[c]:
            known = (score != 0) & (truths != 0)
            same = known & (np.sign(score) == np.sign(truths))
            both = counts @ (members @ known.T)
            np.divide(counts @ (members @ same.T), both, out=agreement[:, c], where=both > 0)
    return pearson, agreement


def _standard(values: FloatArray) -> FloatArray:
    """Values with mean 0 and variance 1 along the last axis; constants become 0."""
    centred = values - values.mean(-1, keepdims=True)
    spread = centred.std(-1, keepdims=True)
    flat = spread <= 1e-12 * np.abs(values).max(-1, keepdims=True)
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, spread))


def _kendall(
    scores: FloatArray,
    signed: BoolArray,
    truths: FloatArray,
    index: IntArray,
    counts: FloatArray,
    seed: int,
) -> FloatArray:
    """Tau-b; resamples from sums of concordant and of untied pairs between each two prompts."""
    found = np.full((len(counts), len(scores), len(truths)), np.nan)
    for kind in (True, False):
        found[0, signed == kind] = _tau(scores[signed == kind], truths if kind else np.abs(truths))
    if len(counts) == 1:
        return found
    kept = np.arange(len(index))
    if len(kept) > MOST_IN_PAIRS:
        kept = np.random.default_rng(seed).choice(kept, MOST_IN_PAIRS, replace=False)
    kept = kept[np.argsort(index[kept], kind="stable")]
    present, starts = np.unique(index[kept], return_index=True)
    drawn = counts[1:][:, present]

    def drawn_pairs(table: FloatArray) -> FloatArray:
        """(resample, ...) sums of (..., group, group) over pairs, weighted with the copies of both."""
        return np.asarray(np.einsum("rg,...gh,rh->r...", drawn, table, drawn, optimize=True))

    for kind in (True, False):
        chosen = np.flatnonzero(signed == kind)
        if len(chosen) == 0:
            continue
        others = truths if kind else np.abs(truths)
        tables = _pairs(scores[np.ix_(chosen, kept)], others[:, kept], starts)
        concordant, spread, untied = map(drawn_pairs, tables)
        found[1:, chosen] = _ratio(concordant, spread[:, :, None] * untied[:, None])
    return found


def _tau(scores: FloatArray, truths: FloatArray) -> FloatArray:
    """(score, truth) tau-b of all items: by their pairs, or one by one where sorting each time costs less."""
    items, numbers = scores.shape[1], len(scores) * len(truths)
    if items * (len(scores) + len(truths)) > PAIRS_PAY * numbers:
        every = [[kendalltau(score, truth).statistic for truth in truths] for score in scores]
        return np.asarray(every, dtype=np.float64).reshape(len(scores), len(truths))
    tables = _pairs(scores, truths, np.arange(0, items, ROWS))
    concordant, spread, untied = (table.sum((-2, -1)) / 2 for table in tables)
    with np.errstate(invalid="ignore"):  # as SciPy divides
        found = concordant / np.sqrt(spread)[:, None] / np.sqrt(untied)
    return np.asarray(np.clip(found, -1.0, 1.0))


def _pairs(
    scores: FloatArray, truths: FloatArray, starts: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sums over pairs of items from two groups, all whole numbers and so exact in float32.

    Args:
        scores: (score, item), items of a group beside each other.
        truths: (truth, item).
        starts: (group,) where each group begins.

    Returns:
        (score, truth, group, group) concordant less discordant pairs, and the untied pairs of each score and
        of each truth, (score, group, group) and (truth, group, group).
    """
    count = len(starts)
    places = _places(scores), _places(truths)
    parts = [slice(*ends) for ends in zip(starts, [*starts[1:], scores.shape[1]], strict=True)]
    both = np.empty((len(scores), len(truths), count, count))
    own, other = np.empty((len(scores), count, count)), np.empty((len(truths), count, count))
    for g, rows in enumerate(parts):
        for h in range(g, count):
            a, b = (_signs(values, rows, parts[h]) for values in places)
            both[:, :, g, h] = both[:, :, h, g] = a @ b.T
            for table, v in ((own, a), (other, b)):
                table[:, g, h] = table[:, h, g] = np.einsum("vi,vi->v", v, v)
    return both, own, other


def _places(values: FloatArray) -> npt.NDArray[np.float32]:
    """(value, item) places in order, equal ones of equal values."""
    return np.stack([Order.of(row).group for row in values]).astype(np.float32)


def _signs(places: npt.NDArray[np.float32], rows: slice, columns: slice) -> npt.NDArray[np.float32]:
    """(value, pair) sign of every difference between two groups of items."""
    apart = places[:, rows, None] - places[:, None, columns]
    return np.clip(apart, -1.0, 1.0, out=apart).reshape(len(places), -1)  # of whole numbers

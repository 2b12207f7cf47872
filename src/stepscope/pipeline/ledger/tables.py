"""Rows of the ledger's tables out of the entries of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stepscope.measure.ledger.entries import Entries
from stepscope.results import FloatArray
from stepscope.results.ledger import LedgerFolds, LedgerSteps, LedgerTokenFolds, LedgerTokens
from stepscope.stats import errors_from_sums


def token_rows(entries: Entries, labels: Sequence[str], shares: FloatArray) -> LedgerTokens:
    """A row per quantity and token; errors from the folds, as ``results.ledger.fold_sums`` has them.

    Args:
        entries: of a step.
        labels: of the quantities.
        shares: (quantity, row) makes quantities of rows.
    """
    sequence, position = entries.update.places
    count, rows = len(labels), len(sequence)
    whole = shares @ entries.whole
    errors = []
    for own, value in zip(shares, whole, strict=True):
        chosen = own > 0
        errors.append(errors_from_sums(own[chosen, None] * (entries.whole[chosen] - value)))
    return LedgerTokens(
        step=np.full(count * rows, entries.number, dtype=np.int64),
        sequence_id=np.tile(sequence, count),
        position=np.tile(position, count),
        quantity=np.repeat(np.array(labels, dtype=np.object_), rows),
        through=np.full(count * rows, entries.through, dtype=np.object_),
        influence=whole.reshape(-1),
        own_step=entries.own.reshape(-1),
        later=(whole - entries.own).reshape(-1),
        stderr=np.concatenate(errors),
    )


def token_fold_rows(entries: Entries, labels: Sequence[str], shares: FloatArray) -> LedgerTokenFolds:
    """A row per quantity and token: its entry from each fold of the probe alone."""
    sequence, position = entries.update.places
    count, rows = len(labels), len(sequence)
    folds = shares.shape[1] // count
    by_fold = entries.whole.reshape(count, folds, rows).transpose(1, 0, 2).reshape(folds, count * rows)
    return LedgerTokenFolds(
        step=np.full(count * rows, entries.number, dtype=np.int64),
        sequence_id=np.tile(sequence, count),
        position=np.tile(position, count),
        quantity=np.repeat(np.array(labels, dtype=np.object_), rows),
        folds={f"fold_{k}": row for k, row in enumerate(by_fold)},
    )


def fold_rows(entries: Entries, labels: Sequence[str], shares: FloatArray) -> LedgerFolds:
    """A row per quantity and fold of the probe."""
    count = shares.shape[1]
    folds = count // len(labels)
    return LedgerFolds(
        step=np.full(count, entries.number, dtype=np.int64),
        quantity=np.repeat(np.array(labels, dtype=np.object_), folds),
        through=np.full(count, entries.through, dtype=np.object_),
        fold=np.tile(np.arange(folds, dtype=np.int64), len(labels)),
        share=shares.sum(0),
        tokens=entries.whole.sum(1),
        bonus=entries.bonus,
        decay=entries.decay,
    )


def step_rows(
    entries: Entries, labels: Sequence[str], shares: FloatArray, moved: Mapping[str, FloatArray]
) -> LedgerSteps:
    """A row per quantity; the level is filled in at the end.

    Args:
        entries: of a step, through ``fixed``.
        labels: of the quantities.
        shares: (quantity, row) makes quantities of rows.
        moved: (quantity,) ``whole``, ``momentum_before`` and ``decay`` of the step's displacement.
    """
    count = len(labels)
    return LedgerSteps(
        step=np.full(count, entries.number, dtype=np.int64),
        quantity=np.array(labels, dtype=np.object_),
        change=moved["whole"],
        tokens=shares @ entries.whole.sum(1),
        own_step=entries.own.sum(1),
        bonus=shares @ entries.bonus,
        momentum_before=moved["momentum_before"],
        decay=moved["decay"] + shares @ entries.decay,
        level=np.full(count, np.nan),
        level_stderr=np.full(count, np.nan),
    )


def with_levels(steps: LedgerSteps, levels: Mapping[tuple[int, str], tuple[float, float]]) -> LedgerSteps:
    """The rows with levels and their errors, by step and quantity."""
    found = [
        levels.get((int(step), quantity), (np.nan, np.nan))
        for step, quantity in zip(steps.step, steps.quantity, strict=True)
    ]
    level, stderr = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    return LedgerSteps(**(vars(steps) | {"level": level, "level_stderr": stderr}))


def summed(folds: LedgerFolds, label: str, through: str) -> Mapping[str, FloatArray]:
    """(fold,) sums over the steps of a quantity, and the folds' ``shares``."""
    chosen = folds.where((folds.quantity == label) & (folds.through == through))
    count = int(chosen.fold.max()) + 1 if len(chosen) else 0
    sums: dict[str, FloatArray] = {
        name: np.asarray(
            np.bincount(chosen.fold, weights=getattr(chosen, name), minlength=count), dtype=np.float64
        )
        for name in ("tokens", "bonus", "decay")
    }
    return sums | {"shares": chosen.share[:count]}

"""``validation.json``: influence against true changes of steps made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepscope.results.records import FlatRecord, FloatArray, Record
from stepscope.stats import Estimate, Number


@dataclass(frozen=True, repr=False)
class Agreement(Record):
    """How predictions agree with true changes.

    Attributes:
        pearson: Pearson correlation.
        spearman: Spearman correlation.
        slope: sum predicted x true / sum predicted^2: 1 where predictions have the right size.
        error: |true - predicted| / |true|, Euclidean norms.
        predicted: (case,) predictions.
        true: (case,) true changes.
    """

    pearson: Estimate
    spearman: Estimate
    slope: Number
    error: Number
    predicted: FloatArray
    true: FloatArray


@dataclass(frozen=True, repr=False)
class Validation(Record):
    """Influence against true changes of re-made steps.

    Attributes:
        quantity: name of the quantity.
        removal: how sequences were taken out, ``zeroed`` or ``recomputed``.
        through: of the influence: ``fixed`` or ``optimizer``.
        lr: learning rate of the re-made steps.
        lds: Spearman correlation over random subsets: the linear datamodelling score.
        lds_pearson: Pearson correlation over them.
        leave_one_out: Pearson correlation over single sequences left out.
        leave_one_out_spearman: Spearman correlation over them.
        lds_across: rank correlation over subsets, prediction and truth from different halves of the probe,
            stepped up to two whole probes.
        lds_across_halves: the same for the halves as they are.
        leave_one_out_across: Pearson correlation over single sequences, likewise.
        leave_one_out_across_halves: the same for the halves as they are.
        subsets: the sequences that stayed, for each subset.
        subset_true: (subset,) change under the step re-made from those.
        subset_predicted: (subset,) lr (linear change - influence of what was left out).
        single_index: (single,) sequences left out one at a time.
        single_true: (single,) change that goes with each.
        single_predicted: (single,) lr times its influence.
        half: over subsets.
        single: over single sequences.
        reweighted: over single sequences, the derivative with respect to its weight against the same.
    """

    quantity: str
    removal: str
    through: str
    lr: float
    lds: Estimate
    lds_pearson: Estimate
    leave_one_out: Estimate
    leave_one_out_spearman: Estimate
    lds_across: Estimate
    lds_across_halves: Estimate
    leave_one_out_across: Estimate
    leave_one_out_across_halves: Estimate
    subsets: tuple[tuple[int, ...], ...]
    subset_true: FloatArray
    subset_predicted: FloatArray
    single_index: tuple[int, ...]
    single_true: FloatArray
    single_predicted: FloatArray
    half: Agreement
    single: Agreement
    reweighted: Agreement


@dataclass(frozen=True, repr=False)
class Validations(FlatRecord):
    """The validations of a measurement.

    Attributes:
        by_way: removal, and ``REMOVAL_optimizer`` for influence through the optimizer, to what was found.
    """

    content = "by_way"

    by_way: Mapping[str, Validation]

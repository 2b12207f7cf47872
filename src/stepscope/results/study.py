"""Records of a study: what many measurements of the same kind say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stepscope.loglog import LogLogFit
from stepscope.results.criteria import CriterionDefinition, Kind, Level, Target
from stepscope.results.records import BoolArray, FloatArray, IntArray, Record
from stepscope.results.tables import Table, TextArray
from stepscope.stats import Estimate, Number


@dataclass(frozen=True, repr=False)
class StudyRows(Table):
    """``study.parquet``: a row per cell, series and learning rate.

    Attributes:
        checkpoint: its folder.
        setting: name of the setting.
        repeat: number of the repeat.
        update_seed: of the update batch.
        probe_seed: of the probe batch.
        quantity: whose change it is.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        own_lr: the step's own learning rate.
        lr: learning rate of the row.
        unit: of the changes.
        num_prompts: of the probe batch.
        true: true change; its error and the ends of its interval follow.
        linear: first-order change, likewise.
        second_order: second-order change, likewise; nan where it was not asked for.
        reliable: whether the true change is.
        reason: why not.
        effective_sample_size: of the importance weights.
        pareto_k: tail of the importance weights.
        relative_difference: (linear - true)/true.
    """

    checkpoint: TextArray
    setting: TextArray
    repeat: IntArray
    update_seed: IntArray
    probe_seed: IntArray
    quantity: TextArray
    normalisation: TextArray
    version: TextArray
    own_lr: FloatArray
    lr: FloatArray
    unit: TextArray
    num_prompts: IntArray
    true: FloatArray
    true_stderr: FloatArray
    true_low: FloatArray
    true_high: FloatArray
    linear: FloatArray
    linear_stderr: FloatArray
    linear_low: FloatArray
    linear_high: FloatArray
    second_order: FloatArray
    second_order_stderr: FloatArray
    second_order_low: FloatArray
    second_order_high: FloatArray
    reliable: BoolArray
    reason: TextArray
    effective_sample_size: FloatArray
    pareto_k: FloatArray
    relative_difference: FloatArray


@dataclass(frozen=True)
class StudyFit(Record):
    """The fit of one cell and series.

    Attributes:
        checkpoint: its folder.
        setting: name of the setting.
        repeat: number of the repeat.
        quantity: whose change it is.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        fit: log|true| against log lr; None with fewer than two reliable points.
        measurable_from: lr at which the linear change is ten times the round-off.
        linear_up_to: lr at which second order is a tenth of linear; None where it is not known.
    """

    checkpoint: str
    setting: str
    repeat: int
    quantity: str
    normalisation: str
    version: str
    fit: LogLogFit | None
    measurable_from: Number
    linear_up_to: float | None


@dataclass(frozen=True)
class StudyLine(Record):
    """The fits of the repeats of one checkpoint, setting and series together.

    Attributes:
        checkpoint: its folder.
        setting: name of the setting.
        quantity: whose change it is.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        repeats: how many there are.
        fits: how many have a fit.
        slope: mean over them; None without any.
        intercept: mean over them; None without any.
        r2: the smallest; None without any.
        lrs: learning rates that any was fitted to.
    """

    checkpoint: str
    setting: str
    quantity: str
    normalisation: str
    version: str
    repeats: int
    fits: int
    slope: Estimate | None
    intercept: float | None
    r2: float | None
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Spread(Record):
    """Numbers over repeats: how many, mean, standard deviation, quantiles; None where there is none."""

    n: int
    mean: float | None
    sd: float | None
    q05: float | None
    q25: float | None
    median: float | None
    q75: float | None
    q95: float | None


@dataclass(frozen=True)
class StudyChange(Record):
    """The repeats of one checkpoint, setting and series at one learning rate.

    Attributes:
        checkpoint: its folder.
        setting: name of the setting.
        quantity: whose change it is.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        lr: learning rate.
        own_lr: the step's own.
        repeats: how many there are.
        true: mean true change.
        linear: mean first-order change.
        relative_difference: (linear - true)/true over the repeats.
    """

    checkpoint: str
    setting: str
    quantity: str
    normalisation: str
    version: str
    lr: float
    own_lr: float
    repeats: int
    true: Estimate
    linear: Estimate
    relative_difference: Spread


@dataclass(frozen=True)
class StudyStanding(Record):
    """One criterion against one ground truth over the repeats; see ``LeaderboardRow``.

    Attributes:
        best_controls: in how many repeats each control was the best.
    """

    checkpoint: str
    setting: str
    quantity: str
    level: Level
    truth: str
    preconditioner: str
    version: str
    criterion: str
    kind: Kind
    target: Target
    repeats: int
    spearman: Estimate | None
    kendall: Estimate | None
    pearson: Estimate | None
    sign_agreement: Estimate | None
    auc: Estimate | None
    gain_over_control: Estimate | None
    captured: Mapping[str, Estimate | None]
    best_controls: Mapping[str, int]


@dataclass(frozen=True)
class StudyLeaderboard(Record):
    """The leaderboards of the cells as one.

    Attributes:
        shares: of the tokens, as keys of ``captured``.
        rows: one per checkpoint, setting and standing.
        definitions: of the criteria by name.
    """

    shares: tuple[str, ...]
    rows: tuple[StudyStanding, ...]
    definitions: Mapping[str, CriterionDefinition]


@dataclass(frozen=True)
class FailedCell(Record):
    """A cell that could not be measured.

    Attributes:
        checkpoint: its folder.
        setting: name of the setting.
        repeat: number of the repeat.
        reason: why not.
    """

    checkpoint: str
    setting: str
    repeat: int
    reason: str


@dataclass(frozen=True, repr=False)
class StudyReport(Record):
    """``study.json``.

    Attributes:
        resample: which batches each repeat draws anew.
        spread: what errors over repeats mean, in words.
        fits: one per cell and series.
        lines: fits of the repeats together.
        changes: changes of the repeats together.
        leaderboard: criteria over the repeats; None where the cells have no stage ``criteria``.
        failed: cells that could not be measured, which nothing above knows of.
    """

    format_version: ClassVar[int] = 2

    resample: str
    spread: str
    fits: tuple[StudyFit, ...]
    lines: tuple[StudyLine, ...]
    changes: tuple[StudyChange, ...]
    leaderboard: StudyLeaderboard | None = None
    failed: tuple[FailedCell, ...] = ()

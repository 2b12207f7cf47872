"""Criteria against the measured effect: ``criteria.json``, ``criteria_tokens.parquet``, ``pareto.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from stepscope.results.frames import flat, frame
from stepscope.results.records import FloatArray, IntArray, Record
from stepscope.results.tables import Table
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd

Level = Literal["token", "sequence"]
Kind = Literal["literature", "control", "model"]
Target = Literal["signed", "magnitude"]


@dataclass(frozen=True)
class CriterionDefinition(Record):
    """What the page says about a criterion.

    Attributes:
        formula: in words and symbols.
        paper: arXiv number or other source; empty for controls.
        equation: where in the paper; empty where none was read.
        sign: sign convention, and what was added here to the published use.
        verified: whether the formula was read in the paper itself or in public code that implements it.
        level: what is scored; a signed token criterion also scores sequences, by its sum.
        kind: ``literature``, ``control`` for the trivial ones a criterion has to beat, or ``model`` for what
            a model of the kernel predicts.
        target: ``signed`` scores are ranked against the change itself, ``magnitude`` ones against its size.
    """

    formula: str
    paper: str
    equation: str
    sign: str
    verified: bool
    level: Level
    kind: Kind
    target: Target


@dataclass(frozen=True)
class LeaderboardRow(Record):
    """One criterion against one ground truth.

    Attributes:
        quantity: whose change the truth is about.
        criterion: its name.
        level: ``token`` or ``sequence``.
        kind: ``literature``, ``control`` or ``model``.
        target: ``signed`` or ``magnitude``.
        truth: ``column``, ``row`` or ``diagonal``.
        preconditioner: ``sgd`` or ``adamw``.
        version: ``on_policy`` or ``fixed_prefix``.
        spearman: rank correlation.
        kendall: Kendall's tau-b.
        pearson: linear correlation.
        captured: share of tokens selected to share of the total |truth| on them.
        sign_agreement: share of items whose sign is right; None for magnitudes.
        auc: how well the size of the score finds the tenth of the items with the largest |truth|.
        gain_over_control: Spearman less that of the best control, turned to be positive; None for controls.
        best_control: the control with the largest |Spearman| of the same level and target; None where no
            control has one.
    """

    quantity: str
    criterion: str
    level: Level
    kind: Kind
    target: Target
    truth: str
    preconditioner: str
    version: str
    spearman: Estimate
    kendall: Estimate
    pearson: Estimate
    captured: Mapping[str, Estimate]
    sign_agreement: Estimate | None
    auc: Estimate
    gain_over_control: Estimate | None
    best_control: str | None


@dataclass(frozen=True)
class GroundTruthSummary(Record):
    """What is known about one ground truth itself.

    Attributes:
        level: ``token`` or ``sequence``.
        truth: ``column``, ``row`` or ``diagonal``.
        preconditioner: ``sgd`` or ``adamw``.
        version: ``on_policy`` or ``fixed_prefix``.
        num_items: tokens (sequences) that are ranked.
        method: how it was computed.
        best_possible: share of the items to the share of the total |truth| on the largest ones.
        reliability: rank correlation r between the truths from each half of the probe prompts; by Spearman
            and Brown a perfect criterion would correlate with this truth at about sqrt(2 r/(1 + r)). None
            where no probe batch enters.
    """

    level: Level
    truth: str
    preconditioner: str
    version: str
    num_items: int
    method: str
    best_possible: Mapping[str, Estimate]
    reliability: Estimate | None


@dataclass(frozen=True)
class Regression(Record):
    """A regression with errors clustered by prompt.

    Attributes:
        outcome: what is explained.
        level: ``token`` or ``sequence``.
        coefficients: of each property, in the outcome's unit per unit of the property.
        standardised: of each property, in standard deviations per standard deviation.
        left_out: properties without a coefficient, and why.
        r2: share of the outcome's variance explained.
        num_items: N.
    """

    outcome: str
    level: Level
    coefficients: Mapping[str, Estimate]
    standardised: Mapping[str, Estimate]
    left_out: Mapping[str, str]
    r2: Number
    num_items: int

    def to_pandas(self) -> pd.DataFrame:
        """A row per property."""
        return frame(
            {"property": name, **flat(value), "standardised": self.standardised[name].value}
            for name, value in self.coefficients.items()
            if name in self.standardised
        )


@dataclass(frozen=True, repr=False)
class Criteria(Plotted, Record):
    """``criteria.json``: the leaderboard, and what influence goes with.

    Attributes:
        truths: kinds of ground truth.
        preconditioners: steps they are about.
        shares: of the items, as keys of ``captured``.
        rows: one per criterion and ground truth.
        tables: one per level and ground truth.
        definitions: of the criteria, by name.
        properties: regressions of influence on properties of tokens and sequences.
    """

    format_version: ClassVar[int] = 2

    truths: tuple[str, ...]
    preconditioners: tuple[str, ...]
    shares: tuple[str, ...]
    rows: tuple[LeaderboardRow, ...]
    tables: tuple[GroundTruthSummary, ...]
    definitions: Mapping[str, CriterionDefinition]
    properties: tuple[Regression, ...]

    def to_pandas(self) -> pd.DataFrame:
        """A row per criterion and ground truth."""
        return frame(self.rows)

    def _viewed(self) -> Parts:
        return Parts("Criteria against the measured influence", {"criteria": self})


@dataclass(frozen=True, repr=False)
class CriteriaTokens(Table):
    """``criteria_tokens.parquet``: one row per response token of the update batch.

    Attributes:
        sequence_id: (tok,) sequence of each token.
        position: (tok,) position in the response.
        values: (tok,) scores of token criteria and ground truths, by name; a truth is nan where it was not
            computed.
    """

    sequence_id: IntArray
    position: IntArray
    values: Mapping[str, FloatArray]


@dataclass(frozen=True)
class AblatedStep(Record):
    """One step made without some tokens.

    Attributes:
        rule: what chose the tokens.
        share: share of the tokens it was allowed to drop.
        num_dropped: tokens dropped; the mean of both choices where each half of the probe made one.
        cross_fitted: whether it looked at the probe, and was judged on the half that it did not see.
        entropy_change: true change of the entropy per token by the step without them.
        reward_change: true change of the expected reward by the same.
        entropy_kept: entropy change less that of the full step.
        reward_given_up: reward change of the full step less this one's.
    """

    rule: str
    share: float
    num_dropped: int
    cross_fitted: bool
    entropy_change: Estimate
    reward_change: Estimate
    entropy_kept: Estimate
    reward_given_up: Estimate


@dataclass(frozen=True, repr=False)
class Pareto(Plotted, Record):
    """``pareto.json``: entropy kept against reward given up, by rule and share of tokens.

    Attributes:
        lr: learning rate of all steps.
        full_entropy_change: true change of the entropy per token by the full step.
        full_reward_change: true change of the expected reward by the full step.
        points: the steps made without some tokens.
    """

    lr: float
    full_entropy_change: Estimate
    full_reward_change: Estimate
    points: tuple[AblatedStep, ...]

    def to_pandas(self) -> pd.DataFrame:
        """A row per rule and share of tokens."""
        return frame(self.points)

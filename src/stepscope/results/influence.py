"""Influence of sequences and tokens as stored, and ``reliability.json``: how sure the rankings are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepscope.results.records import FloatArray, IntArray, Record
from stepscope.results.tables import IdArray, Table, TextArray
from stepscope.stats import Estimate, Number


@dataclass(frozen=True)
class CurvePoint(Record):
    """Reliability at another size of the probe.

    Attributes:
        prompts: of the probe.
        correlation: between two probes of that size.
        stderr: its standard error.
    """

    prompts: int
    correlation: Number
    stderr: Number


@dataclass(frozen=True, repr=False)
class Reliability(Record):
    """How far a probe batch determines the order of items by influence.

    Attributes:
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        level: ``token`` or ``sequence``.
        num_items: items with an influence; all others have none whatever the probe.
        num_prompts: probe prompts.
        halves: Spearman correlation between halves of the probe.
        whole: that between two probes of this size.
        target: the correlation that a ranking should have.
        needed: probe prompts for it.
        curve: reliability over the number of probe prompts; empty where it is not known.
        top: by share, how much of the set of the largest |influence| two halves have in common.
    """

    quantity: str
    through: str
    level: str
    num_items: int
    num_prompts: int
    halves: Estimate
    whole: Estimate
    target: float
    needed: Estimate
    curve: tuple[CurvePoint, ...]
    top: Mapping[str, Estimate]


@dataclass(frozen=True)
class Shrinkage(Record):
    """How far the influence of tokens is shrunk towards that at fixed prefixes.

    Attributes:
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        kept: lambda, the share of the rest that is kept.
        gain: factor by which the probe it takes for the same reliability of ranks falls.
    """

    quantity: str
    through: str
    kept: Number
    gain: Estimate


@dataclass(frozen=True, repr=False)
class Reliabilities(Record):
    """The rankings of a measurement.

    Attributes:
        rankings: of tokens and sequences, for every quantity and both ways of influence.
        shrunk: the shrunken influences, where there are any.
    """

    rankings: tuple[Reliability, ...]
    shrunk: tuple[Shrinkage, ...]


@dataclass(frozen=True, repr=False)
class InfluenceSequences(Table):
    """``influence_sequences.parquet``: the parts of the first-order change, a row each.

    Attributes:
        component: ``sequence``, or another component of the step.
        sequence_id: of a sequence; None of another component.
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        influence: per unit of the step's lr.
        stderr: its standard error.
        low: lower end of the 95 % interval.
        high: its upper end.
    """

    component: TextArray
    sequence_id: IdArray
    quantity: TextArray
    through: TextArray
    influence: FloatArray
    stderr: FloatArray
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True, repr=False)
class InfluenceTokens(Table):
    """``influence_tokens.parquet``: a row per response token of the update batch.

    Attributes:
        sequence_id: its sequence.
        position: from 0 in the response.
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        influence: per unit of the step's lr.
        stderr: its standard error; nan where there are no folds.
        shrunk: the influence shrunk towards that at fixed prefixes; nan where there is none.
    """

    sequence_id: IntArray
    position: IntArray
    quantity: TextArray
    through: TextArray
    influence: FloatArray
    stderr: FloatArray
    shrunk: FloatArray


@dataclass(frozen=True, repr=False)
class InfluenceTokenFolds(Table):
    """``influence_token_folds.parquet``: how far each fold of the probe is from the whole, token by token.

    The rows are those of ``influence_tokens.parquet``, in their order. Errors of tokens are correlated, since
    all are judged by one probe: a sum over tokens has its error from the sums of their deviations d_g,

        stderr^2 = G/(G-1) sum_g (sum over tokens of d_g)^2      over G folds, G - 1 degrees of freedom.

    Attributes:
        sequence_id: its sequence.
        position: from 0 in the response.
        quantity: the quantity.
        through: ``fixed`` or ``optimizer``.
        folds: by fold g: share_g (x_g - x), with x_g the influence from this fold of the probe prompts alone,
            share_g its share of the probe and x the influence; they add up to 0. None with a single fold.
    """

    sequence_id: IntArray
    position: IntArray
    quantity: TextArray
    through: TextArray
    folds: Mapping[str, FloatArray]

"""What every sequence and token of an update batch does to a quantity, as computed and as stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stepscope.measure.influence.probe_gradient import Folds
from stepscope.policy.optim.base import Through
from stepscope.results import Brief, FloatArray, Rollouts
from stepscope.results.influence import InfluenceSequences, InfluenceTokenFolds, InfluenceTokens
from stepscope.results.views import Parts, Plotted, Readable
from stepscope.stats import Estimate, errors_from_sums

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Influence(Plotted, Readable, Brief):
    """What every sequence and token of the update batch does to a quantity, to first order.

    Attributes:
        quantity: its name.
        through: ``fixed`` or ``optimizer``: whether preconditioner and clip coefficient are held.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        baseline: rung of the baseline ladder in use.
        lr: the step's own learning rate; multiply by it for the effect of the step that was to be taken.
        unit: of every value here: the quantity's unit per unit of lr.
        sequences: (seq,) influence of each sequence of the update batch.
        stderr: (seq,) standard errors, clustered by probe prompt, for a given update batch.
        reach: (seq,) half widths of their 95 % intervals.
        tokens: per sequence (tok,) influence of each token, 0 where the policy did not write it; they add up
            to ``sequences``.
        folds: parts of the probe batch from which influence was taken one by one.
        fold_tokens: (fold, tok) influence of each token that the policy wrote through each fold alone;
            weighted by the folds' shares they add up to ``tokens``.
        update: the batch.
        components: effect of each component of the step but the sequences, by name; with ``sequences``, the
            batch's part as a whole, where nothing splits it.
        total: the linear change per unit of lr: fixed sequences + components.
        sum_of_sequences: sum of ``sequences``, with its error: the update batch's own part of the change
            (fixed), or the derivative with respect to the weight of the whole batch (optimizer).
        disagreement: largest difference between sequence influences by forward and by reverse mode, relative
            to the largest.
        probe_resolved: (probe sequence, update sequence) effect of each update sequence through each probe
            sequence; its mean over probe sequences is ``sequences``. None unless asked for.
    """

    quantity: str
    through: Through
    normalisation: str
    version: str
    baseline: str
    lr: float
    unit: str
    sequences: FloatArray
    stderr: FloatArray
    reach: FloatArray
    tokens: tuple[FloatArray, ...]
    folds: Folds
    fold_tokens: FloatArray
    update: Rollouts
    components: dict[str, Estimate]
    total: Estimate
    sum_of_sequences: Estimate
    disagreement: float
    probe_resolved: FloatArray | None = None

    @property
    def token_stderr(self) -> FloatArray:
        """(tok,) standard errors of the policy's tokens, from the folds; nan with fewer than two.

        stderr^2 = G/(G-1) sum_g share_g^2 (x_g - x)^2 over G folds, for a given update batch. From eight
        folds the error itself is known to a quarter or so.
        """
        return errors_from_sums(self.fold_deviations)

    @property
    def fold_deviations(self) -> FloatArray:
        """(fold, tok) share_g (x_g - x): what each fold adds to the errors of sums over tokens."""
        away = self.folds.shares[:, None] * (self.fold_tokens - self.update.flat(self.tokens))
        return np.asarray(away, dtype=np.float64)

    @property
    def fold_sequences(self) -> FloatArray:
        """(fold, seq) influence of each sequence through each fold alone."""
        parts = np.split(self.fold_tokens, np.cumsum(self.update.num_policy_tokens)[:-1], axis=1)
        return np.stack([part.sum(1) for part in parts], axis=1)

    def to_pandas(self, level: Literal["sequence", "token"] = "sequence") -> pd.DataFrame:
        """A row per sequence and other part of the change, or per token that the policy wrote.

        Influences are per unit of lr, as in :attr:`unit`; those of tokens come with the token's id.
        """
        if level == "sequence":
            return self.sequence_rows().to_pandas()
        ids = [np.asarray(row, dtype=np.int64) for row in self.update.response_token_ids]
        return self.token_rows().to_pandas().assign(token_id=self.update.flat(ids))

    def _viewed(self) -> Parts:
        found = {
            "update": self.update,
            "influence_sequences": self.sequence_rows(),
            "influence_tokens": self.token_rows(),
            "influence_unit": (self.lr, self.unit.removesuffix("/lr")),
        }
        figures = {"the whole batch": self.sum_of_sequences}
        if self.through == "fixed":  # which adds up with the rest
            figures |= {**self.components, "linear change": self.total}
        unit = self.unit.removesuffix("/lr")
        changes = {name: e.scaled(self.lr, unit=unit) for name, e in figures.items()}
        return Parts(f"Influence on {self.quantity}, {self.through}", found, changes)

    def sequence_rows(self) -> InfluenceSequences:
        """One row per sequence, then the other parts of the change."""
        count = len(self.sequences)
        others = self.components if self.through == "fixed" else {}
        rows = count + len(others)

        def column(sequences: FloatArray, part: str) -> FloatArray:
            return np.concatenate([sequences, [getattr(e, part) for e in others.values()]])

        return InfluenceSequences(
            component=np.array(["sequence"] * count + list(others), dtype=np.object_),
            sequence_id=np.array([*range(count), *[None] * len(others)], dtype=np.object_),
            quantity=np.full(rows, self.quantity, dtype=np.object_),
            through=np.full(rows, self.through, dtype=np.object_),
            influence=column(self.sequences, "value"),
            stderr=column(self.stderr, "stderr"),
            low=column(self.sequences - self.reach, "low"),
            high=column(self.sequences + self.reach, "high"),
        )

    def token_rows(self, shrunk: FloatArray | None = None) -> InfluenceTokens:
        """One row per token that the policy wrote.

        Args:
            shrunk: (tok,) the same shrunk towards its prior, if known; see
                :mod:`stepscope.measure.influence.shrinkage`.
        """
        sequence, position = self.update.places
        rows = len(sequence)
        return InfluenceTokens(
            sequence_id=sequence,
            position=position,
            quantity=np.full(rows, self.quantity, dtype=np.object_),
            through=np.full(rows, self.through, dtype=np.object_),
            influence=self.update.flat(self.tokens),
            stderr=self.token_stderr,
            shrunk=np.full(rows, math.nan) if shrunk is None else shrunk,
        )

    def fold_rows(self) -> InfluenceTokenFolds:
        """What the folds of the probe say of the tokens of :meth:`token_rows`; none of a single one."""
        sequence, position = self.update.places
        away = self.fold_deviations
        return InfluenceTokenFolds(
            sequence_id=sequence,
            position=position,
            quantity=np.full(len(sequence), self.quantity, dtype=np.object_),
            through=np.full(len(sequence), self.through, dtype=np.object_),
            folds={str(g): row for g, row in enumerate(away)} if len(away) > 1 else {},
        )

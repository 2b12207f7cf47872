"""``curvature.json``: what pairs of the step's sequences do together, to second order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.best_step import BestStep
from stepscope.results.frames import flat, frame
from stepscope.results.records import FloatArray, Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PairSums(Record):
    """Sums of the second-order kernel M2(i, j) over kinds of ordered pairs; times lr^2/2 they are changes.

    Attributes:
        diagonal: sequences with themselves.
        same_prompt: different sequences of one prompt.
        different_prompts: sequences of different prompts.
        batch: all pairs of sequences; the sum of the three.
        batch_with_parts: a sequence and another part of the step (momentum, decay), both ways round.
        parts: the other parts of the step among themselves.
        total: all pairs: direction' (Hess F) direction, the ``curvature`` of ``change.json``.
    """

    diagonal: Estimate
    same_prompt: Estimate
    different_prompts: Estimate
    batch: Estimate
    batch_with_parts: Estimate
    parts: Estimate
    total: Estimate


@dataclass(frozen=True)
class HeldOutSpectrum(Record):
    """Eigenvalues of the kernel, and what is left of each on probe prompts that had no part in its direction.

    Attributes:
        level: ``sequences``, or ``prompts`` (sums over the sequences of each) where sequences have no rows.
        eigenvalues: of the kernel, largest size first; noise makes their sizes too large.
        held_out: of each, the mean over folds of u' M2 u, u the eigenvector without the fold and M2 by it.
        held_out_stderr: standard error of that mean over the folds.
    """

    level: str
    eigenvalues: FloatArray
    held_out: FloatArray
    held_out_stderr: FloatArray


@dataclass(frozen=True, repr=False)
class PairReport(Plotted, Record):
    """The second-order kernel of one quantity.

    Attributes:
        quantity: its name.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        unit: of the quantity.
        num_sequences: of the update batch.
        num_prompts: of the update batch.
        parts: names of the other parts of the step.
        num_sketches: random signs of the sequences that stand for them; 0 where each has a row.
        whole: sums of M2.
        fisher: sums of its part that is a product of first-order kernels; None where the quantity has none.
        rest: of what is left; None where there is no such part.
        squares: sums of M2(i, j)^2 over kinds of pairs of sequences, free of the probe's noise: ``all``, and
            where every sequence has a row ``diagonal``, ``same_prompt`` and ``different_prompts``.
        noise: share of the sum of squares of the kernel as estimated that the probe's noise is.
        spectrum: eigenvalues.
    """

    quantity: str
    normalisation: str
    version: str
    unit: str
    num_sequences: int
    num_prompts: int
    parts: tuple[str, ...]
    num_sketches: int
    whole: PairSums
    fisher: PairSums | None
    rest: PairSums | None
    squares: Mapping[str, Estimate]
    noise: Estimate
    spectrum: HeldOutSpectrum

    def to_pandas(self) -> pd.DataFrame:
        """A row for the kernel and for each of its parts, with its sums over kinds of pairs."""
        parts = {"whole": self.whole, "fisher": self.fisher, "rest": self.rest}
        own = {"quantity": self.quantity, "normalisation": self.normalisation, "version": self.version}
        return frame({**own, "part": n, **flat(sums)} for n, sums in parts.items() if sums is not None)


@dataclass(frozen=True, repr=False)
class CurvatureReport(Plotted, Record):
    """The second-order kernels of a measurement.

    Attributes:
        lr: learning rate of the step (the initial one, where a schedule has come to 0), for lr^2/2 M2.
        pairs: one per quantity, the primary one first.
        best: batch size and learning rate predicted for each of them; empty for a batch of one prompt.
    """

    lr: float
    pairs: tuple[PairReport, ...]
    best: tuple[BestStep, ...]

    def to_pandas(self) -> pd.DataFrame:
        """The rows of all its kernels; see :meth:`PairReport.to_pandas`."""
        import pandas as pd

        return pd.concat([pairs.to_pandas() for pairs in self.pairs], ignore_index=True)

    def _viewed(self) -> Parts:
        return Parts("Second-order kernel", {"curvature": self})

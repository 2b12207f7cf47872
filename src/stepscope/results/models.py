"""``models.json``: how well models predict unseen entries of the kernel, and the kernel against its null."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.frames import frame
from stepscope.results.records import Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class KernelModel(Record):
    """A model of K, judged on rows of prompts that it has not seen.

    Attributes:
        name: of the model.
        metric: ``raw`` or ``preconditioned``.
        formula: in words and symbols.
        passes: forward passes over the batch that its predictions need.
        fitted: numbers that were fitted to the entries of other prompts; 0 for what predicts as it is.
        r2: kind of pair (``diagonal``, ``same_prompt``, ``different_prompts``) to the share of the variance
            of its entries that is predicted; below 0 where their mean would be nearer.
        spearman: kind of pair to the rank correlation of predicted and true entries within a fold of prompts,
            averaged over folds; no number for a model that orders nothing.
    """

    name: str
    metric: str
    formula: str
    passes: int
    fitted: int
    r2: Mapping[str, Estimate]
    spearman: Mapping[str, Estimate]


@dataclass(frozen=True)
class NullTest(Record):
    """One statistic of the cosine kernel against versions of its gradients whose tokens have random signs.

    Attributes:
        metric: of the kernel.
        coupling: ``responses``: signs of each response's own, any coupling between responses breaks the null;
            ``prompts``: one sign for a position of all responses to a prompt, so that what these share is
            part of the null.
        statistic: ``largest eigenvalue``, or ``mean squared cosine`` of pairs ``between prompts`` or ``within
            prompts``.
        value: of the batch.
        null_mean: over the null's draws.
        null_high: their 95 % quantile.
        p: share of draws that reach the value, the batch itself among them.
        draws: number of draws.
    """

    metric: str
    coupling: str
    statistic: str
    value: float
    null_mean: float
    null_high: float
    p: float
    draws: int


@dataclass(frozen=True, repr=False)
class ModelsReport(Plotted, Record):
    """Content of ``models.json``.

    Attributes:
        distinct: sequences left when identical responses to a prompt, and gradients of zero, are merged.
        folds: of prompts.
        models: of K.
        tests: of its spectrum.
        shares: part of the head's weight to its share of the trace of K, P = 1: ``head`` is the last layer's
            kernel; where the weight is also the embedding, ``embedding`` is the part of the gradient that
            goes through the input, and ``cross`` twice the product of both.
        left_out: model to why it was not made.
    """

    distinct: int
    folds: int
    models: tuple[KernelModel, ...]
    tests: tuple[NullTest, ...]
    shares: Mapping[str, Number]
    left_out: Mapping[str, str]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each of ``models``."""
        return frame(self.models)

    def _viewed(self) -> Parts:
        return Parts("What a forward pass knows of the kernel", {"models": self})

"""``kernel.json``: what the kernels of a measurement are, and what they look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.frames import flat, frame
from stepscope.results.records import FloatArray, Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PairMean(Record):
    """Mean of K over one kind of pair.

    Attributes:
        mean: with an error by deleting prompts one at a time.
        count: number of pairs (unordered).
        std: standard deviation over the pairs.
    """

    mean: Estimate
    count: int
    std: Number


@dataclass(frozen=True)
class MeanZero(Record):
    """Check of E K(i, j) = 0 over pairs of different sequences that one policy sampled and is measured at.

    Attributes:
        mean: of K over the pairs; its standard error sqrt(sum K^2) / pairs is exact under the identity, which
            makes the entries uncorrelated. Flagged where random signs hardly ever give so large a mean.
        z: mean over its error.
        p: share of random signs of the sequences under which the mean is at least as far from zero.
    """

    mean: Estimate
    z: Number
    p: Number


@dataclass(frozen=True)
class PrefixMean(Record):
    """Mean of K over pairs of responses to one prompt that share their first tokens.

    Attributes:
        shared_from: fewest shared response tokens in this bin.
        shared_to: most.
        mean: of K.
        count: pairs.
    """

    shared_from: int
    shared_to: int
    mean: float
    count: int


@dataclass(frozen=True, repr=False)
class KernelStructure(Record):
    """Structure report of one (seq, seq) kernel.

    Attributes:
        distinct: sequences left when identical responses to a prompt, and gradients of zero, are merged.
        diagonal: K(i, i).
        same_prompt: pairs of different sequences of one prompt.
        different_prompts: pairs of sequences of different prompts.
        mean_zero: for a kernel of log-probs that is not in cosine form, the check of its mean-zero identity
            over all pairs (``off_diagonal``) and those of one prompt (``same_prompt``).
        spectrum: eigenvalues of the distinct sequences, largest first.
        effective_rank: exp of the entropy of eigenvalues / trace (Roy & Vetterli 2007).
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares.
        top_shares: share of the trace in the largest 1, 2, 4, 8, ... eigenvalues.
        null_spectrum: eigenvalues of the same gradients with random signs on their tokens.
        null_effective_rank: of those.
        rank_deficit: null_effective_rank - effective_rank: not zero where responses are coupled; shared
            directions take rank away, directions of the prompts can add some, and merging identical
            responses adds a few per cent of the rank (:mod:`stepscope.measure.kernel.null`).
        components: variance components of a gradient as common + prompt + own: means of K over different
            prompts, same prompt minus that, diagonal minus that; each as a share of the mean diagonal. For
            kernels of log-probs on policy the first two are zero but for noise; for contributions the first
            is the share of the squared mean gradient.
        shared_prefix: mean of K over same-prompt pairs by the number of response tokens they share.
    """

    distinct: int
    diagonal: PairMean
    same_prompt: PairMean
    different_prompts: PairMean
    mean_zero: Mapping[str, MeanZero]
    spectrum: FloatArray
    effective_rank: Estimate
    participation_ratio: float
    top_shares: Mapping[int, float]
    null_spectrum: FloatArray
    null_effective_rank: float
    rank_deficit: Estimate
    components: Mapping[str, Estimate]
    shared_prefix: tuple[PrefixMean, ...]


@dataclass(frozen=True, repr=False)
class KernelReport(Plotted, Record):
    """What the matrices of ``kernel.safetensors`` are, and the structure of each.

    Attributes:
        matrices: name to shape.
        rows: first word of a matrix's name to what its rows are.
        update_prompt_ids: prompt of each sequence of the update batch.
        probe_prompt_ids: of each sequence of the probe batch; empty without one.
        num_params: trainable parameters.
        projection_error: root-mean-square error of cosines if they come from a random projection; None for
            exact kernels.
        structure: metric, plain and with ``_cosine``, to the structure of the update batch's kernel.
    """

    matrices: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, str]
    update_prompt_ids: tuple[str, ...]
    probe_prompt_ids: tuple[str, ...]
    num_params: int
    projection_error: Estimate | None
    structure: Mapping[str, KernelStructure]

    def to_pandas(self) -> pd.DataFrame:
        """A row per kernel with the figures of its structure."""
        return frame({"kernel": name, **flat(found)} for name, found in self.structure.items())

    def _viewed(self) -> Parts:
        return Parts("Fisher kernel", {"kernel": self})

"""What a kernel between sequences looks like: who is coupled to whom, along how many directions.

Works on a (seq, seq) matrix K of inner products of gradients and the prompts of the sequences; no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.stats import Estimate

PREFIX_BINS = (0, 1, 2, 4, 8, 16, 32, 64)
NULL_DRAWS = 8


@dataclass(frozen=True)
class PairMean:
    """Mean of K over one kind of pair.

    Attributes:
        mean: with an error by deleting prompts one at a time.
        count: number of pairs (unordered).
        std: standard deviation over the pairs.
    """

    mean: Estimate
    count: int
    std: float


@dataclass(frozen=True)
class PrefixMean:
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


@dataclass(frozen=True)
class KernelStructure:
    """Structure report of one (seq, seq) kernel.

    Attributes:
        diagonal: K(i, i).
        same_prompt: pairs of different sequences of one prompt.
        different_prompts: pairs of sequences of different prompts.
        spectrum: eigenvalues, largest first.
        effective_rank: exp of the entropy of eigenvalues / trace (Roy & Vetterli 2007).
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares.
        top_shares: share of the trace in the largest 1, 2, 4, 8, ... eigenvalues.
        null_spectrum: eigenvalues expected of gradients with the same norms in independent random directions.
        null_effective_rank: of such gradients.
        null_edges: Marchenko-Pastur edges of the null for equal norms, in units of the mean diagonal.
        components: variance components of a gradient as common + prompt + own: means of K over different
            prompts, same prompt minus that, diagonal minus that; each as a share of the mean diagonal.
        shared_prefix: mean of K over same-prompt pairs by the number of response tokens they share.
    """

    diagonal: PairMean
    same_prompt: PairMean
    different_prompts: PairMean
    spectrum: FloatArray
    effective_rank: Estimate
    participation_ratio: float
    top_shares: dict[int, float]
    null_spectrum: FloatArray
    null_effective_rank: float
    null_edges: tuple[float, float]
    components: dict[str, Estimate]
    shared_prefix: tuple[PrefixMean, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return {
            **asdict(self),
            "spectrum": self.spectrum.tolist(),
            "null_spectrum": self.null_spectrum.tolist(),
            "null_edges": list(self.null_edges),
            "top_shares": {str(k): v for k, v in self.top_shares.items()},
            "shared_prefix": [asdict(p) for p in self.shared_prefix],
        }


def kernel_structure(K: FloatArray, rollouts: Rollouts, *, num_params: int, unit: str) -> KernelStructure:
    """Describe the kernel of a batch.

    Args:
        K: (seq, seq) symmetric, positive semidefinite up to round-off.
        rollouts: the sequences, for their prompts and shared prefixes.
        num_params: dimension the gradients live in; sets the null.
        unit: of K's entries.
    """
    prompts = rollouts.prompt_index
    spectrum = eigenvalues(K)
    null, edges = null_spectrum(np.diag(K), num_params)
    masks = _pair_masks(prompts)
    means = {name: _pair_mean(K, mask, prompts, unit) for name, mask in masks.items()}
    rank = effective_rank(spectrum)
    rank_of = _jackknife(
        lambda keep: effective_rank(eigenvalues(K[np.ix_(keep, keep)])), prompts, len(prompts)
    )
    return KernelStructure(
        diagonal=means["diagonal"],
        same_prompt=means["same_prompt"],
        different_prompts=means["different_prompts"],
        spectrum=spectrum,
        effective_rank=_with_error(
            rank, rank_of, rollouts.num_prompts, "directions", "exp of the spectral entropy"
        ),
        participation_ratio=float(spectrum.sum() ** 2 / (spectrum**2).sum()) if spectrum.any() else 0.0,
        top_shares=_top_shares(spectrum),
        null_spectrum=null,
        null_effective_rank=effective_rank(null),
        null_edges=edges,
        components=_components(K, prompts),
        shared_prefix=_by_prefix(K, rollouts),
    )


def eigenvalues(K: FloatArray) -> FloatArray:
    """Eigenvalues of a symmetric matrix, largest first; round-off below zero is zero."""
    return np.asarray(np.maximum(np.linalg.eigvalsh((K + K.T) / 2)[::-1], 0.0), dtype=np.float64)


def effective_rank(spectrum: FloatArray) -> float:
    """exp(-sum p log p), p = eigenvalue / trace: how many equal eigenvalues have the same entropy."""
    total = float(spectrum.sum())
    if total <= 0:
        return 0.0
    p = spectrum[spectrum > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def cosine_form(K: FloatArray) -> FloatArray:
    """K(i, j) / sqrt(K(i, i) K(j, j)); zero where a gradient vanishes."""
    return cosine_between(K, np.diag(K), np.diag(K))


def cosine_between(K: FloatArray, row_norms: FloatArray, column_norms: FloatArray) -> FloatArray:
    """K(e, i) / sqrt(K(e, e) K(i, i)) from squared norms; zero where a gradient vanishes."""
    scale = np.sqrt(np.outer(row_norms, column_norms))
    return np.divide(K, scale, out=np.zeros_like(K), where=scale > 0)


def null_spectrum(
    square_norms: FloatArray, num_params: int, *, seed: int = 0
) -> tuple[FloatArray, tuple[float, float]]:
    """Mean spectrum of the kernel of Gaussian gradients with the given norms, and Marchenko-Pastur's edges.

    With n independent directions in num_params dimensions the cosine kernel is a Wishart matrix, drawn here
    through its Bartlett factor; for equal norms its eigenvalues fill (1 -+ sqrt(n / num_params))^2 times the
    norm (Marchenko & Pastur 1967).
    """
    count = len(square_norms)
    rng = np.random.default_rng(seed)
    total = np.zeros(count)
    small = min(num_params, count)
    for _ in range(NULL_DRAWS):
        if num_params < count:
            factor = rng.standard_normal((count, num_params))
        else:
            factor = np.tril(rng.standard_normal((count, small)), -1)
            factor[np.arange(count), np.arange(count)] = np.sqrt(rng.chisquare(num_params - np.arange(count)))
        factor *= np.sqrt(square_norms / (factor**2).sum(1))[:, None]
        total += eigenvalues(factor @ factor.T)
    ratio = np.sqrt(count / num_params)
    return total / NULL_DRAWS, (float((1 - min(ratio, 1.0)) ** 2), float((1 + ratio) ** 2))


def _top_shares(spectrum: FloatArray) -> dict[int, float]:
    total = float(spectrum.sum())
    sizes = [2**k for k in range(int(np.log2(len(spectrum))) + 1)]
    return {k: float(spectrum[:k].sum() / total) if total > 0 else 0.0 for k in sizes}


def _pair_masks(prompts: IntArray) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    same = prompts[:, None] == prompts[None, :]
    own = np.eye(len(prompts), dtype=bool)
    return {"diagonal": own, "same_prompt": same & ~own, "different_prompts": ~same}


def _pair_mean(
    K: FloatArray, mask: np.ndarray[Any, np.dtype[np.bool_]], prompts: IntArray, unit: str
) -> PairMean:
    count = int(mask.sum())
    ordered = 1 if np.diag(mask).all() else 2
    values = K[mask]
    level = float(values.mean()) if count else float("nan")

    def without(keep: IntArray) -> float:
        inside = mask[np.ix_(keep, keep)]
        return float(K[np.ix_(keep, keep)][inside].mean()) if inside.any() else float("nan")

    errors = _jackknife(without, prompts, len(prompts)) if count else np.array([])
    return PairMean(
        mean=_with_error(level, errors, int(prompts.max()) + 1, unit, "mean over pairs"),
        count=count // ordered,
        std=float(values.std()) if count else float("nan"),
    )


def _components(K: FloatArray, prompts: IntArray) -> dict[str, Estimate]:
    """Moment estimates of common + prompt + own, as shares of the mean diagonal."""

    def shares(keep: IntArray) -> FloatArray:
        part, masks = K[np.ix_(keep, keep)], _pair_masks(prompts[keep])
        level = {n: float(part[m].mean()) if m.any() else np.nan for n, m in masks.items()}
        parts = (
            level["different_prompts"],
            level["same_prompt"] - level["different_prompts"],
            level["diagonal"] - level["same_prompt"],
        )
        return np.array(parts) / level["diagonal"]

    everything = np.arange(len(prompts))
    values = shares(everything)
    labels = np.unique(prompts)
    without = np.array([shares(everything[prompts != g]) for g in labels]) if len(labels) > 1 else None
    return {
        name: _with_error(
            float(values[c]),
            np.array([]) if without is None else without[:, c],
            len(labels),
            "share of the mean diagonal",
            "variance components from pair means",
        )
        for c, name in enumerate(("common", "prompt", "own"))
    }


def _jackknife(statistic: Callable[[IntArray], float], prompts: IntArray, count: int) -> FloatArray:
    """The statistic without each prompt in turn."""
    labels = np.unique(prompts)
    if len(labels) < 2:
        return np.array([])
    everything = np.arange(count)
    return np.array([statistic(everything[prompts != g]) for g in labels])


def _with_error(value: float, without: FloatArray, count: int, unit: str, method: str) -> Estimate:
    if len(without) < 2 or not np.isfinite(without).all():
        reason = "an error needs at least two prompts, and pairs of this kind without any one of them"
        return Estimate(value, float("nan"), count, unit, method, reliable=False, reason=reason)
    error = float(np.sqrt((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum()))
    return Estimate(value, error, count, unit, f"{method}, jackknife over prompts")


def shared_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two responses have in common from the start."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _by_prefix(K: FloatArray, rollouts: Rollouts) -> tuple[PrefixMean, ...]:
    prompts = rollouts.prompt_index
    found: dict[int, list[float]] = {}
    for i in range(len(rollouts)):
        for j in np.flatnonzero(prompts[:i] == prompts[i]):
            shared = shared_prefix_length(rollouts.response_token_ids[i], rollouts.response_token_ids[j])
            found.setdefault(int(np.searchsorted(PREFIX_BINS, shared, side="right")) - 1, []).append(
                float(K[i, j])
            )
    return tuple(
        PrefixMean(
            shared_from=PREFIX_BINS[b],
            shared_to=PREFIX_BINS[b + 1] - 1 if b + 1 < len(PREFIX_BINS) else rollouts.max_response_tokens,
            mean=float(np.mean(values)),
            count=len(values),
        )
        for b, values in sorted(found.items())
    )

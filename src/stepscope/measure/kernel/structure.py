"""What a kernel between sequences looks like: who is coupled to whom, along how many directions.

Works on a (seq, seq) matrix K of inner products of gradients, the same matrix of a null, and the prompts of
the sequences; no model.

On policy E[grad l_k | prefix] = 0, so the gradients of two responses have E K(i, j) = 0, also for one prompt
(Williams 1992); only their own squares do not average away. Two things follow. Pair means of K are a check
of the batch, not structure. And random signs on the tokens of each response leave the covariance of its
gradient as it is, whatever its spectrum and however it spans the layers, while they break every coupling of
one response with another: the null that spectra are held against. Random directions of equal length would
not do; real gradients are far from isotropic, and independent ones have a low rank already.

Identical responses to a prompt are one response to everything that describes shape (spectrum, rank,
cosines, shared prefixes); means of inner products are over all sequences, which are independent draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts
from stepscope.results.kernel import KernelStructure, MeanZero, PairMean, PrefixMean
from stepscope.stats import Estimate, jackknife, leave_out

PREFIX_BINS = (0, 1, 2, 4, 8, 16, 32, 64)

SIGN_DRAWS = 2000
"""Random signs of the sequences that a mean of K is held against."""

UNLIKELY = 1e-3
"""Share of those signs below which a mean of K counts as different from zero."""


def kernel_structure(
    K: FloatArray,
    null: FloatArray,
    rollouts: Rollouts,
    *,
    unit: str,
    cosine: bool = False,
    contributions: bool = False,
) -> KernelStructure:
    """Describe the kernel of a batch.

    Args:
        K: (seq, seq) inner products, symmetric, positive semidefinite up to round-off.
        null: (seq, seq) inner products of the same gradients with random signs on their tokens, the same
            signs for identical responses.
        rollouts: the sequences, for their prompts and responses.
        unit: of K's entries.
        cosine: describe the cosine form.
        contributions: the gradients are parts of a sum (a step), so that identical responses are added up
            and no mean is zero; otherwise they are gradients of log-probs, and copies are left out.
    """
    merged, kept = _merged(K, rollouts, contributions)
    merged_null = _merged(null, rollouts, contributions)[0][np.ix_(kept, kept)]
    merged = merged[np.ix_(kept, kept)]
    if cosine:
        merged, merged_null = cosine_form(merged), cosine_form(merged_null)
    distinct = rollouts.select(kept)
    described = (merged, distinct) if cosine else (K, rollouts)
    level, prompts = described[0], described[1].prompt_index
    masks = _pair_masks(prompts)
    means = {name: _pair_mean(level, mask, prompts, unit) for name, mask in masks.items()}
    spectrum, null_spectrum = eigenvalues(merged), eigenvalues(merged_null)

    def ranks(keep: IntArray) -> FloatArray:
        part = np.ix_(keep, keep)
        found = effective_rank(eigenvalues(merged[part]))
        return np.array([found, effective_rank(eigenvalues(merged_null[part])) - found])

    rank, null_rank = effective_rank(spectrum), effective_rank(null_spectrum)
    without = np.array(
        leave_out(ranks, distinct.prompt_index) if distinct.num_prompts > 1 else np.zeros((0, 2))
    )
    return KernelStructure(
        distinct=len(kept),
        diagonal=means["diagonal"],
        same_prompt=means["same_prompt"],
        different_prompts=means["different_prompts"],
        mean_zero={}
        if cosine or contributions
        else {
            "off_diagonal": _mean_zero(K, ~masks["diagonal"], unit),
            "same_prompt": _mean_zero(K, masks["same_prompt"], unit),
        },
        spectrum=spectrum,
        effective_rank=_with_error(
            rank, without[:, 0], distinct.num_prompts, "directions", "exp of the spectral entropy"
        ),
        participation_ratio=float(spectrum.sum() ** 2 / (spectrum**2).sum()) if spectrum.any() else 0.0,
        top_shares=_top_shares(spectrum),
        null_spectrum=null_spectrum,
        null_effective_rank=null_rank,
        rank_deficit=_with_error(
            null_rank - rank,
            without[:, 1],
            distinct.num_prompts,
            "directions",
            "effective rank with random signs on the tokens, minus that without",
        ),
        components=_components(level, prompts),
        shared_prefix=_by_prefix(merged, distinct),
    )


def first_copies(rollouts: Rollouts) -> IntArray:
    """(seq,) the first sequence with the same prompt and the same response; itself where there is no copy."""
    first: dict[tuple[int, tuple[int, ...]], int] = {}
    keys = zip(rollouts.prompt_index.tolist(), rollouts.response_token_ids, strict=True)
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)


def token_signs(rollouts: Rollouts, *, seed: int = 0) -> tuple[FloatArray, ...]:
    """Random signs of the policy's tokens by sequence; identical responses to a prompt get the same."""
    rng = np.random.default_rng([seed, 1])
    drawn = rollouts.rows(
        np.concatenate([rng.choice([-1.0, 1.0], int(n)) for n in rollouts.num_policy_tokens])
    )
    return tuple(drawn[i] for i in first_copies(rollouts))


def _merged(K: FloatArray, rollouts: Rollouts, added: bool) -> tuple[FloatArray, IntArray]:
    """K with copies added to the first (or as it is), and the first copies whose gradient is not zero."""
    owner = first_copies(rollouts)
    if added:
        group = np.zeros_like(K)
        group[owner, np.arange(len(owner))] = 1.0
        K = group @ K @ group.T
    return K, np.flatnonzero((owner == np.arange(len(owner))) & (np.diag(K) > 0))


def _mean_zero(K: FloatArray, mask: BoolArray, unit: str) -> MeanZero:
    """The mean of K over pairs against zero, by its exact error and by random signs of the sequences."""
    pairs = np.where(np.triu(mask), K, 0.0)
    count, nan = int(np.triu(mask).sum()), float("nan")
    total, error = float(pairs.sum()), float(np.sqrt((pairs**2).sum()))
    method = "mean over pairs; its error assumes the mean-zero identity, n counts sequences"
    if not error > 0:
        reason = "no pairs of this kind, or no gradients"
        return MeanZero(Estimate(nan, nan, len(K), unit, method, False, reason), nan, nan)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (SIGN_DRAWS, len(K)))
    drawn = np.einsum("ri,ri->r", signs @ pairs, signs)
    # the batch itself is one of the draws
    p = float((1 + (np.abs(drawn) >= abs(total) * (1 - 1e-9)).sum()) / (1 + SIGN_DRAWS))
    reason = (
        "different from 0, which gradients of log-probs average to under the policy that sampled the batch: "
        "another policy, temperature or selection made it, or what balances it is too rare to be in it"
        if p < UNLIKELY
        else ""
    )
    return MeanZero(
        Estimate(total / count, error / count, len(K), unit, method, not reason, reason), total / error, p
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


def _top_shares(spectrum: FloatArray) -> dict[int, float]:
    total = float(spectrum.sum())
    sizes = [2**k for k in range(len(spectrum).bit_length())]
    return {k: float(spectrum[:k].sum() / total) if total > 0 else 0.0 for k in sizes}


def _pair_masks(prompts: IntArray) -> dict[str, BoolArray]:
    same = prompts[:, None] == prompts[None, :]
    own = np.eye(len(prompts), dtype=bool)
    return {"diagonal": own, "same_prompt": same & ~own, "different_prompts": ~same}


def _pair_mean(K: FloatArray, mask: BoolArray, prompts: IntArray, unit: str) -> PairMean:
    count = int(mask.sum())
    ordered = 1 if mask.any() and np.diag(mask).all() else 2
    values = K[mask]
    level = float(values.mean()) if count else float("nan")

    def without(keep: IntArray) -> float:
        inside = mask[np.ix_(keep, keep)]
        return float(K[np.ix_(keep, keep)][inside].mean()) if inside.any() else float("nan")

    errors = np.array(leave_out(without, prompts) if count else [])
    return PairMean(
        mean=_with_error(level, errors, len(np.unique(prompts)), unit, "mean over pairs"),
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
        return np.array(parts) / (level["diagonal"] or np.nan)

    values = shares(np.arange(len(prompts)))
    count = len(np.unique(prompts))
    without = np.array(leave_out(shares, prompts) if count > 1 else np.zeros((0, 3)))
    return {
        name: _with_error(
            float(values[c]),
            without[:, c],
            count,
            "share of the mean diagonal",
            "variance components from pair means",
        )
        for c, name in enumerate(("common", "prompt", "own"))
    }


def _with_error(value: float, without: FloatArray, count: int, unit: str, method: str) -> Estimate:
    _, error = jackknife(without)
    if not np.isfinite(error):
        reason = "an error needs at least two prompts, and pairs of this kind without any one of them"
        return Estimate(value, float("nan"), count, unit, method, reliable=False, reason=reason)
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

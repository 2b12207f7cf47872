"""Sampler against policy: divergence, importance weights and lost mass of a batch that an engine drew.

The responses come from q (another engine, rounding, temperature or truncation); what is measured is pi. Per
position, k1 = log q - log pi and k3 = pi/q - 1 - log(pi/q) are estimates of KL(q | pi) at the prefix
(Schulman 2020, http://joschu.net/blog/kl-approx.html). k1 is unbiased always; k3 only where q can draw all
that pi can: truncation keeps the mass S of pi, so that E_q[pi/q] = S and E_q[k3] = KL - (1 - S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.measure.quantity.importance_weights import check_weights, importance_weights
from stepscope.policy.sampling.drawn_by import DRIFT_LIMIT
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts
from stepscope.results.mismatch import SamplerMismatch, WorstToken
from stepscope.stats import (
    Estimate,
    clustered_estimate,
    clustered_quantile,
    clustered_ratio,
    exact,
    paired_ratio_difference,
)

CUT = 0.01
"""Share of the policy's probability from which a position counts as one where truncation cuts."""

QUANTILES = (0.5, 0.9, 0.99, 0.999)
NUM_WORST = 20
_BY_PROMPT = "error clustered by prompt"


def sampler_mismatch(
    rollouts: Rollouts, *, sequence_weights: FloatArray | None = None
) -> SamplerMismatch | None:
    """How far the sampler of a batch is from the policy whose log-probs it has.

    Figures, by name:

    - ``difference``: mean over tokens of |log q - log pi|; ``difference_q50`` and others its quantiles,
      ``difference_largest`` the largest;
    - ``k1_per_token``, ``k3_per_token``, ``k1_per_seq``, ``k3_per_seq``: KL(q | pi), per sequence summed over
      its positions; ``ratio``: mean of pi/q over tokens;
    - ``effective_per_token``, ``effective_per_seq``: Kish's effective sample size of the weights pi/q of
      tokens and of whole responses, as a share;
    - ``engine_difference``, ``engine_k1_per_token``: of q against q^, what the sampler's temperature and
      truncation make of the policy: kernels, rounding, other weights; ``settings_k1_per_token``: of q^
      against pi;
    - ``mass``: mean of S; ``mass_lost``: mean of -log S; ``positions_cut``: share of positions at which more
      than a hundredth of the probability is cut;
    - ``bias_entropy_per_token``, ``bias_reward``: the plain mean over the batch minus the mean with weights
      (per decision for the entropy): what q in place of pi does, as far as q draws what pi would.

    Args:
        rollouts: with ``sampler_logprobs``; nan where none is known.
        sequence_weights: (seq,) q of prompt and response where the batch lists all responses; then the
            figures are exact expectations.

    Returns:
        None where nothing is known of a sampler.

    Pinned by ``tests/measure/test_mismatch.py``: closed forms on a policy small enough to enumerate.
    """
    if rollouts.sampler_logprobs is None:
        return None
    known = tuple(
        mask & np.isfinite(row) for mask, row in zip(rollouts.written, rollouts.sampler_logprobs, strict=True)
    )
    if not any(mask.any() for mask in known):
        return None
    tokens = _Tokens(rollouts.prompt_index, known, sequence_weights)
    log_pi, log_q = rollouts.logprobs, rollouts.sampler_logprobs
    gap = tokens.rows(q - p for p, q in zip(log_pi, log_q, strict=True))
    weights = _sequence_ratios(gap)
    figures = _distances(tokens, gap) | _divergences(tokens, gap, weights)
    if rollouts.decoding_logprobs is not None:
        own = rollouts.decoding_logprobs
        engine = tokens.rows(q - d for q, d in zip(log_q, own, strict=True))
        made = tokens.rows(d - p for d, p in zip(own, log_pi, strict=True))
        figures |= {
            "engine_difference": tokens.mean(
                [np.abs(g) for g in engine], "nats/token", "mean of |log q - log q^|"
            ),
            "engine_k1_per_token": tokens.mean(engine, "nats/token", "mean of log q - log q^"),
            "settings_k1_per_token": tokens.mean(made, "nats/token", "mean of log q^ - log pi"),
        }
    if rollouts.kept_masses is not None:
        figures |= _masses(tokens, tokens.rows(rollouts.kept_masses))
    figures |= _biases(rollouts, tokens, gap)
    doubt = "; ".join(_doubts(rollouts, figures, weights, sequence_weights))
    return SamplerMismatch(figures, _worst(rollouts, known), doubt)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a batch of which both log-probs are known, and means over them."""

    clusters: IntArray
    known: tuple[BoolArray, ...]
    weights: FloatArray | None

    def rows(self, values: object) -> list[FloatArray]:
        """Values of all tokens, one array per sequence, at those that are known."""
        assert hasattr(values, "__iter__")
        return [np.asarray(row)[mask] for row, mask in zip(values, self.known, strict=True)]

    @property
    def counts(self) -> FloatArray:
        """(seq,) tokens that are known."""
        return np.array([float(mask.sum()) for mask in self.known])

    def ratio(self, x: FloatArray, y: FloatArray, unit: str, method: str) -> Estimate:
        """Ratio of sums over sequences."""
        if self.weights is not None:
            value = float(self.weights @ x) / float(self.weights @ y)
            return exact(value, len(x), unit, f"{method}, all responses listed")
        return clustered_ratio(x, y, self.clusters, unit=unit, method=f"{method}, {_BY_PROMPT}")

    def mean(self, rows: Sequence[FloatArray], unit: str, method: str) -> Estimate:
        """Mean over tokens."""
        return self.ratio(_sums(rows), self.counts, unit, method)

    def per_seq(self, rows: Sequence[FloatArray], unit: str, method: str) -> Estimate:
        """Mean over sequences of the sum over tokens."""
        return self.ratio(_sums(rows), np.ones(len(rows)), unit, method)

    def effective(self, first: FloatArray, second: FloatArray, size: FloatArray, what: str) -> Estimate:
        """(sum w)^2 / (n sum w^2) from each sequence's sums of w, w^2 and 1, by the delta method."""
        a = np.full(len(first), 1 / len(first)) if self.weights is None else self.weights
        w, square, n = float(a @ first), float(a @ second), float(a @ size)
        value = w**2 / (square * n) if square > 0 else float("nan")
        method = f"Kish's effective sample size of the weights pi/q {what}, as a share"
        if self.weights is not None:
            return exact(value, len(first), "share", f"{method}, all responses listed")
        residuals = value * (2 * first / w - second / square - size / n)
        return clustered_estimate(
            value, residuals, self.clusters, unit="share", method=f"{method}, {_BY_PROMPT}"
        )


def _sums(rows: Sequence[FloatArray]) -> FloatArray:
    return np.array([float(row.sum()) for row in rows])


def _sequence_ratios(gap: Sequence[FloatArray]) -> FloatArray:
    """(seq,) pi/q of whole responses; the largest finite number in place of an infinite one."""
    with np.errstate(over="ignore"):
        return np.nan_to_num(np.exp(-_sums(gap)))


def _distances(tokens: _Tokens, gap: list[FloatArray]) -> dict[str, Estimate]:
    size = [np.abs(row) for row in gap]
    unit = "nats/token"
    found = {"difference": tokens.mean(size, unit, "mean over tokens of |log q - log pi|")}
    if tokens.weights is not None:
        return found
    for level in QUANTILES:
        name = f"difference_q{100 * level:g}".replace(".", "")
        found[name] = clustered_quantile(
            size, tokens.clusters, level, unit="nats", method=f"{level:.1%} quantile of |log q - log pi|"
        )
    largest = max(float(row.max()) for row in size if row.size)
    found["difference_largest"] = exact(
        largest, int(tokens.counts.sum()), "nats", "largest |log q - log pi| of this batch"
    )
    return found


def _divergences(tokens: _Tokens, gap: list[FloatArray], whole: FloatArray) -> dict[str, Estimate]:
    with np.errstate(over="ignore"):
        ratio = [np.nan_to_num(np.exp(-row)) for row in gap]
    k3 = [r - 1 + g for r, g in zip(ratio, gap, strict=True)]
    ones = np.ones(len(gap))
    one, three = "k1: mean of log q - log pi", "k3: mean of pi/q - 1 - log(pi/q)"
    return {
        "k1_per_token": tokens.mean(gap, "nats/token", one),
        "k3_per_token": tokens.mean(k3, "nats/token", three),
        "k1_per_seq": tokens.per_seq(gap, "nats/sequence", f"{one}, summed over a response"),
        "k3_per_seq": tokens.per_seq(k3, "nats/sequence", f"{three}, summed over a response"),
        "ratio": tokens.mean(ratio, "1", "mean of pi/q over tokens"),
        "effective_per_token": tokens.effective(
            _sums(ratio), _sums([r**2 for r in ratio]), tokens.counts, "of tokens"
        ),
        "effective_per_seq": tokens.effective(whole, whole**2, ones, "of whole responses"),
    }


def _masses(tokens: _Tokens, masses: list[FloatArray]) -> dict[str, Estimate]:
    lost = [-np.log(row) for row in masses]
    cut = [(row < 1 - CUT).astype(np.float64) for row in masses]
    return {
        "mass": tokens.mean(masses, "probability", "mean of S, what truncation keeps of pi"),
        "mass_lost": tokens.mean(lost, "nats/token", "mean of -log S, S being what truncation keeps of pi"),
        "positions_cut": tokens.mean(cut, "share of positions", f"positions with S below {1 - CUT:g}"),
    }


def _biases(rollouts: Rollouts, tokens: _Tokens, gap: list[FloatArray]) -> dict[str, Estimate]:
    """Plain minus weighted means of entropy and reward; nothing where weights overflow or all are listed."""
    if tokens.weights is not None or rollouts.response_masks is not None:
        return {}
    if any(mask.size != int(mask.sum()) for mask in tokens.known):
        return {}
    width = int(tokens.counts.max())
    log_ratio, entropy, here = (np.zeros((len(gap), width)) for _ in range(3))
    for i, row in enumerate(gap):
        log_ratio[i, : len(row)] = -row
        entropy[i, : len(row)] = rollouts.entropies[i]
        here[i, : len(row)] = 1.0
    if not np.abs(np.cumsum(log_ratio, 1)).max() < 300:
        return {}
    weights = importance_weights(np.zeros_like(log_ratio), log_ratio)
    before = 1 + weights.before
    found = {
        "bias_entropy_per_token": paired_ratio_difference(
            ((before * entropy * here).sum(1), (before * here).sum(1)),
            (entropy.sum(1), here.sum(1)),
            tokens.clusters,
            unit="nats/token",
            method=f"plain minus per-decision weighted mean of the entropy, {_BY_PROMPT}",
        )
    }
    if np.isfinite(rollouts.rewards).all():
        whole = 1 + weights.whole
        found["bias_reward"] = paired_ratio_difference(
            (whole * rollouts.rewards, whole),
            (rollouts.rewards, np.ones(len(gap))),
            tokens.clusters,
            unit="reward",
            method=f"plain minus weighted mean of the reward, {_BY_PROMPT}",
        )
    return found


def _doubts(
    rollouts: Rollouts,
    figures: dict[str, Estimate],
    weights: FloatArray,
    sequence_weights: FloatArray | None,
) -> list[str]:
    """Why the batch cannot pass for one of the policy's own."""
    reasons = []
    if rollouts.decoding_logprobs is not None:
        kl = figures["k1_per_seq"].value
        reasons.append(f"drawn at another temperature or truncated (KL {kl:.2g} nats per response)")
    far = figures["difference"].value
    if not far <= DRIFT_LIMIT:
        reasons.append(f"the sampler's log-probs are {far:.2g} nats from the policy's on average")
    if sequence_weights is None and (check := check_weights(weights)).reason:
        reasons.append(f"weights of the sampler's responses: {check.reason}")
    for name, what in (("bias_entropy_per_token", "entropy"), ("bias_reward", "reward")):
        bias = figures.get(name)
        if bias is not None and bias.reliable and bias.resolved:
            reasons.append(f"the sampler shifts the mean {what} by {bias.value:.2g} {bias.unit}")
    return reasons


def _worst(rollouts: Rollouts, known: tuple[BoolArray, ...]) -> tuple[WorstToken, ...]:
    assert rollouts.sampler_logprobs is not None
    places = [
        (float(abs(q[k] - p[k])), i, int(k))
        for i, (p, q, mask) in enumerate(
            zip(rollouts.logprobs, rollouts.sampler_logprobs, known, strict=True)
        )
        for k in np.flatnonzero(mask)
    ]
    places.sort(key=lambda place: (-place[0], *place[1:]))
    return tuple(
        WorstToken(
            sequence_id=i,
            position=k,
            token_id=rollouts.response_token_ids[i][k],
            logprob=float(rollouts.logprobs[i][k]),
            sampler_logprob=float(rollouts.sampler_logprobs[i][k]),
        )
        for _, i, k in places[:NUM_WORST]
    )

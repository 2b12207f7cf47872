"""Per-token criteria of the literature.

Signs are turned so that c > 0 predicts a higher entropy. Where the published use is a mask or a weight, the
score is what decides it. p = pi(y|s), l = log p, H the entropy of the position, A the advantage,
r = pi / pi_old, S = p (l + H), M = sum_v pi_v^2 (log pi_v + H).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stepscope.measure.criteria.facts import Criterion, TokenFacts
from stepscope.results import FloatArray

CLIP_COV_RANGE = (1.0, 5.0)
KL_COV_SHARE = 2e-3
CLIP_B_DEVIATIONS = 2.5
CLIP_V_DEVIATIONS, CLIP_V_SHARE = 8.5, 1e-4
STARE_SHARE = 0.1
TOP_ENTROPY_QUANTILE = 0.8
REWEIGHTING_ALPHA = 0.3
LOPTI_THRESHOLD = 0.5
NSR_POSITIVE_WEIGHT = 0.1
QAE_QUANTILE, QAE_EPSILON = 0.4, 1e-4
CHENG_ALPHA, CHENG_KAPPA = 0.4, 2.0


def _centred(values: FloatArray) -> FloatArray:
    return np.asarray(values - values.mean(), dtype=np.float64)


def _cov_batch(facts: TokenFacts) -> FloatArray:
    return -_centred(facts.advantage) * _centred(facts.logprob)


def _cov_micro(facts: TokenFacts) -> FloatArray:
    group = facts.sequence // facts.micro_batch_size
    count = np.maximum(np.bincount(group), 1)

    def about_mean(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(group, weights=values) / count)[group])

    return -about_mean(facts.advantage) * about_mean(facts.logprob)


def _clip_cov(facts: TokenFacts) -> FloatArray:
    low, high = CLIP_COV_RANGE
    covariance = -_cov_batch(facts)
    chosen = (covariance > low) & (covariance < high) & (facts.clipped == 0)
    return np.asarray(chosen, dtype=np.float64)


def _kl_cov(facts: TokenFacts) -> FloatArray:
    return _largest(-_cov_batch(facts), KL_COV_SHARE)


def _largest(values: FloatArray, share: float) -> FloatArray:
    """1 on the largest max(1, int(share n)) values, ties in the order of the batch."""
    mask = np.zeros(len(values))
    mask[np.argsort(-values, kind="stable")[: max(1, int(share * len(values)))]] = 1.0
    return mask


def _disc_b(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * _centred(facts.discriminant)


def _disc_v(facts: TokenFacts) -> FloatArray:
    return -facts.ratio * facts.advantage * (facts.discriminant - facts.discriminator)


def _clip_b(facts: TokenFacts) -> FloatArray:
    z = _centred(facts.discriminant)
    return np.asarray((facts.advantage < 0) & (z < -CLIP_B_DEVIATIONS * z.std()), dtype=np.float64)


def _clip_v(facts: TokenFacts) -> FloatArray:
    excess = facts.discriminator - facts.discriminant
    chosen = (facts.advantage < 0) & (excess > CLIP_V_DEVIATIONS * excess.std())
    allowed = _largest(np.where(chosen, excess, -np.inf), CLIP_V_SHARE)
    return np.where(chosen, allowed, 0.0)


def _steer_thm(facts: TokenFacts) -> FloatArray:
    kept = 1 - facts.clipped
    return -kept * facts.ratio * facts.advantage * facts.discriminant * facts.missing


def _steer_rel(facts: TokenFacts) -> FloatArray:
    return -facts.advantage / np.exp(facts.old_logprob) * facts.discriminant * facts.missing


def _entrocraft(facts: TokenFacts) -> FloatArray:
    room = facts.missing > 0  # a token of probability 1 cannot move
    return np.where(room, -facts.advantage * facts.surprise / np.where(room, facts.missing, 1.0), 0.0)


def _stare(facts: TokenFacts) -> FloatArray:
    score = np.zeros(len(facts))
    for side in (facts.advantage > 0, facts.advantage < 0):
        if side.any():
            rare = side & (facts.logprob <= np.quantile(facts.logprob[side], STARE_SHARE))
            score[rare] = facts.advantage[rare]
    return score


def _uncertain(facts: TokenFacts) -> FloatArray:
    return (facts.entropy >= np.quantile(facts.entropy, TOP_ENTROPY_QUANTILE)).astype(np.float64)


def _gradient_norm(facts: TokenFacts) -> FloatArray:
    squared = 1 - 2 * facts.probability + facts.collision
    return np.abs(facts.advantage) * np.sqrt(np.maximum(squared, 0.0))  # round-off at p = 1


def _clip_range(facts: TokenFacts) -> FloatArray:
    return facts.clipped * np.sign(facts.advantage)


def _nsr(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * np.where(facts.advantage > 0, NSR_POSITIVE_WEIGHT, 1.0)


def _qae(facts: TokenFacts) -> FloatArray:
    found = np.zeros(len(facts.rewards))
    for prompt in np.unique(facts.prompt):
        members = facts.prompt == prompt
        rewards = facts.rewards[members]
        quantile = np.quantile(rewards, QAE_QUANTILE, method="inverted_cdf")
        found[members] = (rewards - quantile) / (rewards.std() + QAE_EPSILON)
    return -found[facts.sequence]


def _gtpo(facts: TokenFacts) -> FloatArray:
    _, place = np.unique(
        np.stack([facts.prompt[facts.sequence], facts.position]), axis=1, return_inverse=True
    )
    total = np.bincount(place.ravel(), weights=facts.entropy)[place.ravel()]
    return np.divide(facts.entropy, total, out=np.zeros(len(facts)), where=total > 0)


def _signed(
    name: str,
    score: Callable[[TokenFacts], FloatArray],
    formula: str,
    paper: str,
    equation: str,
    *,
    verified: bool = True,
    sign: str = "c > 0: predicted to raise the entropy",
) -> Criterion:
    return Criterion(name, score, formula, sign, paper, equation, verified)


def _magnitude(
    name: str,
    score: Callable[[TokenFacts], FloatArray],
    formula: str,
    paper: str,
    equation: str,
    *,
    verified: bool = True,
    sign: str = "none: 1 where the rule acts",
) -> Criterion:
    return Criterion(name, score, formula, sign, paper, equation, verified, target="magnitude")


TOKENS: tuple[Criterion, ...] = (
    _signed(
        "cov_batch",
        _cov_batch,
        "-(A - mean A)(l - mean l), means over the batch's tokens",
        "2505.22617",
        "Eq. 10",
        sign="c > 0 raises; the paper's covariance is -c",
    ),
    _signed(
        "cov_micro",
        _cov_micro,
        "-(A - mean A)(l - mean l), means over a micro-batch; zero where it holds one sequence",
        "2505.22617",
        "Eq. 10 as in the authors' code and verl PR 1830",
        sign="c > 0 raises; the paper's covariance is -c",
    ),
    _signed(
        "cov_thm1",
        lambda f: -f.advantage * f.discriminant,
        "-A p (l + H)",
        "2505.22617",
        "Theorem 1; 2603.11682 Theorem 1",
        verified=False,
    ),
    _magnitude(
        "clip_cov",
        _clip_cov,
        "1[1 < cov < 5 and not clipped]: the candidates Clip-Cov draws from",
        "2505.22617",
        "Clip-Cov, authors' code",
    ),
    _magnitude(
        "kl_cov", _kl_cov, "1[cov among the largest 0.2 %]", "2505.22617", "KL-Cov, authors' code (7B recipe)"
    ),
    _signed("disc_b", _disc_b, "-A (S - mean S), mean over the batch", "2602.03392", "Clip_B, authors' code"),
    _signed(
        "disc_v",
        _disc_v,
        "-r A (S - M): exact for a tabular softmax policy",
        "2602.03392",
        "Theorem 3.3; Clip_V, authors' code",
    ),
    _magnitude(
        "clip_b",
        _clip_b,
        "1[A < 0 and S - mean S < -2.5 standard deviations]",
        "2602.03392",
        "Clip_B, authors' code",
    ),
    _magnitude(
        "clip_v",
        _clip_v,
        "1[A < 0 and M - S > 8.5 standard deviations], at most 0.01 % of the tokens",
        "2602.03392",
        "Clip_V, authors' code; that their vocabulary mean is M is inferred",
    ),
    _signed(
        "steer_thm",
        _steer_thm,
        "-1[not clipped] r A p (1 - p)(l + H)",
        "2510.10150",
        "Theorem 1 (Eq. 7-8), as a replication implements it",
        sign="c > 0 raises; STEER's weight falls with its size",
    ),
    _signed(
        "steer_rel",
        _steer_rel,
        "-(A / pi_old) p (1 - p)(l + H)",
        "2510.10150",
        "released code, a factor of p off the theorem",
        sign="c > 0 raises; STEER's weight falls with its size",
    ),
    _signed(
        "npg",
        lambda f: -f.advantage * f.surprise,
        "-A (l + H), natural policy gradient",
        "2605.00425",
        "relative surprisal; 2602.09782 regions E1-E4; 2505.22617 Theorem 2 per sample",
        verified=False,
    ),
    _signed(
        "entrocraft",
        _entrocraft,
        "-A (l + H)/(1 - p): Eq. 4 with one logit moving",
        "2604.26326",
        "Eq. 4; the baseline for one moving logit was derived here",
    ),
    _signed(
        "quadrant",
        lambda f: -np.sign(f.advantage) * np.sign(f.surprise),
        "-sign(A) sign(l + H)",
        "2602.09782",
        "regions E1-E4; 2509.20712",
        verified=False,
    ),
    _signed(
        "stare",
        _stare,
        "A on the 10 % rarest tokens of A > 0 and of A < 0, zero elsewhere",
        "2606.19236",
        "authors' code",
        sign="c > 0 raises; the signed version is ours, the paper weighs by 1.1 and 0.9",
    ),
    _signed(
        "repo",
        lambda f: -f.surprise,
        "-(l + H): what REPO adds to the advantage, per unit of beta",
        "2603.11682",
        "A - beta L with L = l + H",
        verified=False,
        sign="c > 0 where REPO raises the advantage",
    ),
    _magnitude(
        "repo_r",
        lambda f: -np.abs(f.advantage) * f.logprob,
        "|A| |l|: what REPO-R adds to the advantage, per unit of zeta",
        "2603.11682",
        "REPO-R, a third party's port",
        sign="none: the size of the correction",
    ),
    _signed(
        "top_ent",
        lambda f: -f.advantage * _uncertain(f),
        "-A 1[H in the batch's top 20 %]",
        "2506.01939",
        "80/20 rule, TRL top_entropy_quantile",
        sign="c > 0 raises; the signed version is ours",
    ),
    _magnitude(
        "top_ent_mask",
        _uncertain,
        "1[H in the batch's top 20 %]",
        "2506.01939",
        "80/20 rule, TRL top_entropy_quantile",
    ),
    _signed(
        "ar",
        lambda f: -f.advantage * (REWEIGHTING_ALPHA * f.probability + 1 - REWEIGHTING_ALPHA),
        "-A (0.3 p + 0.7)",
        "2505.12929",
        "advantage reweighting, authors' code",
        sign="c > 0 raises; the sign is ours",
    ),
    _magnitude(
        "lopti",
        lambda f: (np.exp(f.old_logprob) < LOPTI_THRESHOLD).astype(np.float64),
        "1[pi_old < 0.5]: the tokens updated first",
        "2505.12929",
        "Lopti, authors' code",
    ),
    _magnitude(
        "gradnorm",
        _gradient_norm,
        "|A| sqrt(1 - 2 p + sum_v pi_v^2): norm of the logit gradient",
        "verl OTB",
        "verl's code",
        sign="none: a norm",
    ),
    _signed(
        "clip_lohi",
        _clip_range,
        "+1 where clipped above (A > 0), -1 where clipped below (A < 0); zero on policy",
        "2509.26114",
        "2503.14476",
        sign="c > 0 where clipping took away a push up on an already raised token",
    ),
    _signed(
        "nsr",
        _nsr,
        "-A (0.1 if A > 0 else 1)",
        "2506.01347",
        "W-REINFORCE",
        verified=False,
    ),
    _signed(
        "qae",
        _qae,
        "-(R - Q_0.4 of the group)/(standard deviation + 1e-4)",
        "2509.22611",
        "quantile baseline",
        verified=False,
    ),
    _magnitude(
        "cheng",
        lambda f: np.minimum(CHENG_ALPHA * f.entropy, np.abs(f.advantage) / CHENG_KAPPA),
        "min(0.4 H, |A|/2): what is added to the advantage",
        "2506.14758",
        "entropy-shaped advantage",
        verified=False,
        sign="none: the size of the correction",
    ),
    _magnitude(
        "gtpo",
        _gtpo,
        "H / sum of H over the group's responses at the same position",
        "2508.04349",
        "entropy-weighted reward shares",
        sign="none: a share",
    ),
)
"""In the order of LITERATURE: covariance, discriminators, STEER, natural gradient, masks, weights."""

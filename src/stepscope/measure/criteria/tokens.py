"""Criteria of tokens: those of the literature, then the trivial controls.

Signs are turned so that c > 0 predicts a higher entropy. Where the published use is a mask or a weight, the
score is what decides it. p = pi(y|s), l = log p, H the entropy of the position, A the advantage,
r = pi / pi_old, S = p (l + H), M = sum_v pi_v^2 (log pi_v + H). What trainings act by, too, is in
:mod:`stepscope.rules`.
"""

from __future__ import annotations

import numpy as np

from stepscope.measure.criteria.criterion import control, literature
from stepscope.results import FloatArray
from stepscope.rules import (
    ClipCov,
    DiscriminatorClipping,
    KlCov,
    Reweighting,
    Steer,
    TokenFacts,
    TopEntropy,
    covariance,
)

CLIP_B = DiscriminatorClipping(form="batch", threshold=2.5)
CLIP_V = DiscriminatorClipping(form="vocabulary", threshold=8.5, max_fraction=1e-4)
STARE_SHARE = 0.1
LOPTI_THRESHOLD = 0.5
NSR_POSITIVE_WEIGHT = 0.1
QAE_QUANTILE, QAE_EPSILON = 0.4, 1e-4
CHENG_ALPHA, CHENG_KAPPA = 0.4, 2.0

_COVARIANCE = "c > 0 raises; the paper's covariance is -c"
_STEER = "c > 0 raises; STEER's weight falls with its size"


@literature(
    "-(A - mean A)(l - mean l), means over the batch's tokens", "2505.22617", "Eq. 10", sign=_COVARIANCE
)
def cov_batch(facts: TokenFacts) -> FloatArray:
    return -covariance(facts)


@literature(
    "-(A - mean A)(l - mean l), means over a micro-batch; zero where it holds one sequence",
    "2505.22617",
    "Eq. 10 as in the authors' code and verl PR 1830",
    sign=_COVARIANCE,
)
def cov_micro(facts: TokenFacts) -> FloatArray:
    found = np.empty(len(facts))
    for places, part in facts.micro_batches(facts.micro_batch_size):
        found[places] = -covariance(part)
    return found


@literature("-A p (l + H)", "2505.22617", "Theorem 1; 2603.11682 Theorem 1", verified=False)
def cov_thm1(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * facts.discriminant


@literature(
    "1[1 < cov < 5 and not clipped]: the candidates Clip-Cov draws from",
    "2505.22617",
    "Clip-Cov, authors' code",
    target="magnitude",
)
def clip_cov(facts: TokenFacts) -> FloatArray:
    return ClipCov().candidates(facts).astype(np.float64)


@literature(
    "1[cov among the largest 0.2 %]", "2505.22617", "KL-Cov, authors' code (7B recipe)", target="magnitude"
)
def kl_cov(facts: TokenFacts) -> FloatArray:
    return KlCov().penalised(facts).astype(np.float64)


@literature("-A (S - mean S), mean over the batch", "2602.03392", "Clip_B, authors' code")
def disc_b(facts: TokenFacts) -> FloatArray:
    return facts.advantage * CLIP_B.deviation(facts)


@literature(
    "-r A (S - M): exact for a tabular softmax policy", "2602.03392", "Theorem 3.3; Clip_V, authors' code"
)
def disc_v(facts: TokenFacts) -> FloatArray:
    return facts.ratio * facts.advantage * CLIP_V.deviation(facts)


@literature(
    "1[A < 0 and S - mean S < -2.5 standard deviations]",
    "2602.03392",
    "Clip_B, authors' code",
    target="magnitude",
)
def clip_b(facts: TokenFacts) -> FloatArray:
    return CLIP_B.dropped(facts).astype(np.float64)


@literature(
    "1[A < 0 and M - S > 8.5 standard deviations], at most 0.01 % of the tokens",
    "2602.03392",
    "Clip_V, authors' code; that their vocabulary mean is M is inferred",
    target="magnitude",
)
def clip_v(facts: TokenFacts) -> FloatArray:
    return CLIP_V.dropped(facts, fewest=1).astype(np.float64)


@literature(
    "-1[not clipped] r A p (1 - p)(l + H)",
    "2510.10150",
    "Theorem 1 (Eq. 7-8), as a replication implements it",
    sign=_STEER,
)
def steer_thm(facts: TokenFacts) -> FloatArray:
    return -Steer(form="theorem").change(facts)


@literature(
    "-(A / pi_old) p (1 - p)(l + H)",
    "2510.10150",
    "released code, a factor of p off the theorem",
    sign=_STEER,
)
def steer_rel(facts: TokenFacts) -> FloatArray:
    return -Steer(form="released").change(facts)


@literature(
    "-A (l + H), natural policy gradient",
    "2605.00425",
    "relative surprisal; 2602.09782 regions E1-E4; 2505.22617 Theorem 2 per sample",
    verified=False,
)
def npg(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * facts.surprise


@literature(
    "-A (l + H)/(1 - p): Eq. 4 with one logit moving",
    "2604.26326",
    "Eq. 4; the baseline for one moving logit was derived here",
)
def entrocraft(facts: TokenFacts) -> FloatArray:
    room = facts.missing > 0  # a token of probability 1 cannot move
    return np.where(room, -facts.advantage * facts.surprise / np.where(room, facts.missing, 1.0), 0.0)


@literature("-sign(A) sign(l + H)", "2602.09782", "regions E1-E4; 2509.20712", verified=False)
def quadrant(facts: TokenFacts) -> FloatArray:
    return -np.sign(facts.advantage) * np.sign(facts.surprise)


@literature(
    "A on the 10 % rarest tokens of A > 0 and of A < 0, zero elsewhere",
    "2606.19236",
    "authors' code",
    sign="c > 0 raises; the signed version is ours, the paper weighs by 1.1 and 0.9",
)
def stare(facts: TokenFacts) -> FloatArray:
    score = np.zeros(len(facts))
    for side in (facts.advantage > 0, facts.advantage < 0):
        if side.any():
            rare = side & (facts.logprob <= np.quantile(facts.logprob[side], STARE_SHARE))
            score[rare] = facts.advantage[rare]
    return score


@literature(
    "-(l + H): what REPO adds to the advantage, per unit of beta",
    "2603.11682",
    "A - beta L with L = l + H",
    verified=False,
    sign="c > 0 where REPO raises the advantage",
)
def repo(facts: TokenFacts) -> FloatArray:
    return -facts.surprise


@literature(
    "|A| |l|: what REPO-R adds to the advantage, per unit of zeta",
    "2603.11682",
    "REPO-R, a third party's port",
    target="magnitude",
    sign="none: the size of the correction",
)
def repo_r(facts: TokenFacts) -> FloatArray:
    return -np.abs(facts.advantage) * facts.logprob


@literature(
    "-A 1[H in the batch's top 20 %]",
    "2506.01939",
    "80/20 rule, TRL top_entropy_quantile",
    sign="c > 0 raises; the signed version is ours",
)
def top_ent(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * TopEntropy().kept(facts)


@literature(
    "1[H in the batch's top 20 %]", "2506.01939", "80/20 rule, TRL top_entropy_quantile", target="magnitude"
)
def top_ent_mask(facts: TokenFacts) -> FloatArray:
    return TopEntropy().kept(facts).astype(np.float64)


@literature(
    "-A (0.3 p + 0.7)",
    "2505.12929",
    "advantage reweighting, authors' code",
    sign="c > 0 raises; the sign is ours",
)
def ar(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * Reweighting().factor(facts)


@literature(
    "1[pi_old < 0.5]: the tokens updated first", "2505.12929", "Lopti, authors' code", target="magnitude"
)
def lopti(facts: TokenFacts) -> FloatArray:
    return (np.exp(facts.old_logprob) < LOPTI_THRESHOLD).astype(np.float64)


@literature(
    "|A| sqrt(1 - 2 p + sum_v pi_v^2): norm of the logit gradient",
    "verl OTB",
    "verl's code",
    target="magnitude",
    sign="none: a norm",
)
def gradnorm(facts: TokenFacts) -> FloatArray:
    squared = 1 - 2 * facts.probability + facts.collision
    return np.abs(facts.advantage) * np.sqrt(np.maximum(squared, 0.0))  # round-off at p = 1


@literature(
    "+1 where clipped above (A > 0), -1 where clipped below (A < 0); zero on policy",
    "2509.26114",
    "2503.14476",
    sign="c > 0 where clipping took away a push up on an already raised token",
)
def clip_lohi(facts: TokenFacts) -> FloatArray:
    return np.where(facts.clipped, np.sign(facts.advantage), 0.0)


@literature("-A (0.1 if A > 0 else 1)", "2506.01347", "W-REINFORCE", verified=False)
def nsr(facts: TokenFacts) -> FloatArray:
    return -facts.advantage * np.where(facts.advantage > 0, NSR_POSITIVE_WEIGHT, 1.0)


@literature(
    "-(R - Q_0.4 of the group)/(standard deviation + 1e-4)", "2509.22611", "quantile baseline", verified=False
)
def qae(facts: TokenFacts) -> FloatArray:
    found = np.zeros(len(facts.rewards))
    for prompt in np.unique(facts.prompt):
        members = facts.prompt == prompt
        rewards = facts.rewards[members]
        quantile = np.quantile(rewards, QAE_QUANTILE, method="inverted_cdf")
        found[members] = (rewards - quantile) / (rewards.std() + QAE_EPSILON)
    return -found[facts.sequence]


@literature(
    "min(0.4 H, |A|/2): what is added to the advantage",
    "2506.14758",
    "entropy-shaped advantage",
    target="magnitude",
    verified=False,
    sign="none: the size of the correction",
)
def cheng(facts: TokenFacts) -> FloatArray:
    return np.minimum(CHENG_ALPHA * facts.entropy, np.abs(facts.advantage) / CHENG_KAPPA)


@literature(
    "H / sum of H over the group's responses at the same position",
    "2508.04349",
    "entropy-weighted reward shares",
    target="magnitude",
    sign="none: a share",
)
def gtpo(facts: TokenFacts) -> FloatArray:
    _, place = np.unique(
        np.stack([facts.prompt[facts.sequence], facts.position]), axis=1, return_inverse=True
    )
    total = np.bincount(place.ravel(), weights=facts.entropy)[place.ravel()]
    return np.divide(facts.entropy, total, out=np.zeros(len(facts)), where=total > 0)


control("neg_A", lambda f: -f.advantage, "-A", "signed")
control("logp", lambda f: f.logprob, "l", "signed")
control("neg_H", lambda f: -f.entropy, "-H", "signed")
control("neg_A_logp", lambda f: -f.advantage * f.logprob, "-A l", "signed")
control("neg_A_H", lambda f: -f.advantage * f.entropy, "-A H", "signed")
control("neg_A_missing", lambda f: -f.advantage * f.missing, "-A (1 - p)", "signed")
control("abs_A", lambda f: np.abs(f.advantage), "|A|", "magnitude")
control("abs_A_missing", lambda f: np.abs(f.advantage) * f.missing, "|A| (1 - p)", "magnitude")
control("missing", lambda f: f.missing, "1 - p", "magnitude")
control("entropy", lambda f: f.entropy, "H", "magnitude")
control("position", lambda f: f.position.astype(np.float64), "position in the response", "magnitude")
control("length", lambda f: f.lengths[f.sequence], "length of the response", "magnitude")

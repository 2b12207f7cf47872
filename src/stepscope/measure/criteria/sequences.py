"""Criteria and controls of sequences; every signed token criterion also scores sequences, by its sum.

Mean log-probs and entropies are over the response.
"""

from __future__ import annotations

import numpy as np

from stepscope.measure.criteria.criterion import control, literature
from stepscope.results import FloatArray
from stepscope.rules import TokenFacts

AEM_LAMBDA = 1.0

_COVARIANCE = "c > 0 raises; the paper's covariance is -c"


def _mean_logprob(facts: TokenFacts) -> FloatArray:
    return facts.per_sequence(facts.logprob) / facts.lengths


def _mean_entropy(facts: TokenFacts) -> FloatArray:
    return facts.per_sequence(facts.entropy) / facts.lengths


@literature(
    "-(A - mean A)(mean l - its mean over the batch), l averaged over the response",
    "2505.22617",
    "Fig. 8, response level",
    sign=_COVARIANCE,
    verified=False,
    level="sequence",
)
def seq_cov_batch(facts: TokenFacts) -> FloatArray:
    logprob = _mean_logprob(facts)
    found = -(facts.advantages - facts.advantages.mean()) * (logprob - logprob.mean())
    return np.asarray(found, dtype=np.float64)


@literature(
    "-(A - mean A)(mean l - its mean over the group), l averaged over the response",
    "2505.22617",
    "Fig. 8, group covariance",
    sign=_COVARIANCE,
    verified=False,
    level="sequence",
)
def seq_cov_group(facts: TokenFacts) -> FloatArray:
    logprob = _mean_logprob(facts)
    centred = facts.advantages - facts.per_prompt(facts.advantages)
    return -centred * (logprob - facts.per_prompt(logprob))


@literature(
    "A (-log pi(y|x) - its mean over the group)",
    "2605.00425",
    "relative response surprisal",
    verified=False,
    level="sequence",
)
def aem_surprisal(facts: TokenFacts) -> FloatArray:
    surprisal = -facts.per_sequence(facts.logprob)
    return facts.advantages * (surprisal - facts.per_prompt(surprisal))


@literature(
    "-A exp(-h)/mean exp(-h), h the mean entropy scaled to 0..1 in the group, lambda = 1",
    "2605.00425",
    "practical proxy",
    sign="c > 0 raises; the signed version is ours",
    verified=False,
    level="sequence",
)
def aem_weight(facts: TokenFacts) -> FloatArray:
    entropy = _mean_entropy(facts)
    scaled = np.zeros(len(entropy))
    for prompt in np.unique(facts.prompt):
        members = facts.prompt == prompt
        spread = np.ptp(entropy[members])
        if spread > 0:
            scaled[members] = (entropy[members] - entropy[members].min()) / spread
    weight = np.exp(-AEM_LAMBDA * scaled)
    return -facts.advantages * weight / facts.per_prompt(weight)


control("seq_neg_A", lambda f: -f.advantages, "-A", "signed", "sequence")
control("seq_logp", _mean_logprob, "mean l", "signed", "sequence")
control("seq_neg_H", lambda f: -_mean_entropy(f), "-mean H", "signed", "sequence")
control("seq_neg_A_logp", lambda f: -f.advantages * _mean_logprob(f), "-A mean l", "signed", "sequence")
control("seq_neg_A_H", lambda f: -f.advantages * _mean_entropy(f), "-A mean H", "signed", "sequence")
control("seq_abs_A", lambda f: np.abs(f.advantages), "|A|", "magnitude", "sequence")
control("seq_length", lambda f: f.lengths, "length of the response", "magnitude", "sequence")
control(
    "seq_pass_rate", lambda f: f.per_prompt(f.correct), "pass rate of the prompt", "magnitude", "sequence"
)
control("seq_entropy", _mean_entropy, "mean H", "magnitude", "sequence")

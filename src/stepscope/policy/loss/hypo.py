"""HyPO: DPO on pairs, and the reverse KL divergence to the reference on responses of the policy itself.

Loss = DPO + kl_weight KL(pi | ref). Samples of the divergence are d_k = log pi(y_k|s_k) - log ref(y_k|s_k) on
responses that the policy drew, and its integral over the token is D_k = KL(pi(.|s_k) | ref(.|s_k)). Of the n
sampled responses, k or more to a prompt, the gradient is that of one of

    leave_one_out    (1/n) sum_ik sg(sum_{u>=k} d_iu - b_ik) l_ik
    rao_blackwell    (1/n) sum_ik (D_ik + sg(sum_{u>k} D_iu - b_ik) l_ik)

with sg holding its argument and b_ik the mean of the same sums at position k over the other responses to the
prompt (0 for one that has ended). Both are unbiased for grad KL. KL = E[sum_k d_k], and grad KL =
E[(sum_k d_k) sum_k grad l_k] + E[sum_k grad d_k], whose second part is E[sum_k grad l_k] = 0. Given the
prefix E[grad l_k] = 0, so neither d of earlier tokens nor what other responses give contributes; and d_k,
summed over its token, is grad D_k, d_u of later ones D_u. Own derivation; the second is the gradient of Amini
et al. 2025 (arXiv:2504.10637) with a baseline.

Responses of a prompt with two rewards that differ are a pair; those of a prompt with equal ones,
``kl_group_size`` of them, are samples, which nobody graded. There are as many of these prompts as pairs.

Source: Song et al. 2024 (arXiv:2406.01462), the objective; not 2602.11902, which has the same name. Pinned by
``tests/policy/test_hypo_loss.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepscope.errors import BatchError
from stepscope.policy.loss.base import Loss
from stepscope.policy.loss.batch import LossBatch
from stepscope.policy.loss.preference import DpoParameters, dpo

KlEstimator = Literal["leave_one_out", "rao_blackwell"]


class HypoParameters(DpoParameters):
    """Of ``hypo``, beside DPO's.

    Attributes:
        kl_weight: lambda, of the reverse KL divergence in nats per response.
        kl_group_size: sampled responses to a prompt.
        kl_estimator: of the divergence's gradient.
    """

    kl_weight: float = Field(gt=0)
    kl_group_size: int = Field(ge=2)
    kl_estimator: KlEstimator = "leave_one_out"


def score_factors(values: Tensor, group: Tensor, *, own: bool) -> Tensor:
    """(seq, tok) what the score of each token is multiplied by: the sum ahead less that of the others.

    Args:
        values: (seq, tok) d or D, 0 beyond the end of a response.
        group: (seq,) number of each response's prompt.
        own: the sum begins with the token itself; it does for d, since that is a function of the token.

    Raises:
        BatchError: a prompt has one response alone.
    """
    ahead = values.flip(-1).cumsum(-1).flip(-1)
    if not own:
        ahead = ahead - values
    together = (group[:, None] == group[None, :]).to(values.dtype)
    others = together.sum(-1, keepdim=True) - 1
    if bool((others < 1).any()):
        raise BatchError(
            f"sequence {int((others[:, 0] < 1).nonzero()[0])}: the only response to its prompt, and the "
            f"baseline is "
            "the mean of the others; sample at least two"
        )
    return ahead - (together @ ahead - ahead) / others


def hypo(batch: LossBatch, own: HypoParameters) -> Tensor:
    """DPO on the pairs, plus kl_weight times the mean over samples of sum_k d_k or D_k, with its gradient.

    In log-probs that is the gradient of the scores alone. That of D itself, of weight
    :func:`divergence_weight`, is a component of the step (:mod:`stepscope.measure.step.divergence`).

    Raises:
        BatchError: the batch is not pairs and samples.
        ConfigError: no reference policy, or beta is 0.
    """
    if batch.group is None or batch.rewards is None:
        raise BatchError("the loss hypo needs rewards and prompts of its batch; use token_weights")
    pairs, samples = pairs_and_samples(batch.rewards, batch.group, own.kl_group_size)
    loss = dpo(batch.rows(pairs), own)
    sampled = batch.rows(samples)
    assert sampled.ref_logprobs is not None  # asked for by DPO
    assert sampled.group is not None
    exact = own.kl_estimator == "rao_blackwell"
    if not exact:
        values = (sampled.logprobs.detach() - sampled.ref_logprobs) * sampled.weight
    elif sampled.divergences is not None:
        values = sampled.divergences * sampled.weight
    else:
        raise BatchError(
            "the loss hypo with kl_estimator rao_blackwell needs the divergence at every token of its batch; "
            "pass divergences"
        )
    pull = (score_factors(values, sampled.group, own=not exact) * sampled.weight * sampled.logprobs).sum()
    divergence = values.sum() + pull - pull.detach()
    return loss + own.kl_weight * divergence / len(samples)


def divergence_weight(own: HypoParameters, rewards: Tensor, group: Tensor) -> Tensor:
    """(seq,) -dLoss/dD of every token of a sequence: -kl_weight/n on the n samples, 0 on pairs.

    0 everywhere with ``leave_one_out``, of which the loss is a function of log-probs alone.

    Args:
        own: parameters of the loss.
        rewards: (seq,).
        group: (seq,) number of each sequence's prompt group.

    Raises:
        BatchError: the batch is not pairs and samples.
    """
    found = torch.zeros(len(rewards), dtype=torch.float64)
    if own.kl_estimator == "rao_blackwell":
        _, samples = pairs_and_samples(rewards, group, own.kl_group_size)
        found[samples] = -own.kl_weight / len(samples)
    return found


def pairs_and_samples(rewards: Tensor, group: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the pairs and of the samples, told apart by their rewards.

    Args:
        rewards: (seq,).
        group: (seq,) number of each sequence's prompt group.
        size: samples of a prompt.

    Raises:
        BatchError: a prompt has neither two responses of different rewards nor ``size`` of equal ones, or
            there are not as many of the one kind as of the other.
    """
    pairs: list[Tensor] = []
    samples: list[Tensor] = []
    for number in torch.unique(group):
        rows = torch.nonzero(group == number)[:, 0]
        equal = bool((rewards[rows] == rewards[rows[0]]).all())
        if len(rows) != (size if equal else 2):
            raise BatchError(
                f"update batch: the prompt of sequence {int(rows[0])} has {len(rows)} responses of "
                f"{'equal' if equal else 'different'} rewards, expected a pair with rewards 1 and 0, or "
                f"{size} "
                "samples with equal ones; give the batch that the training left beside the checkpoint"
            )
        (samples if equal else pairs).append(rows)
    if len(pairs) != len(samples):
        raise BatchError(
            f"update batch: {len(pairs)} pairs and samples of {len(samples)} prompts, expected as many of "
            f"both; a "
            "pair needs rewards 1 and 0, samples equal ones"
        )
    return torch.cat(pairs), torch.cat(samples)


LOSSES = (Loss("hypo", hypo, HypoParameters, aggregation="", pairs=True),)

"""Ratios of policies per token or per sequence, what is cut off them, and the sampler's correction."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepscope.policy.loss.batch import LossBatch

Level = Literal["token", "sequence"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def importance_ratio(batch: LossBatch, level: Level) -> Tensor:
    """R per token (seq, tok), or exp of its mean logarithm over each response (seq, 1).

    Source: TRL's ``importance_sampling_level``; the second is GSPO's, Zheng et al. 2025 (arXiv:2507.18071).
    """
    if level == "token":
        return torch.exp(batch.log_ratio)
    weight = batch.weight
    mean = (batch.log_ratio * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.exp(mean)


def clipped_gain(ratio: Tensor, batch: LossBatch, *, delta: float | None = None) -> Tensor:
    """min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).

    Source: Schulman et al. 2017 (arXiv:1707.06347); ``delta``, the two-sided clip: TRL, and INTELLECT-2
    (arXiv:2505.07291).
    """
    inside = ratio.clamp(1 - batch.settings.epsilon_low, 1 + batch.settings.epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return torch.min(bounded * batch.advantages, inside * batch.advantages)


def off_policy_kept(batch: LossBatch, threshold: float) -> Tensor:
    """(seq, tok) 1 where A >= 0, or where the response's mean of l_old - l is at most a threshold, else 0.

    The log-probs of the sampling engine stand for l_old where they are known.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), eq. 9; TRL's ``GRPOTrainer.get_off_policy_mask``.
    """
    old = batch.old_logprobs if batch.sampler_logprobs is None else batch.sampler_logprobs
    weight = batch.weight
    drift = torch.nan_to_num(old - batch.logprobs.detach(), nan=0.0) * weight
    mean = drift.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1.0)
    return ((batch.advantages >= 0) | (mean <= threshold)).to(batch.logprobs.dtype)


def sampler_correction(
    batch: LossBatch, mode: Correction, low: float | None, high: float | None
) -> Tensor | None:
    """pi_old over the sampling engine's probability, cut to a range or 0 outside it; None where not known.

    (seq, tok) per token, or (seq, 1) the product over the response.

    Source: TRL's ``vllm_importance_sampling_mode``; Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training".
    """
    if batch.sampler_logprobs is None:
        return None
    gap = torch.nan_to_num((batch.old_logprobs - batch.sampler_logprobs) * batch.weight, nan=0.0)
    granularity, _, how = mode.partition("_")
    ratio = torch.exp(gap.sum(-1, keepdim=True) if granularity == "sequence" else gap)
    if how == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)

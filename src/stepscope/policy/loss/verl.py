"""The policy losses of verl's registry, per token, under verl's names and with verl's parameters.

``clip_ratio_low`` and ``clip_ratio_high`` are the settings' ``epsilon_low`` and ``epsilon_high``. Source:
verl 0.9.1, ``verl/trainer/ppo/core_algos.py``. Pinned by ``tests/policy/test_verl_losses.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stepscope.errors import ConfigError
from stepscope.policy.loss.base import Loss, LossParameters
from stepscope.policy.loss.batch import LossBatch

PREFIX = "verl:"
"""Begins the names of verl's losses and estimators, some of which TRL has too, with other formulas."""

TINY = 1e-8
"""verl adds it to the length of a response before it divides."""


class DualClip(LossParameters):
    """``clip_ratio_c``: bound of the ratio where A < 0, or of the importance weight of DPPO."""

    clip_ratio_c: float = Field(default=3.0, gt=1)


class Gates(LossParameters):
    """Temperatures of SAPO's gate where A > 0, and elsewhere."""

    tau_pos: float = Field(default=1.0, gt=0)
    tau_neg: float = Field(default=1.05, gt=0)


class ClipCovParameters(LossParameters):
    """Share of the tokens that leave the loss, and the covariances between which they are drawn."""

    clip_cov_ratio: float = Field(default=2e-4, gt=0, le=1)
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0


class KlCovParameters(LossParameters):
    """Share of the tokens that are held back, and the weight of that."""

    kl_cov_ratio: float = Field(default=2e-4, gt=0, le=1)
    ppo_kl_coef: float = Field(default=0.1, ge=0)


class DroParameters(LossParameters):
    """Weight of the quadratic penalty."""

    dro_beta: float = Field(gt=0)


def _bounded_ratio(batch: LossBatch) -> Tensor:
    return torch.exp(batch.log_ratio.clamp(-20, 20))


def _both(batch: LossBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """-r A and -clip(r) A."""
    inside = ratio.clamp(1 - batch.settings.epsilon_low, 1 + batch.settings.epsilon_high)
    return -batch.advantages * ratio, -batch.advantages * inside


def vanilla(batch: LossBatch, own: DualClip) -> Tensor:
    """max(-r A, -clip(r) A), and where A < 0 at most -c A (dual clip, arXiv:1912.09729)."""
    made = torch.maximum(*_both(batch, _bounded_ratio(batch)))
    bounded = torch.min(-batch.advantages * own.clip_ratio_c, made)
    return torch.where(batch.advantages < 0, bounded, made)


def _dppo(batch: LossBatch, own: DualClip, valid: Tensor) -> Tensor:
    weight = _bounded_ratio(batch).clamp(max=own.clip_ratio_c) * valid.to(batch.logprobs.dtype)
    return -batch.advantages * weight.detach() * batch.logprobs


def dppo_tv(batch: LossBatch, own: DualClip) -> Tensor:
    """-min(r, c) A l where p - p_old is within the clip range on the side of A (arXiv:2602.04879)."""
    gap = torch.exp(batch.logprobs) - torch.exp(batch.old_logprobs)
    valid = torch.where(
        batch.advantages > 0, gap <= batch.settings.epsilon_high, gap >= -batch.settings.epsilon_low
    )
    return _dppo(batch, own, valid)


def dppo_kl(batch: LossBatch, own: DualClip) -> Tensor:
    """The same with the KL divergence of the two binary policies "this token or another"."""
    p, old = torch.exp(batch.logprobs), torch.exp(batch.old_logprobs)
    others = torch.log((1.0 - old + TINY) / (1.0 - p + TINY))
    kl = old * (batch.old_logprobs - batch.logprobs) + (1 - old) * others
    high = (kl <= batch.settings.epsilon_high) | (p <= old)
    low = (kl <= batch.settings.epsilon_low) | (p >= old)
    return _dppo(batch, own, torch.where(batch.advantages > 0, high, low))


def gspo(batch: LossBatch, own: LossParameters) -> Tensor:
    """max(-s A, -clip(s) A), s the response's mean ratio in value and of gradient s grad l per token."""
    weight = batch.weight
    mean = (batch.log_ratio * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = batch.logprobs - batch.logprobs.detach() + mean.detach()
    return torch.maximum(*_both(batch, torch.exp(log_ratio.clamp(max=10.0))))


def sapo(batch: LossBatch, own: Gates) -> Tensor:
    """-(4/tau) sigmoid(tau (r - 1)) A (arXiv:2511.20347)."""
    like = batch.logprobs
    tau = torch.where(batch.advantages > 0, like.new_tensor(own.tau_pos), like.new_tensor(own.tau_neg))
    return -torch.sigmoid(tau * (_bounded_ratio(batch) - 1.0)) * (4.0 / tau) * batch.advantages


def gpg(batch: LossBatch, own: LossParameters) -> Tensor:
    """-l A (arXiv:2504.02546)."""
    return -batch.logprobs * batch.advantages


def _covariance(batch: LossBatch) -> Tensor:
    """(A - mean A)(l - mean l), means over the tokens in the loss."""
    weight, now = batch.weight, batch.logprobs.detach()
    count = weight.sum() + TINY
    centred = batch.advantages - (batch.advantages * weight).sum() / count
    return centred * (now - (now * weight).sum() / count)


def clip_cov(batch: LossBatch, own: ClipCovParameters) -> Tensor:
    """PPO's, without max(1, int(ratio N)) tokens drawn among those of a covariance within two bounds."""
    first, second = _both(batch, torch.exp(batch.log_ratio))
    found = _covariance(batch)
    candidates = batch.mask & ~(second > first) & (found < own.clip_cov_ub) & (found > own.clip_cov_lb)
    places = batch.random.permutation(np.flatnonzero(candidates.cpu().numpy()))
    gone = places[: max(int(own.clip_cov_ratio * float(batch.weight.sum())), 1)]
    kept = torch.ones_like(found).flatten()
    kept[torch.from_numpy(gone).to(kept.device)] = 0.0
    return torch.maximum(first, second) * kept.view_as(found)


def kl_cov(batch: LossBatch, own: KlCovParameters) -> Tensor:
    """-r A, and + coefficient |log r| on the max(1, int(ratio N)) tokens of largest covariance."""
    places = torch.nonzero(batch.mask.flatten())[:, 0]
    inside = _covariance(batch).flatten()[places]
    count = min(len(places), max(1, int(len(places) * own.kl_cov_ratio)))
    held = torch.zeros_like(batch.logprobs).flatten()
    held[places[torch.topk(inside, count).indices]] = 1.0
    penalty = own.ppo_kl_coef * batch.log_ratio.abs() * held.view_as(batch.logprobs)
    return -batch.advantages * torch.exp(batch.log_ratio) + penalty


def geo_mean(batch: LossBatch, own: LossParameters) -> Tensor:
    """-A s per response, s = exp(mean of log r), clipped per token on the side of A (arXiv:2507.20673)."""
    weight, side, log_ratio = batch.weight, torch.sign(batch.advantages), batch.log_ratio
    inside = log_ratio.clamp(-batch.settings.epsilon_low, batch.settings.epsilon_high)
    least = side * torch.min(side * log_ratio, side * inside)
    lengths = weight.sum(-1, keepdim=True) + TINY
    ratio = torch.exp((least * weight).sum(-1, keepdim=True) / lengths)
    return -(batch.advantages * weight).sum(-1, keepdim=True) / lengths * ratio


def dro(batch: LossBatch, own: DroParameters) -> Tensor:
    """-(l A - beta/2 (log r)^2) (arXiv:2405.19107)."""
    return -(batch.logprobs * batch.advantages - 0.5 * own.dro_beta * batch.log_ratio.square())


def cispo(batch: LossBatch, own: LossParameters) -> Tensor:
    """-clip(r) A l with no gradient through r (arXiv:2506.13585)."""
    inside = _bounded_ratio(batch).clamp(1 - batch.settings.epsilon_low, 1 + batch.settings.epsilon_high)
    return -inside.detach() * batch.advantages * batch.logprobs


def bypass_mode(batch: LossBatch, own: LossParameters) -> Tensor:
    """Refused: it is one of two others.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "loss_type verl:bypass_mode is the loss that its rollout_correction.loss_type names, of the ratio to "
        "the sampling engine: give loss.loss_type=verl:vanilla (ppo_clip), with the engine's log-probs as "
        "the batch's old ones"
    )


LOSSES = (
    Loss(PREFIX + "vanilla", vanilla, DualClip),
    Loss(PREFIX + "dppo_tv", dppo_tv, DualClip),
    Loss(PREFIX + "dppo_kl", dppo_kl, DualClip),
    Loss(PREFIX + "gspo", gspo),
    Loss(PREFIX + "sapo", sapo, Gates, "seq-mean-token-mean", own_average=True),
    Loss(PREFIX + "gpg", gpg),
    Loss(PREFIX + "clip_cov", clip_cov, ClipCovParameters, per_piece=True),
    Loss(PREFIX + "kl_cov", kl_cov, KlCovParameters, per_piece=True),
    Loss(PREFIX + "geo_mean", geo_mean, aggregation="seq-mean-token-mean", own_average=True),
    Loss(PREFIX + "dro", dro, DroParameters),
    Loss(PREFIX + "cispo", cispo),
    Loss(PREFIX + "bypass_mode", bypass_mode),
)

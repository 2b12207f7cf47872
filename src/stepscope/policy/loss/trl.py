"""The losses of TRL's GRPOTrainer and RLOOTrainer, per token and on or off policy.

Parameters have TRL's names. Source: TRL 1.16, ``GRPOTrainer._compute_loss``, ``RLOOTrainer._compute_loss``.
Pinned by ``tests/policy/test_trl_losses.py``, which runs TRL's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from stepscope.policy.loss.base import Loss, LossParameters
from stepscope.policy.loss.batch import LossBatch
from stepscope.policy.loss.ratio import (
    Correction,
    Level,
    clipped_gain,
    importance_ratio,
    off_policy_kept,
    sampler_correction,
)

LEAST = math.log(1e-8)
"""Smallest logarithm of a sequence's ratio that VESPO's weight is taken at."""


class TrlParameters(LossParameters):
    """Of all of TRL's losses.

    Attributes:
        importance_sampling_level: ratios per ``token`` or per ``sequence`` (GSPO).
        off_policy_mask_threshold: mean of l_old - l above which responses with A < 0 leave the loss, nats.
        vllm_importance_sampling_mode: how the sampling engine's log-probs correct the loss where they are
            known; None for not at all.
        vllm_importance_sampling_clip_max: upper end of that correction.
        vllm_importance_sampling_clip_min: lower end of it.
    """

    importance_sampling_level: Level = "token"
    off_policy_mask_threshold: float | None = None
    vllm_importance_sampling_mode: Correction | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None

    def correction(self, batch: LossBatch) -> Tensor | None:
        """The factor that corrects for the sampling engine; None without one."""
        if self.vllm_importance_sampling_mode is None:
            return None
        return sampler_correction(
            batch,
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )


class ClippedParameters(TrlParameters):
    """Of the losses with PPO's clipping.

    Attributes:
        delta: upper bound of the unclipped ratio (two-sided clipping), or None.
    """

    delta: float | None = None


class SapoParameters(TrlParameters):
    """Of SAPO: the temperatures of its gate where A > 0, and elsewhere."""

    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    sapo_temperature_neg: float = Field(default=1.05, gt=0)


class VespoParameters(TrlParameters):
    """Of VESPO: k and lambda of phi(w) = e^lambda w^k e^(-lambda w) where A >= 0, and where A < 0."""

    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0


def clipped(batch: LossBatch, own: ClippedParameters) -> Tensor:
    """-min(min(r, delta) A, clip(r) A): grpo, bnpo, dapo, dr_grpo, luspo, which differ in their averages."""
    ratio = importance_ratio(batch, own.importance_sampling_level)
    return -clipped_gain(ratio, batch, delta=own.delta)


def cispo(batch: LossBatch, own: TrlParameters) -> Tensor:
    """-min(r, epsilon_high) A l, no gradient through r (MiniMax-M1, arXiv:2506.13585)."""
    ratio = importance_ratio(batch, own.importance_sampling_level)
    return -ratio.clamp(max=batch.settings.epsilon_high).detach() * batch.advantages * batch.logprobs


def sapo(batch: LossBatch, own: SapoParameters) -> Tensor:
    """-(4/tau) sigmoid(tau (r - 1)) A (Soft Adaptive Policy Optimization, arXiv:2511.20347)."""
    high, low = own.sapo_temperature_pos, own.sapo_temperature_neg
    tau = torch.where(batch.advantages > 0, high, low)  # in float32, as TRL has it whatever the model's type
    ratio = importance_ratio(batch, own.importance_sampling_level)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * batch.advantages


def vespo(batch: LossBatch, own: VespoParameters) -> Tensor:
    """-phi(w) A l with no gradient through w, the product of a response's ratios (arXiv:2602.10693)."""
    with torch.no_grad():
        log_w = (batch.log_ratio.clamp(-20, 20) * batch.weight).sum(-1, keepdim=True)
        correction = own.correction(batch)
        if correction is not None:
            log_w = log_w + torch.log(correction).clamp(LEAST, 20).sum(-1, keepdim=True)
        log_w = log_w.clamp(LEAST, 20)
        kept = batch.advantages >= 0
        k = torch.where(kept, own.vespo_k_pos, own.vespo_k_neg).to(log_w.dtype)
        decay = torch.where(kept, own.vespo_lambda_pos, own.vespo_lambda_neg).to(log_w.dtype).clamp(min=1e-4)
        phi = torch.exp(decay + k * log_w - decay * torch.exp(log_w))
        phi = phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return -phi * batch.advantages * batch.logprobs


def rloo(batch: LossBatch, own: LossParameters) -> Tensor:
    """-min(r A, clip(r) A) of r, the product of a response's ratios (arXiv:2402.14740)."""
    ratio = torch.exp((batch.log_ratio * batch.weight).sum(-1, keepdim=True))
    return -clipped_gain(ratio, batch)


def _corrected(
    of: Callable[[LossBatch, TrlParameters], Tensor], *, inside: bool = False
) -> Callable[..., Tensor]:
    """A loss with what TRL multiplies it by; ``inside`` where the sampler's correction is its own part."""

    def function(batch: LossBatch, own: TrlParameters) -> Tensor:
        made = of(batch, own)
        if own.off_policy_mask_threshold is not None:
            made = made * off_policy_kept(batch, own.off_policy_mask_threshold)
        factor = None if inside else own.correction(batch)
        return made if factor is None else made * factor

    return function


def _trl(name: str, of: Callable[..., Tensor], kind: type[TrlParameters], aggregation: str) -> Loss:
    return Loss(name, _corrected(of, inside=of is vespo), kind, aggregation, ratio_on_kl=True)


LOSSES = (
    _trl("grpo", clipped, ClippedParameters, "seq-mean-token-mean"),
    _trl("dr_grpo", clipped, ClippedParameters, "seq-mean-token-sum-norm"),
    _trl("bnpo", clipped, ClippedParameters, "piece-token-mean"),
    _trl("dapo", clipped, ClippedParameters, "token-mean"),
    _trl("luspo", clipped, ClippedParameters, "seq-mean-token-sum"),
    _trl("cispo", cispo, TrlParameters, "token-mean"),
    _trl("sapo", sapo, SapoParameters, "seq-mean-token-mean"),
    _trl("vespo", vespo, VespoParameters, "token-mean"),
    Loss("rloo", rloo, aggregation="seq-mean-token-mean", own_average=True),
)

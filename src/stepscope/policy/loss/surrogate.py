"""The one objective: TRL's policy losses as a function of the log-probs of the response tokens.

A loss that reaches the parameters only through the response tokens' log-probs is described by its token
weights w_ik = -dLoss/dl_ik: then -grad Loss = sum_ik w_ik grad l_ik, whatever the loss type.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import BatchError, ConfigError, MeasurementError
from stepscope.policy.loss.settings import StepSettings
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.rules import Tokens, token_advantages

LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "luspo", "sapo", "vespo")
"""Losses that :func:`policy_loss` knows, under TRL's names."""

ON_POLICY_ONLY = ("sapo", "vespo")
"""Those whose ratio is shaped by parameters of their own, which have no part in the gradient at ratio 1."""

SCALINGS = ("none", "group", "batch")
"""Ways to scale advantages, under TRL's names."""

STD_EPSILON = 1e-4
"""TRL divides by the standard deviation plus this."""


def advantages(rewards: FloatArray, prompt_index: IntArray, scale: str) -> FloatArray:
    """Advantages of GRPO: A_i = r_i - mean of the rewards of its group, optionally scaled.

    ``none`` leaves A as it is (Dr. GRPO), ``group`` divides by the group's standard deviation + 1e-4,
    ``batch`` by that of the whole batch + 1e-4 (both with Bessel's correction). In a group whose rewards are
    all equal the advantages are exactly zero.

    Args:
        rewards: (seq,) total rewards.
        prompt_index: (seq,) equal numbers form a group; groups may differ in size.
        scale: ``none``, ``group`` or ``batch``.

    Returns:
        (seq,) advantages.

    Raises:
        BatchError: a reward is not finite.
        ConfigError: ``scale`` is unknown.

    Source: TRL's ``GRPOTrainer._generate_and_score_completions``; Shao et al. 2024 (arXiv:2402.03300), Liu et
    al. 2025 (arXiv:2503.20783). Pinned by ``tests/policy/test_objective.py``.
    """
    if scale not in SCALINGS:
        raise ConfigError(
            f"scale_rewards: got {scale!r}, expected one of {', '.join(SCALINGS)}; use one of these"
        )
    rewards = np.asarray(rewards, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(rewards))
    if len(broken):
        raise BatchError(
            f"sequence {broken[0]}: reward is {rewards[broken[0]]}, expected a finite number; mend the "
            "task's score"
        )
    result = np.zeros_like(rewards)
    for group in np.unique(prompt_index):
        members = prompt_index == group
        values = rewards[members]
        if np.ptp(values) == 0:
            continue
        centred = values - values.mean()
        result[members] = centred / (values.std(ddof=1) + STD_EPSILON) if scale == "group" else centred
    if scale == "batch" and len(rewards) > 1:
        result = result / (rewards.std(ddof=1) + STD_EPSILON)
    return result


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    settings: StepSettings,
    ref_logprobs: Tensor | None = None,
) -> Tensor:
    """The scalar loss TRL's GRPOTrainer would compute on this batch as one micro-batch.

    Per token, with ratio r = exp(l - l_old), advantage A and KL weight beta,

        loss_ik = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta q (exp(d) - d - 1)
        d = l_ref - l,  q = r with ``bias_correction_kl`` and 1 without,

    averaged over tokens as the loss type says: ``grpo`` mean over sequences of the mean over their tokens;
    ``dr_grpo`` sum over (number of sequences x max_response_tokens); ``bnpo`` and ``dapo`` sum over the
    number of tokens (the two differ in TRL only when a step is cut into micro-batches: bnpo divides by the
    tokens of each, dapo by those of all); ``luspo`` mean over sequences of the sum over their tokens.

    ``cispo`` has -min(r, epsilon_high) A l with no gradient through r, averaged as ``dapo``. On policy, at
    r = 1, TRL's ``sapo`` and ``vespo`` have the gradients (not the values) of ``grpo`` and ``dapo``; so have
    ratios per sequence (GSPO) those of ratios per token, and an upper bound ``delta`` > 1 of the ratio none
    of its own.

    Args:
        logprobs: (seq, tok) l of the policy, differentiated.
        old_logprobs: (seq, tok) l of the policy that sampled; ``logprobs.detach()`` when on-policy.
        advantages: (seq,) or (seq, tok).
        mask: (seq, tok) True on response tokens that the policy wrote; rows of False for sequences taken out
            of the loss.
        settings: loss type, clip range, KL weight.
        ref_logprobs: (seq, tok) l of the reference policy; needed when ``settings.beta`` is not zero.

    Raises:
        ConfigError: the loss type is unknown, or beta is set and there are no reference log-probs.
        MeasurementError: a loss that is known on policy only, off policy.

    Source: TRL's ``GRPOTrainer._compute_loss``; k3 estimator: Schulman 2020, "Approximating KL divergence".
    """
    if settings.loss_type not in LOSS_TYPES:
        raise ConfigError(
            f"loss_type: got {settings.loss_type!r}, expected one of {', '.join(LOSS_TYPES)}; other "
            "losses cannot be measured"
        )
    shaped = settings.on_policy_only or settings.loss_type in ON_POLICY_ONLY
    if shaped and not torch.equal(logprobs, old_logprobs):
        raise MeasurementError(
            f"loss_type: this loss ({settings.loss_type}) is known on policy only, and the batch was sampled "
            "by another policy; measure the first step on a batch"
        )
    per_seq = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    weight = mask.to(logprobs.dtype)
    ratio = torch.exp(logprobs - old_logprobs)
    if settings.loss_type == "cispo":
        per_token = -ratio.clamp(max=settings.epsilon_high).detach() * per_seq * logprobs
    else:
        clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
        per_token = -torch.min(ratio * per_seq, clipped * per_seq)
    if settings.beta != 0.0:
        if ref_logprobs is None:
            raise ConfigError(
                f"beta = {settings.beta}: the KL penalty needs the reference policy's log-probs, got "
                "none; pass ref_logprobs"
            )
        gap = ref_logprobs - logprobs
        penalty = torch.exp(gap) - gap - 1
        per_token = per_token + settings.beta * (penalty * ratio if settings.bias_correction_kl else penalty)
    per_token = per_token * weight
    if settings.loss_type in ("grpo", "sapo"):
        return (per_token.sum(-1) / weight.sum(-1).clamp(min=1.0)).mean()
    if settings.loss_type == "dr_grpo":
        return per_token.sum() / (per_token.shape[0] * settings.max_response_tokens)
    if settings.loss_type == "luspo":
        return per_token.sum(-1).mean()
    return per_token.sum() / weight.sum().clamp(min=1.0)


def token_weights(
    rollouts: Rollouts,
    settings: StepSettings,
    *,
    logprobs: Sequence[FloatArray] | None = None,
    entropies: Sequence[FloatArray] | None = None,
    discriminators: Sequence[FloatArray] | None = None,
    influences: tuple[Sequence[FloatArray], Sequence[FloatArray]] | None = None,
    ref_logprobs: Sequence[FloatArray] | None = None,
    step: int = 0,
) -> tuple[FloatArray, ...]:
    """Token weights w_ik = -dLoss/dl_ik, by differentiating the loss with the log-probs as leaves.

    The advantages are those of the settings' objective, where there is one. A mean entropy is no function of
    the log-probs and has no part in the weights: see :func:`entropy_weights`.

    Args:
        rollouts: the update batch, with advantages; its ``logprobs`` are those of the policy that sampled.
        settings: the loss.
        logprobs: log-probs of the policy now, where it is not the one that sampled (off-policy).
        entropies: its entropies, then needed by an objective.
        discriminators: sum_v pi_v^2 (log pi_v + H_k) per token, where the objective needs it.
        influences: of every token on entropy and on reward, where the objective needs them.
        ref_logprobs: log-probs of the reference policy; needed when ``settings.beta`` is not zero.
        step: optimizer steps taken so far; it seeds an objective that draws tokens at random.

    Returns:
        One (tok,) array per sequence; per unit of log-prob.

    Raises:
        BatchError: the batch has no advantages, or all of them are zero and nothing else drives the loss.
        ConfigError, MeasurementError: see :func:`policy_loss`.
    """
    if rollouts.advantages is None:
        raise BatchError(
            "update batch: it has no advantages; sample it with group_size of at least 2, or set advantages"
        )
    given = (rollouts.advantages,) if rollouts.token_advantages is None else rollouts.token_advantages
    if settings.beta == 0.0 and not any(np.any(row) for row in given):
        raise BatchError(
            f"update batch: all {len(rollouts)} advantages are zero (no reward variance in any of "
            f"{rollouts.num_prompts} prompt groups), so there is no gradient; use more prompts, a larger "
            "group, a task the policy solves sometimes, or resample groups (SamplingOptions(resample=10))"
        )
    mask = _mask(rollouts, settings)
    old = _pad(rollouts.logprobs)
    now = old if logprobs is None else _pad(logprobs)
    inside = mask.numpy()[rollouts.places]

    def in_loss(values: Sequence[FloatArray]) -> FloatArray:
        return np.asarray(rollouts.flat(values)[inside], dtype=np.float64)

    tokens = Tokens(
        sequence=rollouts.places[0][inside],
        logprob=in_loss(rollouts.logprobs if logprobs is None else logprobs),
        old_logprob=in_loss(rollouts.logprobs),
        entropy=in_loss(rollouts.entropies if entropies is None else entropies),
        advantages=np.asarray(rollouts.advantages, dtype=np.float64),
        token_advantages=None if rollouts.token_advantages is None else in_loss(rollouts.token_advantages),
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        discriminator=None if discriminators is None else in_loss(discriminators),
        entropy_influence=None if influences is None else in_loss(influences[0]),
        reward_influence=None if influences is None else in_loss(influences[1]),
    )
    shaped = torch.zeros_like(old)
    shaped[mask] = torch.from_numpy(_shaped_advantages(tokens, settings, step))
    leaves = now.clone().requires_grad_(True)
    loss = policy_loss(
        leaves,
        old,
        shaped,
        mask,
        settings,
        None if ref_logprobs is None else _pad(ref_logprobs),
    )
    (grad,) = torch.autograd.grad(loss, leaves)
    weights = (-grad).numpy()
    return tuple(weights[i, :n].copy() for i, n in enumerate(rollouts.num_tokens))


def entropy_weights(rollouts: Rollouts, settings: StepSettings) -> tuple[FloatArray, ...]:
    """Weights -dLoss/dH_ik of an objective that rewards entropy: its weight / N on the N tokens in the loss.

    Returns:
        One (tok,) array per sequence; nothing where the next step's loss does not hold the entropy.

    Raises:
        MeasurementError: see :func:`refuse_cut_component`.
    """
    refuse_cut_component(settings)
    if not adds_component(settings):
        return ()
    assert settings.objective is not None
    mask = _mask(rollouts, settings).double().numpy()
    each = settings.objective.entropy_weight / max(mask.sum(), 1.0)
    return tuple(each * mask[i, :n] for i, n in enumerate(rollouts.num_tokens))


def adds_component(settings: StepSettings) -> bool:
    """Whether the objective adds a component to the next step that belongs to no sequence."""
    return settings.objective is not None and settings.objective.entropy_weight != 0.0


def refuse_cut_component(settings: StepSettings) -> None:
    """Refuse a component whose value depends on how a batch was cut.

    Raises:
        MeasurementError: TRL took the mean entropy of each micro-batch, not of the batch.
    """
    objective = settings.objective
    if objective is not None and adds_component(settings) and objective.micro_batch_size is not None:
        raise MeasurementError(
            f"the entropy bonus is a mean over micro-batches of {objective.micro_batch_size} sequences, so "
            "the step depends on how the batch was cut; train with rl.micro_batch_size the whole batch"
        )


def _shaped_advantages(tokens: Tokens, settings: StepSettings, step: int) -> FloatArray:
    """(tok,) advantages. Micro-batches are cut from the batch in random order, as TRL cuts them."""
    if settings.objective is None:
        return tokens.advantage
    order = None
    if settings.objective.micro_batch_size is not None:
        order = np.random.default_rng([settings.seed, step, 1]).permutation(len(tokens.advantages))
    return token_advantages(settings.objective, tokens, seed=settings.seed, step=step, order=order)


def _mask(rollouts: Rollouts, settings: StepSettings) -> Tensor:
    """(seq, tok) tokens in the loss: those that the policy wrote, of sequences that are not left out."""
    found = torch.zeros(len(rollouts), int(rollouts.num_tokens.max()), dtype=torch.bool)
    found[rollouts.places] = True
    if settings.mask_truncated:
        found[torch.from_numpy(rollouts.truncated)] = False
    return found


def _pad(values: Sequence[FloatArray]) -> Tensor:
    padded = np.zeros((len(values), max(len(v) for v in values)))
    for i, row in enumerate(values):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)

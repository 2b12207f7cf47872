"""The one objective: a policy loss as a function of the log-probs of the response tokens, and its derivative.

A loss that reaches the parameters only through the response tokens' log-probs is described by its token
weights w_ik = -dLoss/dl_ik: then -grad Loss = sum_ik w_ik grad l_ik, whatever the loss type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import BatchError, ConfigError
from stepscope.policy.loss.aggregation import AGGREGATIONS, aggregation_weights
from stepscope.policy.loss.base import Loss
from stepscope.policy.loss.batch import Further, LossBatch
from stepscope.policy.loss.hypo import HypoParameters, divergence_weight
from stepscope.policy.loss.kl import ALIASES, KL_PENALTIES, kl_penalty, known_penalty, schulman
from stepscope.policy.loss.ratio import importance_ratio
from stepscope.policy.loss.registry import loss_named
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.trl import TrlParameters
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts
from stepscope.results.tables import TextArray
from stepscope.rules import Tokens, token_advantages
from stepscope.rules.program import Program


def understood(settings: StepSettings) -> None:
    """Refuse settings whose loss is not known here.

    Raises:
        ConfigError: loss, parameters, aggregation or KL penalty are unknown.
    """
    loss = loss_named(settings.loss_type)
    loss.read(settings.loss_parameters)
    name = settings.aggregation
    if name and name not in AGGREGATIONS:
        known = ", ".join(AGGREGATIONS)
        raise ConfigError(f"aggregation: got {name!r}, expected one of {known}; use one of these")
    name = settings.kl_penalty
    if name and not known_penalty(name):
        known = ", ".join([*KL_PENALTIES, *ALIASES])
        raise ConfigError(f"kl_penalty: got {name!r}, expected one of {known}; use one of these")
    if name not in ("", "k3") and loss.ratio_on_kl:
        raise ConfigError(
            f"kl_penalty: got {name!r}, and {loss.name} has k3 alone; leave it out, or name a loss of verl's"
        )


def needs_reference(settings: StepSettings) -> bool:
    """Whether the loss looks at the log-probs of the reference policy."""
    return settings.beta != 0.0 and loss_named(settings.loss_type).reference


def sums_over_vocabulary(settings: StepSettings) -> bool:
    """Whether the loss has the KL divergence at every prefix in it, as a sum over the vocabulary."""
    return settings.loss_type == "hypo" and settings.loss_parameters.get("kl_estimator") == "rao_blackwell"


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    settings: StepSettings,
    ref_logprobs: Tensor | None = None,
    further: Further = Further(),
) -> Tensor:
    """The scalar loss that the run's trainer would compute on this batch.

    With the loss per token of ``settings.loss_type`` (:data:`stepscope.policy.loss.registry.LOSSES`), weights
    W of its aggregation (:mod:`stepscope.policy.loss.aggregation`) and KL weight beta,

        Loss = sum_ik W_ik (loss_ik + beta q k_ik)

    For TRL's losses k = exp(d) - d - 1 with d = l_ref - l, and q the ratio with ``bias_correction_kl`` and 1
    without; for verl's k is ``kl_penalty`` and q = 1.

    Args:
        logprobs: (seq, tok) l of the policy, differentiated.
        old_logprobs: (seq, tok) l of the policy that sampled; ``logprobs.detach()`` when on-policy.
        advantages: (seq,) or (seq, tok).
        mask: (seq, tok) True on response tokens that the policy wrote; rows of False for sequences taken out
            of the loss.
        settings: the loss.
        ref_logprobs: (seq, tok) l of the reference policy; needed when ``settings.beta`` is not zero.
        further: what only some losses look at.

    Raises:
        ConfigError: the loss, its parameters or its aggregation are unknown, or beta is set and there are no
            reference log-probs.

    Source: TRL's ``GRPOTrainer._compute_loss``; verl's ``ppo_loss``. Pinned by
    ``tests/policy/test_trl_losses.py``, ``tests/policy/test_verl_losses.py``.
    """
    understood(settings)
    loss = loss_named(settings.loss_type)
    own = loss.read(settings.loss_parameters)
    batch = LossBatch(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(logprobs),
        mask=mask,
        settings=settings,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=further.sampler_logprobs,
        rewards=further.rewards,
        group=further.group,
        random=further.random or np.random.default_rng(settings.seed),
        divergences=further.divergences,
    )
    if not loss.aggregation:
        return loss.function(batch, own)
    cuts = list(further.pieces) or [torch.arange(len(mask), device=mask.device)]
    if loss.per_piece:
        per_token = torch.zeros_like(logprobs)
        for rows in cuts:
            made = loss.function(batch.rows(rows), own)
            per_token = per_token.index_copy(0, rows, made.expand(-1, logprobs.shape[1]))
    else:
        per_token = loss.function(batch, own)

    def averaged(values: Tensor, name: str) -> Tensor:
        return (aggregation_weights(name, batch.weight, cuts, settings.max_response_tokens) * values).sum()

    chosen = settings.aggregation or loss.aggregation
    total = averaged(per_token, loss.aggregation if loss.own_average else chosen)
    if settings.beta == 0.0:
        return total
    over = settings.aggregation or "token-mean" if loss.own_average else chosen
    return total + settings.beta * averaged(_kl(batch, loss, own, settings), over)


def _kl(batch: LossBatch, loss: Loss, own: object, settings: StepSettings) -> Tensor:
    """(seq, tok) q k of the KL penalty."""
    if batch.ref_logprobs is None:
        raise ConfigError(
            f"beta = {settings.beta}: the KL penalty needs the reference policy's log-probs, got "
            "none; pass ref_logprobs"
        )
    if not loss.ratio_on_kl:
        return kl_penalty(settings.kl_penalty or "k3", batch.logprobs, batch.ref_logprobs)
    penalty = schulman(batch.ref_logprobs - batch.logprobs)
    if not settings.bias_correction_kl:
        return penalty
    assert isinstance(own, TrlParameters)
    return penalty * importance_ratio(batch, own.importance_sampling_level)


def micro_batches(size: int | None, settings: StepSettings, count: int, step: int) -> tuple[Tensor, ...]:
    """Rows of the micro-batches that a batch is cut into, in random order, as TRL cuts them.

    Args:
        size: sequences of one; None, or as many as a step of the run has, for a batch in one piece.
        settings: the run's; its seed and ``step`` decide the order.
        count: sequences of the batch.
        step: optimizer steps taken so far.
    """
    if size is None or size >= settings.group_size * settings.prompts_per_step:
        return (torch.arange(count),)
    order = torch.from_numpy(cut_order(settings, count, step))
    return torch.split(order, size)


def cut_order(settings: StepSettings, count: int, step: int) -> IntArray:
    """(seq,) the sequences of a batch in the order in which micro-batches are cut from it."""
    return np.random.default_rng([settings.seed, step, 1]).permutation(count)


@dataclass(frozen=True)
class Seen:
    """What only some objectives look at of every response token; None where that is not needed.

    Attributes:
        discriminators: sum_v pi_v^2 (log pi_v + H_k).
        influences: on entropy and on reward.
        program: what the batch's sequences do to both together; it is one of the batch and not of tokens.
        texts: what it says (:meth:`stepscope.policy.texts.ResponseText.facts`).
    """

    discriminators: Sequence[FloatArray] | None = None
    influences: tuple[Sequence[FloatArray], Sequence[FloatArray]] | None = None
    texts: Mapping[str, TextArray] | None = None
    program: Program | None = None


def token_weights(
    rollouts: Rollouts,
    settings: StepSettings,
    *,
    logprobs: Sequence[FloatArray] | None = None,
    entropies: Sequence[FloatArray] | None = None,
    seen: Seen = Seen(),
    ref_logprobs: Sequence[FloatArray] | None = None,
    divergences: Sequence[FloatArray] | None = None,
    step: int = 0,
) -> tuple[FloatArray, ...]:
    """Token weights w_ik = -dLoss/dl_ik, by differentiating the loss with the log-probs as leaves.

    The advantages are those of the settings' objective, where there is one. A mean entropy and a sum over the
    vocabulary are no functions of the log-probs and have no part in the weights: see :func:`entropy_weights`,
    :func:`divergence_weights`.

    Args:
        rollouts: the update batch, with advantages; its ``behaviour`` are the log-probs that sampled.
        settings: the loss.
        logprobs: log-probs of the policy now, where it is not the one that sampled (off-policy).
        entropies: its entropies, then needed by an objective.
        seen: what else the objective looks at.
        ref_logprobs: log-probs of the reference policy; needed when ``settings.beta`` is not zero.
        divergences: KL(pi | ref) of the next token; needed where the loss sums over the vocabulary.
        step: optimizer steps taken so far; it seeds what is drawn at random: tokens of an objective or a
            loss, and micro-batches where a loss depends on how the batch was cut.

    Returns:
        One (tok,) array per sequence; per unit of log-prob.

    Raises:
        BatchError: the batch has no advantages, or all of them are zero and nothing else drives the loss.
        ConfigError: see :func:`policy_loss`.
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
    old = _pad(rollouts.behaviour)
    now = _pad(rollouts.logprobs if logprobs is None else logprobs)
    inside = mask.numpy()[rollouts.places]

    def in_loss(values: Sequence[FloatArray]) -> FloatArray:
        return np.asarray(rollouts.flat(values)[inside], dtype=np.float64)

    tokens = Tokens(
        sequence=rollouts.places[0][inside],
        logprob=in_loss(rollouts.logprobs if logprobs is None else logprobs),
        old_logprob=in_loss(rollouts.behaviour),
        entropy=in_loss(rollouts.entropies if entropies is None else entropies),
        advantages=np.asarray(rollouts.advantages, dtype=np.float64),
        token_advantages=None if rollouts.token_advantages is None else in_loss(rollouts.token_advantages),
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        discriminator=None if seen.discriminators is None else in_loss(seen.discriminators),
        entropy_influence=None if seen.influences is None else in_loss(seen.influences[0]),
        reward_influence=None if seen.influences is None else in_loss(seen.influences[1]),
        program=seen.program,
        position=rollouts.places[1][inside],
        **_said(rollouts, seen.texts, inside),
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
        Further(
            sampler_logprobs=None if rollouts.sampler_logprobs is None else _pad(rollouts.sampler_logprobs),
            rewards=torch.from_numpy(np.asarray(rollouts.rewards)),
            group=torch.from_numpy(rollouts.group_index),
            pieces=micro_batches(settings.micro_batch_size, settings, len(rollouts), step),
            random=np.random.default_rng([settings.seed, step]),
            divergences=None if divergences is None else _pad(divergences),
        ),
    )
    (grad,) = torch.autograd.grad(loss, leaves)
    weights = (-grad).numpy()
    return tuple(weights[i, :n].copy() for i, n in enumerate(rollouts.num_tokens))


def entropy_weights(rollouts: Rollouts, settings: StepSettings, *, step: int = 0) -> tuple[FloatArray, ...]:
    """Weights -dLoss/dH_ik of an objective that rewards entropy: its weight over the N tokens in the loss.

    Where the mean was that of each micro-batch, N is the number of its tokens times that of micro-batches.

    Args:
        rollouts: the update batch.
        settings: the loss.
        step: optimizer steps taken so far; it decides the order in which micro-batches are cut.

    Returns:
        One (tok,) array per sequence; nothing where the next step's loss does not hold the entropy.
    """
    if not has_bonus(settings):
        return ()
    assert settings.objective is not None
    weight = _mask(rollouts, settings).double()
    pieces = micro_batches(settings.objective.micro_batch_size, settings, len(rollouts), step)
    each = aggregation_weights("piece-token-mean", weight, pieces, settings.max_response_tokens)
    each = settings.objective.entropy_weight * each
    return tuple(each[i, :n].numpy() for i, n in enumerate(rollouts.num_tokens))


def divergence_weights(rollouts: Rollouts, settings: StepSettings) -> tuple[FloatArray, ...]:
    """Weights -dLoss/dD_ik of a loss that has D = KL(pi | ref) of the next token in it.

    Args:
        rollouts: the update batch, with rewards.
        settings: the loss.

    Returns:
        One (tok,) array per sequence; nothing where the loss sums over no vocabulary.

    Raises:
        BatchError: the batch is none that the loss can be of.
    """
    if not sums_over_vocabulary(settings):
        return ()
    own = loss_named(settings.loss_type).read(settings.loss_parameters)
    assert isinstance(own, HypoParameters)
    rewards, group = torch.from_numpy(np.asarray(rollouts.rewards)), torch.from_numpy(rollouts.group_index)
    each = divergence_weight(own, rewards, group)[:, None] * _mask(rollouts, settings)
    return tuple(each[i, :n].numpy() for i, n in enumerate(rollouts.num_tokens))


def has_bonus(settings: StepSettings) -> bool:
    """Whether the objective rewards entropy."""
    return settings.objective is not None and settings.objective.entropy_weight != 0.0


def adds_component(settings: StepSettings) -> str:
    """What in the loss makes a component of the step that belongs to no sequence; empty for nothing."""
    if has_bonus(settings):
        return "an entropy bonus"
    return "a sum over the vocabulary (kl_estimator rao_blackwell)" if sums_over_vocabulary(settings) else ""


def _shaped_advantages(tokens: Tokens, settings: StepSettings, step: int) -> FloatArray:
    """(tok,) advantages. Micro-batches are cut from the batch in random order, as TRL cuts them."""
    if settings.objective is None:
        return tokens.advantage
    order = None
    if settings.objective.micro_batch_size is not None:
        order = cut_order(settings, len(tokens.advantages), step)
    return token_advantages(settings.objective, tokens, seed=settings.seed, step=step, order=order)


def _said(
    rollouts: Rollouts, texts: Mapping[str, TextArray] | None, inside: BoolArray
) -> dict[str, TextArray]:
    """Those of the facts about all response tokens that are in the loss."""
    if texts is None:
        return {}
    starts = np.concatenate([[0], np.cumsum(rollouts.num_tokens)[:-1]])
    sequence, position = rollouts.places
    return {name: values[starts[sequence] + position][inside] for name, values in texts.items()}


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

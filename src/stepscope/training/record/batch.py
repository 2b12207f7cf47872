"""The batch of a step as a record has it, and the check that it is what the gradient was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy import vectors
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import end_tokens
from stepscope.policy.state import Policy
from stepscope.policy.texts import ResponseText
from stepscope.results import FloatArray, Rollouts
from stepscope.training.record.tap import TrainedSequence
from stepscope.training.watching.capture import as_rollouts
from stepscope.training.watching.state import undisturbed


@dataclass(frozen=True)
class StepBatch:
    """The batch of one optimizer step.

    Attributes:
        rollouts: its sequences.
        token_weights: per sequence (tok,) -dLoss/dl.
        entropy_weights: per sequence (tok,) -dLoss/dH; None for none.
        texts: of every response token.
    """

    rollouts: Rollouts
    token_weights: tuple[FloatArray, ...]
    entropy_weights: tuple[FloatArray, ...] | None
    texts: list[list[str]]


def step_batch(sequences: Sequence[TrainedSequence], policy: Policy) -> StepBatch:
    """The sequences of a step as a batch.

    A prompt's id is that of the task, or a digest of its tokens, so that it is the same in every step.

    Args:
        sequences: of all processes.
        policy: its tokenizer and settings are those of the training.

    Raises:
        MeasurementError: the loss took no log-probs from the model's output.
    """
    ends = end_tokens(policy)
    read = ResponseText(policy.tokenizer, ends)
    settings = policy.settings
    plain = as_rollouts(
        sequences,
        policy.tokenizer,
        read,
        temperature=settings.temperature,
        max_response_tokens=settings.max_response_tokens,
    )
    texts = {ids: read.by_token(ids) for ids in {s.response_ids for s in sequences}}
    known = [s.graded.known for s in sequences]
    masks = [s.mask for s in sequences]
    written = [
        np.ones(len(s.response_ids), dtype=np.bool_) if m is None else m
        for s, m in zip(sequences, masks, strict=True)
    ]
    bonus = [s.entropy_weights for s in sequences]
    rollouts = replace(
        plain,
        prompt_ids=_prompt_ids(sequences),
        questions=None if None in known else tuple(k.question for k in known if k is not None),
        rewards=np.array([s.graded.reward for s in sequences]),
        advantages=np.array([s.graded.advantage for s in sequences]),
        correct=np.array([k is not None and k.correct for k in known], dtype=np.bool_),
        truncated=np.array([s.response_ids[-1] not in ends for s in sequences], dtype=np.bool_),
        logprobs=tuple(s.logprobs * m for s, m in zip(sequences, written, strict=True)),
        entropies=tuple(s.entropies * m for s, m in zip(sequences, written, strict=True)),
        response_masks=None if all(m is None for m in masks) else tuple(written),
        token_advantages=_all_or_none([s.token_advantages for s in sequences]),
        old_logprobs=_all_or_none([s.old_logprobs for s in sequences]),
        sampler_logprobs=_all_or_none([s.sampler_logprobs for s in sequences]),
    )
    return StepBatch(
        rollouts,
        tuple(s.weights for s in sequences),
        _all_or_none(
            [np.zeros(len(s.weights)) if b is None else b for s, b in zip(sequences, bonus, strict=True)]
        )
        if any(b is not None for b in bonus)
        else None,
        [texts[s.response_ids] for s in sequences],
    )


def gradient_error(policy: Policy, batch: StepBatch, clip: float, *, limit: float, budget: Budget) -> float:
    """|g - g'| / |g| of the gradient g that the optimizer gets and g' of the recorded weights.

    g' = -c (sum_ik w_ik grad l_ik + sum_ik e_ik grad H_ik), c the clip coefficient, in one forward and one
    backward pass. The training goes on as if there had been none.

    Args:
        policy: its parameters hold g.
        batch: of the step.
        clip: c.
        limit: largest error that is rounding.
        budget: what may be used at a time.

    Raises:
        MeasurementError: they differ by more than rounding, so that the loss has a part that is not recorded.
    """

    def objective(outputs: TokenOutputs, tokens: TokenBatch) -> Tensor:
        found = tokens.pad(batch.token_weights, outputs.logprobs) * outputs.logprobs
        if batch.entropy_weights is not None:
            found = found + tokens.pad(batch.entropy_weights, outputs.entropies) * outputs.entropies
        return found

    used = {n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None}
    with undisturbed(policy.model):
        made = gradient(policy, batch.rollouts, objective, budget=budget)
    apart = vectors.norm({n: used[n] + clip * made[n].to(used[n].dtype) for n in used})
    norm = vectors.norm(used)
    error = apart / norm if norm > 0 else apart
    if not error <= limit:
        raise MeasurementError(
            f"the recorded token weights give a gradient that is {error:.2g} (relative) away from the one "
            f"in use, expected at most {limit:g}: the loss has a part that does not go through the "
            "log-probs, or the model has dropout; set disable_dropout=True, or leave that part out"
        )
    return error


def _prompt_ids(sequences: Sequence[TrainedSequence]) -> tuple[str, ...]:
    """Ids of the prompts; those of a second group of a prompt get a number."""
    groups: dict[str, list[int]] = {}
    found = []
    for sequence in sequences:
        known, group = sequence.graded.known, sequence.graded.group
        own = known.prompt_id if known is not None else _digest(sequence.prompt_ids)
        of_prompt = groups.setdefault(own, [])
        if group not in of_prompt:
            of_prompt.append(group)
        number = of_prompt.index(group)
        found.append(f"{own}#{number + 1}" if number else own)
    return tuple(found)


def _digest(ids: Sequence[int]) -> str:
    return f"prompt-{hashlib.sha256(' '.join(map(str, ids)).encode()).hexdigest()[:12]}"


def _all_or_none(rows: Sequence[Any]) -> tuple[Any, ...] | None:
    return None if any(row is None for row in rows) else tuple(rows)

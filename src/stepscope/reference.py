"""Exact slow twins: every quantity, gradient and change of a policy small enough to list all its responses.

Written independently of ``measure``: probabilities of whole responses, values from the logits, derivatives by
reverse mode through the listed sum. For tests and documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, TokenOutputs, forward
from stepscope.policy.numerics.attention import mathematical_attention
from stepscope.policy.numerics.differentiation import whole_function
from stepscope.policy.passes import Budget, sweep
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, Rollouts

MOST_RESPONSES = 20_000


Sums = Callable[[TokenOutputs, TokenBatch, Rollouts, nn.Module | None], Tensor]
"""(seq,) sum_k f_k of a micro-batch of an enumeration; last comes the reference model of ``kl``."""


def exact_rollouts(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    reward: Callable[[tuple[int, ...]], float] = lambda response: float(len(response) % 2),
) -> tuple[Rollouts, FloatArray]:
    """Every response of a tiny policy, as a probe batch, with its probability.

    Args:
        policy: its vocabulary and ``settings.max_response_tokens`` must be small.
        prompts: token ids of each prompt.
        eos_id: token that ends a response; longer ones are cut at ``max_response_tokens``.
        reward: of a response's token ids.

    Returns:
        The batch, and (seq,) probabilities of prompt (uniform) and response, which sum to one. They are
        the ``sequence_weights`` with which an estimator becomes an exact expectation.

    Raises:
        MeasurementError: too many responses to list.
    """
    length = policy.settings.max_response_tokens
    vocabulary = int(policy.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    responses = list_responses(vocabulary, length, eos_id)
    if len(responses) * len(prompts) > MOST_RESPONSES:
        raise MeasurementError(
            f"{len(responses)} responses to each of {len(prompts)} prompts is more than {MOST_RESPONSES}; "
            "use a smaller vocabulary or shorter responses"
        )
    rows = [(i, tuple(p), r) for i, p in enumerate(prompts) for r in responses]
    blank = Rollouts(
        prompt_ids=tuple(f"exact/{i}" for i, _, _ in rows),
        prompts=tuple(" ".join(map(str, p)) for _, p, _ in rows),
        responses=tuple(" ".join(map(str, r)) for _, _, r in rows),
        prompt_token_ids=tuple(p for _, p, _ in rows),
        response_token_ids=tuple(r for _, _, r in rows),
        rewards=np.array([reward(r) for _, _, r in rows], dtype=np.float64),
        correct=np.array([reward(r) > 0 for _, _, r in rows]),
        truncated=np.array([r[-1] != eos_id for _, _, r in rows]),
        logprobs=tuple(np.zeros(len(r)) for _, _, r in rows),
        entropies=tuple(np.zeros(len(r)) for _, _, r in rows),
        temperature=policy.settings.temperature,
        max_response_tokens=length,
    )
    logprobs, entropies = score_rollouts(policy, blank, budget=Budget(max_sequences=256))
    rollouts = replace(blank, logprobs=logprobs, entropies=entropies)
    probabilities = np.exp([row.sum() for row in logprobs]) / len(prompts)
    return rollouts, probabilities


def list_responses(vocabulary: int, length: int, eos_id: int) -> list[tuple[int, ...]]:
    """All responses: those that end with ``eos_id`` at or before ``length``, and those cut there."""
    others = [v for v in range(vocabulary) if v != eos_id]
    ended = [(*head, eos_id) for n in range(length) for head in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=length))


def sample_exact(
    rollouts: Rollouts, probabilities: FloatArray, *, num_prompts: int, group_size: int, seed: int
) -> tuple[Rollouts, np.ndarray]:
    """An honest sample from an enumeration: prompts with replacement, then responses by their probability.

    Args:
        rollouts: from :func:`exact_rollouts`.
        probabilities: from :func:`exact_rollouts`.
        num_prompts: prompts drawn; each draw is a cluster of its own.
        group_size: responses drawn to each.
        seed: of the draws.

    Returns:
        The sample, and (seq,) which row of the enumeration each sequence is.
    """
    generator = np.random.default_rng(seed)
    index = rollouts.group_index
    members = [np.flatnonzero(index == p) for p in range(int(index.max()) + 1)]
    drawn = generator.integers(len(members), size=num_prompts)
    rows = np.concatenate(
        [
            generator.choice(
                members[p], size=group_size, p=probabilities[members[p]] / probabilities[members[p]].sum()
            )
            for p in drawn
        ]
    )
    picked = rollouts.select(rows)

    def own(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{name}#{i // group_size}" for i, name in enumerate(names))

    return replace(picked, prompt_ids=own(picked.prompt_ids), prompts=own(picked.prompts)), rows


def _log_pi(outputs: TokenOutputs) -> Tensor:
    assert outputs.logits is not None
    return outputs.logits.log_softmax(-1)


def _entropy(outputs: TokenOutputs, batch: TokenBatch, rollouts: Rollouts, _: nn.Module | None) -> Tensor:
    log_pi = _log_pi(outputs)
    return (-(log_pi.exp() * log_pi).sum(-1) * batch.response_mask).sum(-1)


def _kl(outputs: TokenOutputs, batch: TokenBatch, rollouts: Rollouts, reference: nn.Module | None) -> Tensor:
    if reference is None:
        raise MeasurementError("kl needs a reference model; pass reference=")
    with torch.no_grad():
        other = forward(reference, batch, temperature=rollouts.temperature, keep_logits=True)
    log_pi = _log_pi(outputs)
    return ((log_pi.exp() * (log_pi - _log_pi(other))).sum(-1) * batch.response_mask).sum(-1)


SUMS: Mapping[str, Sums] = {
    "entropy": _entropy,
    "kl": _kl,
    "logprob": lambda outputs, batch, rollouts, _: outputs.logprobs.sum(-1),
    "length": lambda outputs, batch, rollouts, _: batch.response_mask.sum(-1),
    "reward": lambda outputs, batch, rollouts, _: torch.tensor(rollouts.rewards).to(batch.seq_index.device)[
        batch.seq_index
    ],
}
"""The quantities that are known exactly."""


def exact_value(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Sums,
    *,
    normalisation: str = "per_token",
    version: str = "on_policy",
    reference: nn.Module | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """F = sum_y pi(y) sum_k f_k over all responses, differentiable; divided by sum_y pi(y) n per token.

    Args:
        policy: the policy.
        rollouts: its enumeration; gives the probabilities that ``fixed_prefix`` keeps.
        quantity: ``entropy``, ``reward``, ``length``, ``kl`` or ``logprob``; or what gives (seq,) sum_k f_k.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` (probabilities move with params) or ``fixed_prefix`` (they stay).
        reference: reference model of ``kl``.
        params: values to use instead of the model's own.
    """
    if isinstance(quantity, str) and quantity not in SUMS:
        raise MeasurementError(f"no exact twin of quantity {quantity!r}")
    sums = SUMS[quantity] if isinstance(quantity, str) else quantity

    def expectations(batch: TokenBatch) -> tuple[Tensor, Tensor]:
        outputs = forward(
            policy.model, batch, temperature=rollouts.temperature, params=params, keep_logits=True
        )
        if version == "on_policy":
            log_probability = outputs.logprobs.sum(-1)
        else:
            kept = [rollouts.logprobs[i].sum() for i in batch.seq_index.tolist()]
            log_probability = torch.tensor(kept, dtype=policy.dtype, device=policy.device)
        probability = log_probability.exp() / (rollouts.group_index.max() + 1)
        mask = batch.response_mask.to(policy.dtype)
        values = sums(outputs, batch, rollouts, reference).to(policy.dtype)
        return (probability * values).sum(), (probability * mask.sum(-1)).sum()

    parts = [found for _, found in sweep(policy, rollouts, expectations, budget=Budget(max_sequences=4096))]
    total, length = (torch.stack(of).sum() for of in zip(*parts, strict=True))
    return total / length if normalisation == "per_token" else total


def exact_gradient(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Sums,
    *,
    normalisation: str = "per_token",
    version: str = "on_policy",
    reference: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Grad F by reverse mode through the listed sum."""
    with whole_function(policy.model):
        value = exact_value(
            policy, rollouts, quantity, normalisation=normalisation, version=version, reference=reference
        )
    params = policy.parameters
    if not value.requires_grad:
        return {n: torch.zeros_like(p) for n, p in params.items()}
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)
    }


def exact_change(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Sums,
    direction: ParameterVector,
    lr: float,
    *,
    normalisation: str = "per_token",
    version: str = "on_policy",
    reference: nn.Module | None = None,
) -> float:
    """F(params + lr * direction) - F(params)."""
    params = {n: p.detach() for n, p in policy.parameters.items()}
    moved = {n: p + lr * direction[n] if n in direction else p for n, p in params.items()}
    with torch.no_grad():
        before, after = (
            exact_value(
                policy,
                rollouts,
                quantity,
                normalisation=normalisation,
                version=version,
                reference=reference,
                params=values,
            )
            for values in (params, moved)
        )
    return float(after - before)


def exact_derivatives(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Sums,
    direction: ParameterVector,
    *,
    normalisation: str = "per_token",
    version: str = "on_policy",
    reference: nn.Module | None = None,
) -> tuple[float, float]:
    """First and second derivative of F(params + lr * direction) in lr at lr = 0, by reverse mode twice."""
    form = {"normalisation": normalisation, "version": version, "reference": reference}
    first, second = _both_derivatives(policy, rollouts, quantity, [direction], **form)
    return float(first[0]), float(second[0, 0])


def exact_hessian(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Sums,
    directions: Sequence[ParameterVector],
    *,
    normalisation: str = "per_token",
    version: str = "on_policy",
    reference: nn.Module | None = None,
) -> FloatArray:
    """(direction, direction) d_a' (Hess F) d_b by reverse mode twice through the listed sum."""
    form = {"normalisation": normalisation, "version": version, "reference": reference}
    return _both_derivatives(policy, rollouts, quantity, directions, **form)[1]


def _both_derivatives(
    policy: Policy,
    rollouts: Rollouts,
    quantity: str | Sums,
    directions: Sequence[ParameterVector],
    **form: Any,
) -> tuple[FloatArray, FloatArray]:
    """(direction,) first and (direction, direction) second derivatives at the parameters."""
    reach, moved = _moved(policy, directions)
    with mathematical_attention(), whole_function(policy.model):
        value = exact_value(policy, rollouts, quantity, params=moved, **form)
        (first,) = torch.autograd.grad(value, reach, create_graph=True)
        rows = [torch.autograd.grad(slope, reach, retain_graph=True)[0] for slope in first]
    return np.asarray(first.detach().double().cpu()), np.asarray(torch.stack(rows).detach().double().cpu())


def exact_fisher(
    policy: Policy, rollouts: Rollouts, probabilities: FloatArray, directions: Sequence[ParameterVector]
) -> FloatArray:
    """(direction, direction) E[(d_a . grad S)(d_b . grad S)] over all responses, S the log-prob of the whole.

    Args:
        policy: the policy.
        rollouts: its enumeration.
        probabilities: (seq,) of each response.
        directions: by parameter name.
    """
    reach, moved = _moved(policy, directions)

    def pushes(batch: TokenBatch) -> Tensor:
        outputs = forward(policy.model, batch, temperature=rollouts.temperature, params=moved)
        rows = [torch.autograd.grad(total, reach, retain_graph=True)[0] for total in outputs.logprobs.sum(-1)]
        return torch.stack(rows)

    pushed = np.zeros((len(rollouts), len(directions)))
    with mathematical_attention(), whole_function(policy.model):
        for batch, found in sweep(policy, rollouts, pushes, budget=Budget(max_sequences=4096)):
            pushed[batch.seq_index.numpy()] = found.double().numpy()
    return np.asarray((pushed * probabilities[:, None]).T @ pushed)


def _moved(policy: Policy, directions: Sequence[ParameterVector]) -> tuple[Tensor, dict[str, Tensor]]:
    """Coefficients of some directions, at zero, and the parameters moved by them."""
    reach = torch.zeros(len(directions), dtype=policy.dtype, device=policy.device, requires_grad=True)
    moved = {n: p.detach() for n, p in policy.parameters.items()}
    for coefficient, direction in zip(reach, directions, strict=True):
        moved = {n: p + coefficient * direction[n] if n in direction else p for n, p in moved.items()}
    return reach, moved

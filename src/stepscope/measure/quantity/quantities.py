"""Quantities of a policy, and the objective whose gradient estimates the quantity's gradient.

A quantity is F(params) = E_y[sum_k f_k], y sampled from the policy. f_k has two parts: a *prefix value*,
known before token k is drawn (entropy), and a *token value*, known after (reward, on the last token). A
token's choice therefore moves everything that comes after it:

    grad F = E[ sum_k grad f_k + sum_k (R_k - b_k) grad l_k ]
    R_k = sum_{j>k} prefix_j + sum_{j>=k} token_j

The second sum is the visitation term; ``fixed_prefix`` leaves it out. Per token the quantity is F/N with
N = E[response length], whose gradient is that of E[sum_k (f_k - Fbar)]/N with Fbar = F/N and N held fixed;
Fbar counts as a prefix value. (Policy gradient theorem; Rao-Blackwellised KL: Amini et al. 2504.10637.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.checkpoint.adapters import reference_adapter
from stepscope.policy.forward import TokenBatch, TokenOutputs, forward
from stepscope.policy.gradients import Objective
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, IntArray, Rollouts

Normalisation = Literal["per_token", "per_seq"]
Version = Literal["on_policy", "fixed_prefix"]
NORMALISATIONS: tuple[Normalisation, ...] = ("per_token", "per_seq")
VERSIONS: tuple[Version, ...] = ("on_policy", "fixed_prefix")
QUANTITIES = ("entropy", "reward", "length", "kl", "logprob")

INFINITE_KL = 1e6
"""Nats at one position that no finite logits reach; a token excluded by the reference alone exceeds it."""


@dataclass(frozen=True)
class QuantityValues:
    """A quantity's values on a batch at the parameters that sampled it; one (tok,) array per sequence."""

    prefix: tuple[FloatArray, ...]
    token: tuple[FloatArray, ...]

    @property
    def per_seq(self) -> FloatArray:
        """(seq,) sum_k f_k."""
        return np.array([p.sum() + t.sum() for p, t in zip(self.prefix, self.token, strict=True)])


class Quantity(Protocol):
    """What can be measured: one small frozen class per quantity, bound to the batch it is measured on.

    Attributes:
        name: as on the command line.
        unit: of the sum over a response.
        needs_logits: whether the forward pass must keep (seq, tok, vocab) logits.
        normalisations: those for which the quantity is not trivial.
        versions: those for which the quantity is not trivial.
        base: values on the batch at the parameters that sampled it.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def needs_logits(self) -> bool: ...  # noqa: D102
    @property
    def normalisations(self) -> tuple[Normalisation, ...]: ...  # noqa: D102
    @property
    def versions(self) -> tuple[Version, ...]: ...  # noqa: D102
    @property
    def base(self) -> QuantityValues: ...  # noqa: D102

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """(seq, tok) the part of f_k that is a function of the prefix; zero on padding."""
        ...

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """(seq, tok) the part of f_k that is a function of prefix and token; zero on padding."""
        ...


@dataclass(frozen=True)
class Entropy:
    """E[sum_k H_k], H_k the entropy of the next-token distribution: the Rao-Blackwellised -E[log pi(y)]."""

    base: QuantityValues
    name: str = "entropy"
    unit: str = "nats"
    needs_logits: bool = False
    normalisations: tuple[Normalisation, ...] = NORMALISATIONS
    versions: tuple[Version, ...] = VERSIONS

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """H_k."""
        return outputs.entropies

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """Zero."""
        return torch.zeros_like(outputs.logprobs)


@dataclass(frozen=True)
class Reward:
    """E[reward], the reward standing on the last token of the response."""

    base: QuantityValues
    name: str = "reward"
    unit: str = "reward"
    needs_logits: bool = False
    normalisations: tuple[Normalisation, ...] = NORMALISATIONS
    versions: tuple[Version, ...] = ("on_policy",)

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """Zero."""
        return torch.zeros_like(outputs.logprobs)

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """The reward on the last token, zero elsewhere."""
        return batch.pad(self.base.token, outputs.logprobs)


@dataclass(frozen=True)
class Length:
    """E[number of response tokens]: 1 at every position that is reached, a function of the prefix."""

    base: QuantityValues
    name: str = "length"
    unit: str = "tokens"
    needs_logits: bool = False
    normalisations: tuple[Normalisation, ...] = ("per_seq",)
    versions: tuple[Version, ...] = ("on_policy",)

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """One at every position."""
        return batch.response_mask.to(outputs.logprobs.dtype)

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """Zero."""
        return torch.zeros_like(outputs.logprobs)


@dataclass(frozen=True)
class LogProb:
    """E[sum_k l_k]. With ``fixed_prefix``: mean log-prob of the given responses; ``on_policy``: -entropy."""

    base: QuantityValues
    name: str = "logprob"
    unit: str = "nats"
    needs_logits: bool = False
    normalisations: tuple[Normalisation, ...] = NORMALISATIONS
    versions: tuple[Version, ...] = VERSIONS

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """Zero."""
        return torch.zeros_like(outputs.logprobs)

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """l_k."""
        return outputs.logprobs


@dataclass(frozen=True)
class Reference:
    """A frozen policy to compare with: another model, or a PEFT model under its reference adapter or none.

    Attributes:
        model: of the reference.
        temperature: of its distribution.
        switch_adapter: whether ``model`` is the adapted policy itself, see ``reference_adapter``.
    """

    model: nn.Module
    temperature: float
    switch_adapter: bool = False

    def log_distribution(self, batch: TokenBatch) -> Tensor:
        """(seq, tok, vocab) log-probs of every next token, without gradient."""
        switched = reference_adapter(self.model, as_trained=False) if self.switch_adapter else nullcontext()
        with torch.no_grad(), switched:
            outputs = forward(self.model, batch, temperature=self.temperature, keep_logits=True)
        assert outputs.logits is not None
        return torch.log_softmax(outputs.logits, dim=-1)


@dataclass(frozen=True)
class KL:
    """E[sum_k KL(pi(.|s_k) | ref(.|s_k))]: Rao-Blackwellised per position, over the full vocabulary."""

    base: QuantityValues
    reference: Reference
    name: str = "kl"
    unit: str = "nats"
    needs_logits: bool = True
    normalisations: tuple[Normalisation, ...] = NORMALISATIONS
    versions: tuple[Version, ...] = VERSIONS

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """sum_v pi_v (log pi_v - log ref_v)."""
        return _kl(outputs, batch, self.reference)

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """Zero."""
        return torch.zeros_like(outputs.logprobs)


def _kl(outputs: TokenOutputs, batch: TokenBatch, reference: Reference) -> Tensor:
    if outputs.logits is None:
        raise MeasurementError("kl needs logits from the forward pass; call it with keep_logits=True")
    log_pi = torch.log_softmax(outputs.logits, dim=-1)
    log_ref = reference.log_distribution(batch).to(log_pi.dtype)
    divergence = (log_pi.exp() * (log_pi - log_ref)).sum(-1)
    divergence = divergence.masked_fill(~batch.response_mask, 0.0)
    if not bool((divergence < INFINITE_KL).all()):
        row, column = (~(divergence < INFINITE_KL)).nonzero()[0].tolist()
        raise MeasurementError(
            f"kl: infinite before response token {column} of sequence {int(batch.seq_index[row])}, where the "
            "policy gives probability to a token that the reference excludes; take a reference with the same "
            "vocabulary, or measure without kl"
        )
    return divergence


def make_quantity(
    name: str,
    rollouts: Rollouts,
    *,
    policy: Policy | None = None,
    reference: nn.Module | None = None,
    budget: Budget = Budget(),
) -> Quantity:
    """The quantity called ``name``, bound to the batch it will be measured on.

    Args:
        name: ``entropy``, ``reward``, ``length``, ``kl`` or ``logprob``.
        rollouts: the probe batch.
        policy: the policy that sampled it; needed for ``kl`` only.
        reference: the reference model of ``kl``; without one a PEFT policy is compared with TRL's frozen copy
            of the adapter it started from (``ref``), or with its base model where there is none.
        budget: what may be used at a time.

    Raises:
        MeasurementError: unknown name, or ``kl`` without a policy or a reference.
    """
    zeros = tuple(np.zeros(n) for n in rollouts.num_tokens)
    if name == "entropy":
        return Entropy(QuantityValues(rollouts.entropies, zeros))
    if name == "length":
        return Length(QuantityValues(tuple(np.ones(n) for n in rollouts.num_tokens), zeros))
    if name == "logprob":
        return LogProb(QuantityValues(zeros, rollouts.logprobs))
    if name == "reward":
        last = tuple(np.zeros(n) for n in rollouts.num_tokens)
        for values, reward in zip(last, rollouts.rewards, strict=True):
            values[-1] = reward
        return Reward(QuantityValues(zeros, last))
    if name != "kl":
        raise MeasurementError(f"unknown quantity {name!r}; choose from {', '.join(QUANTITIES)}")
    if policy is None:
        raise MeasurementError("kl needs the policy that sampled the batch; pass policy=")
    against = _reference(policy, reference, rollouts.temperature)

    def divergence(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            outputs = forward(policy.model, batch, temperature=rollouts.temperature, keep_logits=True)
            return _kl(outputs, batch, against).double().cpu()

    rows = sweep_rows(policy, rollouts, divergence, budget=budget)
    return KL(QuantityValues(tuple(row.numpy() for row in rows), zeros), against)


def _reference(policy: Policy, reference: nn.Module | None, temperature: float) -> Reference:
    if reference is not None:
        return Reference(reference, temperature)
    if not hasattr(policy.model, "disable_adapter"):
        raise MeasurementError(
            "kl: the policy is a full model, so it has no base model to compare with; give a reference model"
        )
    return Reference(policy.model, temperature, switch_adapter=True)


def why_trivial(quantity: Quantity, normalisation: str, version: str) -> str:
    """Why a combination is constant by definition (reward with fixed prefixes, length per token), or "".

    Raises:
        MeasurementError: no such normalisation or version.
    """
    for kind, chosen, every, supported in (
        ("normalisation", normalisation, NORMALISATIONS, quantity.normalisations),
        ("version", version, VERSIONS, quantity.versions),
    ):
        if chosen not in every:
            raise MeasurementError(f"unknown {kind} {chosen!r}; choose from {', '.join(every)}")
        if chosen not in supported:
            return (
                f"{quantity.name} with {kind} {chosen} is constant by definition; "
                f"choose {' or '.join(supported)}"
            )
    return ""


def unit_of(quantity: Quantity, normalisation: str) -> str:
    """Unit of the quantity in a normalisation, for example ``nats/token``."""
    return f"{quantity.unit}/{'token' if normalisation == 'per_token' else 'sequence'}"


def mean_per_token(
    values: QuantityValues, num_tokens: FloatArray | IntArray, weights: FloatArray | None = None
) -> tuple[float, float]:
    """Fbar = E[sum f]/E[n] and E[n], for sequences weighted equally or by ``weights`` (which sum to one)."""
    lengths = np.asarray(num_tokens, dtype=np.float64)
    share = np.full(len(lengths), 1 / len(lengths)) if weights is None else weights
    mean_length = float(share @ lengths)
    return float(share @ values.per_seq) / mean_length, mean_length


def to_go(
    values: QuantityValues, *, normalisation: str, weights: FloatArray | None = None
) -> tuple[FloatArray, ...]:
    """R_k = sum_{j>k} prefix_j + sum_{j>=k} token_j; per token, Fbar is taken off each prefix value."""
    lengths = np.array([len(p) for p in values.prefix])
    centre = mean_per_token(values, lengths, weights)[0] if normalisation == "per_token" else 0.0
    rows = []
    for prefix, token in zip(values.prefix, values.token, strict=True):
        after = np.append(np.cumsum((prefix - centre)[::-1])[::-1][1:], 0.0)
        rows.append(after + np.cumsum(token[::-1])[::-1])
    return tuple(rows)


def quantity_objective(
    quantity: Quantity,
    rollouts: Rollouts,
    *,
    normalisation: str = "per_token",
    version: str = "on_policy",
    baseline: Sequence[FloatArray] | None = None,
    sequence_weights: FloatArray | None = None,
) -> Objective:
    """The per-sequence surrogate whose gradient, averaged over sequences, estimates grad F.

    Per sequence: sum_k (f_k - Fbar) + sum_k (R_k - b_k) l_k, divided by the mean length per token
    (Fbar = 0 and no division per sequence); ``fixed_prefix`` keeps the first sum only, with Fbar = 0
    because the positions stay. Fbar, mean length, R_k and b_k are constants, taken from ``quantity.base``.
    Only the *derivative* of the surrogate has a meaning.

    Args:
        quantity: bound to ``rollouts``.
        rollouts: the probe batch.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        baseline: b_k per sequence (tok,), see ``measure.quantity.baselines``; None is zero.
        sequence_weights: (seq,) weights that sum to one, where the batch is an enumeration; None is equal.

    Returns:
        An objective of shape (seq,) for ``policy.gradients``; use ``keep_logits=quantity.needs_logits``.

    Raises:
        MeasurementError: the combination is constant by definition.
    """
    trivial = why_trivial(quantity, normalisation, version)
    if trivial:
        raise MeasurementError(trivial)
    per_token = normalisation == "per_token"
    centre, mean_length = mean_per_token(quantity.base, rollouts.num_tokens, sequence_weights)
    divisor = mean_length if per_token else 1.0
    offset = centre if per_token and version == "on_policy" else 0.0
    advantage: tuple[FloatArray, ...] | None = None
    if version == "on_policy":
        advantage = to_go(quantity.base, normalisation=normalisation, weights=sequence_weights)
        if baseline is not None:
            advantage = tuple(r - b for r, b in zip(advantage, baseline, strict=True))

    def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        mask = batch.response_mask.to(outputs.logprobs.dtype)
        values = quantity.prefix_values(outputs, batch) + quantity.token_values(outputs, batch)
        values = values - offset * mask
        if advantage is not None:
            values = values + batch.pad(advantage, outputs.logprobs) * outputs.logprobs
        return values.sum(-1) / divisor

    return objective

"""The last layer as a forward pass knows it: the states before a plain linear head, and what it says of them.

The gradient of a token's log-prob with respect to the head's weight (vocab, hidden) is (e_y - pi) h'/T, that
of the entropy -S h'/T with S_v = pi_v (log pi_v + H): both are there after a forward pass. Distributions are
made for a part of the vocabulary at a time, so that a (tok, vocab) table never is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, base_model, forward, forward_inputs, plain_experts
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.sharding import sharded
from stepscope.policy.state import Policy
from stepscope.results import Brief, Rollouts

CHUNK_BYTES = 64 * 2**20
"""Of the largest table that is made for a part of the vocabulary."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.03}
"""Of 1 + |log-prob|: how far the head as a plain product may be from what the model says."""


class UnknownHeadError(MeasurementError):
    """The model's logits are no plain linear function of its last hidden states."""


@dataclass(frozen=True, repr=False)
class LastLayer(Brief):
    """What the last layer sees and says at the tokens of a batch, those that the policy wrote.

    Attributes:
        weight: (vocab, hidden) W of the head.
        bias: (vocab,) or None.
        hidden: (tok, hidden) h, the state before each token.
        ids: (tok,) y.
        entropies: (tok,) H, nats.
        log_totals: (tok,) log sum_v exp(z_v/T).
        temperature: T.
        parameter: name of W among the trainable parameters; empty where it is not trained.
        bias_parameter: that of the bias, likewise.
        embeds: whether W is also the input embedding. The gradient of the one parameter then has a second
            part, sum_p e_(x_p) delta_p', with delta_p the gradient at the embedded token p: that part takes
            the whole backward pass, and is in none of the figures made from this.
    """

    weight: Tensor
    bias: Tensor | None
    hidden: Tensor
    ids: Tensor
    entropies: Tensor
    log_totals: Tensor
    temperature: float
    parameter: str
    bias_parameter: str
    embeds: bool

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def inputs(self) -> Tensor:
        """(tok, hidden or hidden + 1) what dl/dz is multiplied by: h, and 1 for a bias that is trained."""
        if not self.bias_parameter:
            return self.hidden
        return torch.cat([self.hidden, torch.ones_like(self.hidden[:, :1])], 1)

    def of(self, tokens: slice) -> LastLayer:
        """The same of some of the tokens."""
        own = {name: getattr(self, name)[tokens] for name in ("hidden", "ids", "entropies", "log_totals")}
        return replace(self, **own)

    def logits(self, some: slice) -> Tensor:
        """(tok, some) z/T of a part of the vocabulary."""
        found = self.hidden @ self.weight[some].to(self.hidden).T
        if self.bias is not None:
            found += self.bias[some].to(found)
        return found / self.temperature

    def slices(self, numbers: int = 0) -> Iterator[slice]:
        """Parts of the vocabulary, of a size at which no table is larger than 64 MiB.

        Args:
            numbers: that the largest table has for a word of the vocabulary; at least one for each token.
        """
        vocab = len(self.weight)
        size = max(1, CHUNK_BYTES // (max(len(self), numbers, 1) * self.hidden.element_size()))
        for start in range(0, vocab, size):
            yield slice(start, min(start + size, vocab))

    def chunks(self, numbers: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Part, (tok, some) dl/dz = (e_y - pi)/T and (tok, some) dH/dz = -pi (log pi + H)/T there.

        Args:
            numbers: as in :meth:`slices`.
        """
        for some in self.slices(numbers):
            logs = self.logits(some) - self.log_totals[:, None]
            probs = logs.exp()
            of_entropy = -probs * (logs + self.entropies[:, None]) / self.temperature
            of_logprob = -probs
            inside = ((self.ids >= some.start) & (self.ids < some.stop)).nonzero().squeeze(-1)
            of_logprob[inside, self.ids[inside] - some.start] += 1.0
            yield some, of_logprob / self.temperature, of_entropy


def last_layer(policy: Policy, rollouts: Rollouts, *, budget: Budget = Budget()) -> LastLayer:
    """States before the head and its normalisation at every token: one forward pass, without gradients.

    Args:
        policy: its head has to be a plain linear layer.
        rollouts: the sequences.
        budget: what may be used at a time.

    Raises:
        UnknownHeadError: the head is no ``nn.Linear``, its weight is sharded, or it says something else than
            the model does at some token (soft-capped or scaled logits).
        MeasurementError: the states exceed the budget's memory.
    """
    head = _linear(policy)
    weight: Tensor = head.weight.detach()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wanted = int(rollouts.num_policy_tokens.sum()) * weight.shape[1] * dtype.itemsize
    if wanted > budget.memory_bytes:
        raise MeasurementError(
            f"the states before the head take {wanted / 2**20:.0f} MiB, more than the memory budget of "
            f"{budget.memory_bytes / 2**20:.0f} MiB; raise it, or take fewer sequences"
        )

    def rows(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            out = forward(policy.model, batch, temperature=rollouts.temperature, keep_hidden=True)
        assert out.hidden is not None
        said = torch.stack([out.logprobs, out.entropies], -1).to(dtype)
        return torch.cat([said, out.hidden.to(dtype)], -1).cpu()

    found = sweep_rows(policy, rollouts, rows, budget=budget)
    written = [torch.from_numpy(mask) for mask in rollouts.written]
    flat = torch.cat([row[mask] for row, mask in zip(found, written, strict=True)]).to(policy.device)
    ids = torch.cat(
        [torch.tensor(row)[mask] for row, mask in zip(rollouts.response_token_ids, written, strict=True)]
    ).to(policy.device)
    named = {id(p): name for name, p in policy.parameters.items()}
    embedding = base_model(policy.model).get_input_embeddings()  # type: ignore[operator]
    layer = LastLayer(
        weight=weight,
        bias=None if head.bias is None else head.bias.detach(),
        hidden=flat[:, 2:].contiguous(),
        ids=ids,
        entropies=flat[:, 1],
        log_totals=torch.full((len(ids),), -torch.inf, dtype=dtype, device=policy.device),
        temperature=rollouts.temperature,
        parameter=named.get(id(head.weight), ""),
        bias_parameter=named.get(id(head.bias), "") if head.bias is not None else "",
        embeds=getattr(embedding, "weight", None) is head.weight,
    )
    own = torch.empty_like(layer.log_totals)
    for some in layer.slices():
        logits = layer.logits(some)
        torch.logaddexp(layer.log_totals, logits.logsumexp(-1), out=layer.log_totals)
        inside = ((ids >= some.start) & (ids < some.stop)).nonzero().squeeze(-1)
        own[inside] = logits[inside, ids[inside] - some.start]
    gap = ((own - layer.log_totals - flat[:, 0]).abs() / (1 + flat[:, 0].abs())).max().item()
    if not gap <= _TOLERANCE.get(weight.dtype, 1e-3):
        raise UnknownHeadError(
            f"{type(base_model(policy.model)).__name__}: its head as a plain product of weight and state "
            f"gives log-probs up to {gap:.3g} of their size off the model's (soft-capped or scaled logits); "
            "figures of the last layer are for plain heads"
        )
    return layer


def _linear(policy: Policy) -> nn.Linear:
    """The head of a model."""
    model = base_model(policy.model)
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear) or sharded(policy.model) is not None:
        what = "sharded" if isinstance(head, nn.Linear) else type(head).__name__
        raise UnknownHeadError(
            f"{type(model).__name__}: its head is {what}, expected a plain nn.Linear in one piece; figures "
            "of the last layer are for these"
        )
    return head


def layer_states(policy: Policy, rollouts: Rollouts, *, budget: Budget = Budget()) -> tuple[Tensor, ...]:
    """(tok, hidden) states before each token: after the embedding, and after every block; one forward pass.

    Of the tokens that the policy wrote, on the policy's device. The last is that before the head.

    Args:
        policy: a model that returns its hidden states.
        rollouts: the sequences.
        budget: what may be used at a time.
    """
    model = policy.model

    def rows(batch: TokenBatch) -> Tensor:
        length = batch.response_ids.shape[1]
        inputs = forward_inputs(model, batch, positions=1)
        with torch.no_grad(), matching_precision(model), plain_experts(model):
            states = model(**inputs, output_hidden_states=True).hidden_states
        return torch.stack([state[:, -length - 1 : -1] for state in states], 2).cpu()

    found = sweep_rows(policy, rollouts, rows, budget=budget)
    flat = torch.cat([row[torch.from_numpy(m)] for row, m in zip(found, rollouts.written, strict=True)])
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return tuple(state.to(policy.device, dtype) for state in flat.unbind(1))

"""The one forward pass: log-probs and entropies of response tokens are computed here and nowhere else.

Prompts are padded on the left and responses on the right, so that the response occupies the same columns in
every row and logits of prompt positions are never made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

from stepscope.errors import BatchError, MeasurementError
from stepscope.policy.head import Replay, head_of
from stepscope.policy.numerics.differentiation import differentiable
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.sharding import Replaced, changed, resharded, running, sharded
from stepscope.results import BoolArray, FloatArray

Reading = Callable[[Tensor, slice], Tensor]
"""From (seq, some, vocab) log pi of some response positions, and which these are, to (seq, some) figures.

It is asked for all positions, a few at a time, and may be asked again while gradients are taken."""


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids of some sequences of a batch.

    Attributes:
        input_ids: (seq, pos) prompt (left-padded) followed by response (right-padded).
        attention_mask: (seq, pos) 1 on real tokens.
        position_ids: (seq, pos) position within the unpadded sequence.
        response_ids: (seq, tok) response token ids, padding arbitrary.
        response_mask: (seq, tok) True on response tokens that the policy wrote, the end-of-sequence token
            among them; tokens of a tool or an environment are context, as the prompt is.
        present: (seq, tok) True on all response tokens, False on padding.
        seq_index: (seq,) where each row stands in the whole batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_ids: Tensor
    response_mask: Tensor
    present: Tensor
    seq_index: Tensor

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.input_ids.shape[0])

    def part(self, rank: int, size: int) -> TokenBatch:
        """One of ``size`` parts of a batch, all of one shape.

        Parts of rows are filled up with the first row, as one in which the policy has written nothing.
        """
        count = -(-len(self) // size)
        rows = torch.arange(rank * count, (rank + 1) * count, device=self.input_ids.device)
        real = (rows < len(self)).unsqueeze(-1)
        chosen = TokenBatch(*(getattr(self, f.name)[rows * real.squeeze(-1)] for f in fields(self)))
        return replace(chosen, response_mask=chosen.response_mask & real, present=chosen.present & real)

    def row(self, index: int) -> TokenBatch:
        """One sequence, with the padding that it has here."""
        return TokenBatch(*(getattr(self, own.name)[index : index + 1] for own in fields(self)))

    def unpad(self, values: Tensor) -> tuple[Tensor, ...]:
        """The rows of (seq,) or (seq, tok, ...) values, those of tokens without padding."""
        if values.dim() == 1:
            return values.unbind()
        mask = self.present.to(values.device)
        counts: list[int] = mask.sum(1).tolist()
        return torch.split(values[mask], counts)

    def rows(self, values: Tensor) -> dict[int, Tensor]:
        """The same by sequence of the batch, without rows that only fill a micro-batch up."""
        real = self.present.any(1).tolist()
        found = zip(self.seq_index.tolist(), self.unpad(values), real, strict=True)
        return {i: row for i, row, is_real in found if is_real}

    def pad(self, rows: Sequence[FloatArray], like: Tensor) -> Tensor:
        """(seq, tok) values of these sequences out of the (tok,) rows of the whole batch, zero on padding.

        Args:
            rows: one for each sequence of the whole batch.
            like: (seq, tok) a tensor of the type and device wanted.
        """
        padded = np.zeros(like.shape)
        for own, i in zip(padded, self.seq_index.tolist(), strict=True):
            own[: len(rows[i])] = rows[i]
        return torch.from_numpy(padded).to(like)


@dataclass(frozen=True)
class TokenOutputs:
    """What the policy says at each response position; zero where ``response_mask`` is False.

    Attributes:
        logprobs: (seq, tok) l_k = log pi(y_k|s_k), nats.
        entropies: (seq, tok) H_k = -sum_v pi_v log pi_v, nats; tokens of probability 0 add 0.
        logits: (seq, tok, vocab) logits / temperature; present on request. Where a model excludes tokens by
            a logit of -inf, a finite one (:func:`excluded_logit`) that gives them probability 0 all the same.
        hidden: (seq, tok, hidden) last hidden state before each response token; present on request.
        collisions: (seq, tok) sum_v pi_v^2, the chance that two draws agree; present on request.
        discriminators: (seq, tok) M_k = sum_v pi_v^2 (log pi_v + H_k), the mean over v ~ pi of
            S_v = pi_v (log pi_v + H_k) = -dH_k/dz_v; present on request.
        read: (seq, tok) what each reading that was asked for says, by its key.
    """

    logprobs: Tensor
    entropies: Tensor
    logits: Tensor | None = None
    hidden: Tensor | None = None
    collisions: Tensor | None = None
    discriminators: Tensor | None = None
    read: Mapping[Hashable, Tensor] = field(default_factory=dict)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself: what a PEFT wrapper wraps, or the model as it is."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def vocabulary_size(model: nn.Module) -> int:
    """Token ids that the model's embedding knows."""
    embedding: Any = base_model(model).get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def forward_inputs(model: nn.Module, batch: TokenBatch, *, positions: int) -> dict[str, object]:
    """Arguments of a model's forward pass on a batch.

    Args:
        model: causal language model.
        batch: padded sequences.
        positions: how many of the last positions need logits.

    Raises:
        MeasurementError: the model cannot be told the positions of padded sequences, nor finds them itself.
    """
    inputs: dict[str, object] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    accepted = inspect.signature(base_model(model).forward).parameters
    if "position_ids" in accepted:
        inputs["position_ids"] = batch.position_ids
    elif not _finds_positions(model):
        raise MeasurementError(
            f"{type(base_model(model)).__name__}: its forward takes no position_ids and what it says of a "
            "sequence changes with padding; measure a model with explicit positions (Llama, Qwen, GPT-2, ...)"
        )
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = positions
    return inputs


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """A block in which mixtures of experts loop over their experts and return no router logits.

    The loop has derivatives of every order in both modes, which ``grouped_mm`` does not; router logits break
    generation. The config is as before afterwards, also that of a model in training.
    """
    own = getattr(base_model(model), "config", None)
    known = (own, own.get_text_config()) if isinstance(own, PreTrainedConfig) else ()
    configs = list({id(config): config for config in known}.values())
    kept = [(c, c._experts_implementation, getattr(c, "output_router_logits", None)) for c in configs]
    try:
        for config, _, routed in kept:
            config._experts_implementation = "eager"
            if routed:
                config.output_router_logits = False
        yield
    finally:
        for config, experts, routed in kept:
            config._experts_implementation = experts
            if routed:
                config.output_router_logits = routed


_ROUND_OFF = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the spread of a model's logits: how far round-off may move one, if it is no half type."""

_positions_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _finds_positions(model: nn.Module) -> bool:
    """Whether a model without ``position_ids`` (Bloom, MPT) says the same of a row whatever its padding."""
    if model not in _positions_found:
        device = next(model.parameters()).device
        row = torch.arange(1, 6, device=device)[None]
        alone = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        padded = {name: nn.functional.pad(value, (3, 0)) for name, value in alone.items()}
        with torch.no_grad(), matching_precision(model), plain_experts(model), resharded(model):
            short, long = model(**alone).logits, model(**padded).logits[:, 3:]
        gap, spread = (short - long).abs().amax().float(), short.float().std()
        _positions_found[model] = bool(gap <= _ROUND_OFF.get(short.dtype, 0.1) * spread)
    return _positions_found[model]


def make_batch(
    prompt_token_ids: Sequence[Sequence[int]],
    response_token_ids: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    seq_index: Sequence[int] | None = None,
    pad_id: int = 0,
    response_masks: Sequence[BoolArray] | None = None,
) -> TokenBatch:
    """Pad ragged prompts and responses into one batch.

    Args:
        prompt_token_ids: one row per sequence.
        response_token_ids: one row per sequence.
        device: where the batch is to be.
        seq_index: where each row stands in the whole batch; by default in this order.
        pad_id: id of padding; no number depends on it.
        response_masks: per sequence (tok,) True on response tokens that the policy wrote; None for all.

    Raises:
        BatchError: a prompt or a response is empty.
    """
    rows = len(prompt_token_ids)
    for kind, ids in (("prompt", prompt_token_ids), ("response", response_token_ids)):
        empty = [i for i, row in enumerate(ids) if len(row) == 0]
        if empty:
            raise BatchError(
                f"sequence {empty[0]} has an empty {kind}; every sequence needs at least one token of it"
            )
    width = max(len(p) for p in prompt_token_ids)
    length = max(len(r) for r in response_token_ids)
    input_ids = torch.full((rows, width + length), pad_id, dtype=torch.long)
    attention = torch.zeros((rows, width + length), dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(prompt_token_ids, response_token_ids, strict=True)):
        start, stop = width - len(prompt), width + len(response)
        input_ids[i, start:stop] = torch.tensor([*prompt, *response], dtype=torch.long)
        attention[i, start:stop] = 1
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    present = attention[:, width:].bool()
    written = present.clone()
    for row, mask in zip(written, response_masks or (), strict=False):
        row[: len(mask)] = torch.from_numpy(mask)
    index = torch.arange(rows) if seq_index is None else torch.tensor(list(seq_index), dtype=torch.long)
    return TokenBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention.to(device),
        position_ids=positions.to(device),
        response_ids=input_ids[:, width:].to(device),
        response_mask=written.to(device),
        present=present.to(device),
        seq_index=index.to(device),
    )


def forward(
    model: nn.Module,
    batch: TokenBatch,
    *,
    temperature: float,
    params: Mapping[str, Tensor] | Replaced | None = None,
    keep_logits: bool = False,
    keep_hidden: bool = False,
    keep_squares: bool = False,
    readings: Mapping[Hashable, Reading] = MappingProxyType({}),
) -> TokenOutputs:
    """Log-probs and entropies of the response tokens of a batch.

    Differentiable in the model's parameters, in reverse mode (backward) and, given ``params``, in forward
    mode (``torch.func.jvp``, also nested).

    Args:
        model: causal language model.
        batch: padded sequences.
        temperature: T of pi(.|s) = softmax(z(s)/T).
        params: values to use instead of the model's own, by ``named_parameters()`` name, or what makes them;
            missing names keep the model's own value. A sharded model takes the second only.
        keep_logits: also return logits / temperature, all at once: for small vocabularies.
        keep_hidden: also return the last hidden states.
        keep_squares: also return the sums over pi_v^2, ``collisions`` and ``discriminators``.
        readings: what else to read off the distribution at every position, by key.

    A model whose parameters are float64 computes in float64 throughout (``true_float64``); logits in
    bfloat16 or float16 are divided and normalised in float32.

    Raises:
        MeasurementError: the model cannot be told the positions of padded sequences, its logits are not
            finite, or it gives a response token probability 0.
    """
    run = partial(
        _forward,
        model,
        batch,
        temperature,
        keep_logits=keep_logits,
        keep_hidden=keep_hidden,
        keep_squares=keep_squares,
        readings=readings,
    )
    if not isinstance(params, Replaced):
        with resharded(model):
            return run(params)
    if sharded(model) is None:
        return run(params.values(model))
    with resharded(model), changed(model, params.in_units):
        return run(None)


def _forward(
    model: nn.Module,
    batch: TokenBatch,
    temperature: float,
    params: Mapping[str, Tensor] | None,
    *,
    keep_logits: bool,
    keep_hidden: bool,
    keep_squares: bool,
    readings: Mapping[Hashable, Reading],
) -> TokenOutputs:
    """:func:`forward`, all values of parameters at hand."""
    length = batch.response_ids.shape[1]
    inputs = forward_inputs(model, batch, positions=length + 1)
    inside = partial(_computing, model)
    logits = hidden = None
    head = None
    if not keep_logits:
        head = head_of(model, base_model(model), batch.response_ids, inside=inside, params=params)
    if head is not None:
        hidden = head.hidden(inputs)[:, -length - 1 : -1]

        by_hand = not (keep_squares or readings) and _by_hand(params)

        def say(raw: Tensor, at: slice) -> tuple[Tensor, ...]:
            ids = batch.response_ids[:, at]
            if by_hand:
                found: tuple[Tensor, ...] = _LogprobsAndEntropies.apply(raw, ids, temperature)  # type: ignore[no-untyped-call]
                return found
            tempered = _tempered(raw, temperature)
            del raw  # its memory is that of a piece
            return _of_logits(tempered, ids, keep_squares, readings, at)

        figures = head.in_pieces(say, hidden, batch.response_ids)
    else:
        if keep_hidden:
            inputs["output_hidden_states"] = True
        with inside():
            if params is None:
                out = model(**inputs)
            else:
                out = torch.func.functional_call(model, dict(params), (), inputs)
        hidden = out.hidden_states[-1][:, -length - 1 : -1] if keep_hidden else None
        logits = _tempered(out.logits[:, -length - 1 : -1], temperature)
        figures = _of_logits(logits, batch.response_ids, keep_squares, readings, slice(0, length))
    mask = batch.response_mask
    _refuse_unsound(figures[0].detach(), figures[1].detach(), batch)
    logprobs, entropies, *further = (values.masked_fill(~mask, 0.0) for values in figures)
    squares = further[: len(further) - len(readings)]
    return TokenOutputs(
        logprobs=logprobs,
        entropies=entropies,
        logits=logits if keep_logits else None,
        hidden=hidden if keep_hidden else None,
        collisions=squares[0] if squares else None,
        discriminators=squares[1] if squares else None,
        read=dict(zip(readings, further[len(squares) :], strict=True)),
    )


def log_distributions(
    model: nn.Module,
    batch: TokenBatch,
    *,
    temperature: float,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[slice], Tensor]:
    """(seq, some, vocab) log pi of some response positions at a time, without gradient.

    The backbone runs once, now; logits are made when they are asked for, where the model can be cut.

    Args:
        model: causal language model.
        batch: padded sequences.
        temperature: T of pi(.|s) = softmax(z(s)/T).
        inside: contexts in which the model is the one that is meant, made anew for each run of it.

    Raises:
        MeasurementError: the model cannot be told the positions of padded sequences.
    """
    length = batch.response_ids.shape[1]
    inputs = forward_inputs(model, batch, positions=length + 1)

    @contextmanager
    def run() -> Iterator[None]:
        with torch.no_grad(), Replay(), inside(), _computing(model):
            yield

    head = head_of(model, base_model(model), batch.response_ids, inside=run)
    if head is None:
        with run():
            whole = model(**inputs).logits[:, -length - 1 : -1]
    else:
        hidden = head.hidden(inputs)[:, -length - 1 : -1]

    def some(at: slice) -> Tensor:
        with torch.no_grad():
            logits = whole[:, at] if head is None else head.logits(hidden[:, at], batch.response_ids[:, at])
            return torch.log_softmax(_tempered(logits, temperature), dim=-1)

    return some


@contextmanager
def _computing(model: nn.Module) -> Iterator[None]:
    """A block in which a model computes as it is measured."""
    with matching_precision(model), plain_experts(model), differentiable(model), running(model):
        yield


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits / temperature in float32 at least, those of excluded tokens finite."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    lowest = excluded_logit(logits.dtype)
    if bool(logits.detach().amin() < lowest):
        # -inf or the type's minimum: a finite number in its place makes 0 log 0 = 0, in every derivative too
        logits = logits.masked_fill(logits < lowest, lowest)
    return logits


def _of_logits(
    logits: Tensor, ids: Tensor, squares: bool, readings: Mapping[Hashable, Reading], at: slice
) -> tuple[Tensor, ...]:
    """(seq, some) log-probs, entropies and, on request, collisions, discriminators and readings."""
    distribution = torch.log_softmax(logits, dim=-1)
    del logits
    logprobs = distribution.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    probs = distribution.exp()
    entropies = -(probs * distribution).sum(-1)
    further = [reading(distribution, at) for reading in readings.values()]
    if squares:
        squared = probs.square()
        collisions = squared.sum(-1)
        weighted = (squared * distribution).sum(-1)
        further = [collisions, weighted + collisions * entropies, *further]
    return logprobs, entropies, *further


def _by_hand(params: Mapping[str, Tensor] | None) -> bool:
    """Whether no derivative is asked for that :class:`_LogprobsAndEntropies` has not."""
    transformed: bool = torch._C._are_functorch_transforms_active()  # as its own ``apply`` asks
    return not transformed and (params is None or not torch.is_grad_enabled())


class _LogprobsAndEntropies(torch.autograd.Function):
    """Log-probs and entropies off logits, with derivatives that hold a few tensors of their size at a time.

    dl_y/dz_v = (1[v = y] - pi_v)/T and dH/dz_v = -pi_v (log pi_v + H)/T, in both modes, first order alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        found = torch.log_softmax(_tempered(logits, temperature), dim=-1)
        ids = ids.unsqueeze(-1)
        entropies = -found.exp().mul_(found).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(found, ids, entropies)
        else:  # what is kept for forward mode is out of reach of the checkpoint around this
            ctx.save_for_forward(found, ids, entropies)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return found.gather(-1, ids).squeeze(-1), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor) -> tuple[Tensor, None, None]:
        found, ids, entropies = ctx.saved_tensors
        up = of_logprobs.unsqueeze(-1)
        grad = (found + entropies.unsqueeze(-1)).mul_(of_entropies.unsqueeze(-1)).add_(up)
        grad.mul_(found.exp()).neg_().scatter_add_(-1, ids, up)
        return grad.div_(ctx.temperature).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, slopes: Tensor, *fixed: None) -> tuple[Tensor, Tensor]:
        found, ids, entropies = ctx.saved_tensors
        slopes = slopes.to(found.dtype)
        weighted = found.exp().mul_(slopes)
        mean = weighted.sum(-1)
        of_logprobs = slopes.gather(-1, ids).squeeze(-1) - mean
        of_entropies = -weighted.mul_(found).sum(-1) - entropies * mean
        return of_logprobs / ctx.temperature, of_entropies / ctx.temperature


def excluded_logit(dtype: torch.dtype) -> float:
    """A logit so low that its token has probability 0, while its products with derivatives stay finite."""
    return -math.sqrt(torch.finfo(dtype).max)


def _refuse_unsound(logprobs: Tensor, entropies: Tensor, batch: TokenBatch) -> None:
    """Raise where a response token has no finite log-prob or entropy, or is one that the policy excludes."""
    possible = logprobs > excluded_logit(logprobs.dtype) / 2
    bad = ~(possible & entropies.isfinite()) & batch.response_mask
    if not bool(bad.any()):
        return
    row, column = bad.nonzero()[0].tolist()
    where = (
        f"sequence {int(batch.seq_index[row])}, response token {column} "
        f"(id {int(batch.response_ids[row, column])})"
    )
    if bool(entropies[row, column].isfinite()):
        raise MeasurementError(
            f"{where}: the policy gives it probability 0, so its log-prob is -inf; take a batch that was "
            "sampled from this policy"
        )
    raise MeasurementError(
        f"{where}: the logits before it are not finite, so something overflows in the model; load it at a "
        "wider precision (float32, float64), or move it by smaller learning rates"
    )

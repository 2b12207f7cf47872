"""What the measuring forward says of a batch that was drawn by some temperature and truncation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessor

from stepscope.policy.forward import Reading, TokenBatch, excluded_logit, forward
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.sampling.base import Convention, Decoding, Truncation
from stepscope.policy.state import Policy
from stepscope.results import BoolArray, FloatArray, Rollouts

Rows = tuple[FloatArray, ...]


@dataclass(frozen=True)
class Decoded:
    """Log-probs of a batch by the measuring forward; each field has a (tok,) array per sequence.

    Attributes:
        logprobs: of the policy, at its own temperature, in nats.
        entropies: of the policy, in nats.
        by_convention: what an engine that computed as the measuring forward does would give for each token;
            ``processed`` of a token that truncation excludes is its log-prob as if it were not excluded.
        masses: S_k = sum of pi(v) over the tokens v that truncation keeps at the position.
        kept: whether it keeps the token that was drawn.
        surprises: H(q) = E_q[-log q] at the position, in nats: what -log q of the token is on average.
        variances: Var_q[log q] at the position, in nats^2.
    """

    logprobs: Rows
    entropies: Rows
    by_convention: dict[Convention, Rows]
    masses: Rows
    kept: tuple[BoolArray, ...]
    surprises: Rows
    variances: Rows


def score_decoding(
    policy: Policy,
    rollouts: Rollouts,
    decoding: Decoding,
    *,
    order: Sequence[Truncation],
    budget: Budget = Budget(),
) -> Decoded:
    """Log-probs, entropies and what temperature and truncation make of them, in one pass.

    With p = softmax(z/T') and K the set that truncation keeps, a token is drawn from q = p / sum_K p on K.

    Args:
        policy: that the batch was drawn from.
        rollouts: token ids; its own log-probs are not used.
        decoding: how they were drawn.
        order: in which the engine truncates.
        budget: how large micro-batches are.
    """
    temperature = rollouts.temperature
    warpers = decoding.warpers(order)
    sharpness = temperature / decoding.own_temperature(temperature)

    def fields(batch: TokenBatch) -> Tensor:
        said = _Said(batch.response_ids, temperature, sharpness, warpers)
        with torch.no_grad():
            outputs = forward(policy.model, batch, temperature=temperature, readings=said.readings())
        columns = outputs.logprobs, outputs.entropies, *(outputs.read[name] for name in _FIGURES)
        return torch.stack(columns, -1).double().cpu()

    rows = sweep_rows(policy, rollouts, fields, budget=budget, what="scoring")
    columns = [tuple(row[:, k].numpy().copy() for row in rows) for k in range(2 + len(_FIGURES))]
    return Decoded(
        logprobs=columns[0],
        entropies=columns[1],
        by_convention={"raw": columns[2], "tempered": columns[3], "processed": columns[4]},
        masses=columns[5],
        kept=tuple(values > 0.5 for values in columns[6]),
        surprises=columns[7],
        variances=columns[8],
    )


_FIGURES = ("raw", "tempered", "processed", "mass", "kept", "surprise", "variance")


class _Said:
    """Figures of a micro-batch, all made at once of each piece of it.

    Temperatures scale log pi as they do logits: both differ by a constant of each position, which the softmax
    takes out.
    """

    def __init__(
        self, ids: Tensor, temperature: float, sharpness: float, warpers: Sequence[LogitsProcessor]
    ) -> None:
        self.ids = ids
        self.temperature = temperature
        self.sharpness = sharpness
        self.warpers = warpers
        self.piece: tuple[Tensor, dict[str, Tensor]] | None = None

    def readings(self) -> dict[Hashable, Reading]:
        """One for each figure."""
        return {name: partial(self._figure, name) for name in _FIGURES}

    def _figure(self, name: str, log_pi: Tensor, at: slice) -> Tensor:
        if self.piece is None or self.piece[0] is not log_pi:
            self.piece = log_pi, self._figures(log_pi, self.ids[:, at])
        return self.piece[1][name]

    def _figures(self, log_pi: Tensor, ids: Tensor) -> dict[str, Tensor]:
        def at(values: Tensor) -> Tensor:
            return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)

        raw, sharp = log_pi * self.temperature, log_pi * self.sharpness
        warped = sharp.reshape(-1, sharp.shape[-1])
        for warper in self.warpers:
            warped = warper(ids.reshape(-1, 1), warped)
        warped = warped.view_as(sharp)
        inside = warped.isfinite() & (log_pi > excluded_logit(log_pi.dtype) / 2)
        log_q = warped.log_softmax(-1)
        q = log_q.exp()
        log_q = log_q.masked_fill_(q == 0, 0.0)
        surprise = -(q * log_q).sum(-1)
        return {
            "raw": at(raw) - raw.logsumexp(-1),
            "tempered": at(sharp) - sharp.logsumexp(-1),
            "processed": at(sharp) - warped.logsumexp(-1),
            "mass": log_pi.exp().masked_fill(~inside, 0.0).sum(-1),
            "kept": at(inside.to(log_pi.dtype)),
            "surprise": surprise,
            "variance": (q * (log_q + surprise.unsqueeze(-1)) ** 2).sum(-1),
        }

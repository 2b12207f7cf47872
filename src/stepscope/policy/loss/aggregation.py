"""How a loss per token becomes one number: every way is a weight per token, Loss = sum_ik W_ik loss_ik.

N tokens in the loss, n_i of sequence i, B sequences, b of them with a token in the loss, L the longest
response allowed. Names are verl's (``loss_agg_mode``), and ``piece-token-mean`` for TRL's ``bnpo``.

Source: verl's ``agg_loss`` with the whole batch as its global batch, TRL's ``GRPOTrainer._compute_loss``.
Pinned by ``tests/policy/test_verl_losses.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def _token_mean(weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    return weight / weight.sum().clamp(min=1.0)


def _token_sum(weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    return weight


def _seq_mean_token_sum(weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    return weight / len(weight)


def _seq_mean_token_mean(weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    return weight / weight.sum(-1, keepdim=True).clamp(min=1.0) / len(weight)


def _seq_mean_token_sum_norm(weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    return weight / (len(weight) * longest)


def _piece_token_mean(weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    made = weight.new_zeros(weight.shape)
    for rows in pieces:
        made[rows] = weight[rows] / weight[rows].sum().clamp(min=1.0) / len(pieces)
    return made


AGGREGATIONS: dict[str, Callable[[Tensor, Sequence[Tensor], int], Tensor]] = {
    "token-mean": _token_mean,
    "token-sum": _token_sum,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
    "piece-token-mean": _piece_token_mean,
}
"""W by name: 1/N, 1, 1/B, 1/(n_i B), 1/(L B), and 1/N of the sequence's own micro-batch over their number."""


def aggregation_weights(name: str, weight: Tensor, pieces: Sequence[Tensor], longest: int) -> Tensor:
    """(seq, tok) W.

    Args:
        name: one of :data:`AGGREGATIONS`.
        weight: (seq, tok) 1 on tokens in the loss, else 0.
        pieces: rows of the micro-batches that the batch was cut into.
        longest: L, in tokens.
    """
    return AGGREGATIONS[name](weight, pieces, longest)

"""Numbers that cannot be: NaN and infinity in tensors, and what is no number in a file.

All are refused where they enter, by name: further on, one of them spoils every figure without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.group import current
from stepscope.policy.shards import is_sharded, part

MOST_STEPS = 1e12
"""Steps that no training takes."""


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """What is wrong with the first tensor that holds a NaN or an infinity, or "" where none does.

    Args:
        named: names and tensors of any type; those without floating point are finite. Of sharded ones every
            process has to ask, and all get the same answer.
    """
    found, split = "", False
    for name, tensor in named:
        own, split = part(tensor), split or is_sharded(tensor)
        if found or not own.is_floating_point() or own.numel() == 0:
            continue
        low, high = torch.aminmax(own)  # a NaN shows in both, and nothing is allocated
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~own.isfinite()).sum())
            found = f"{name} holds {count} NaN or infinite numbers among {own.numel()}"
            if not split:
                break
    return next(filter(None, current().gather(found)), "") if split else found


def refuse_broken_weights(model: nn.Module, where: str) -> None:
    """Refuse a model with a NaN or infinite weight; a bias of logits may exclude tokens with -inf.

    Raises:
        CheckpointError: naming the first such parameter.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    bias = getattr(head, "bias", None)
    weights = (
        (n, p.detach().masked_fill(p.detach().isneginf(), 0.0) if p is bias else p)
        for n, p in model.named_parameters()
    )
    if problem := first_not_finite(weights):
        raise CheckpointError(
            f"{where}: weight {problem}; the training diverged or the file is damaged, so take an earlier "
            "checkpoint or copy it again"
        )


def whole_number(value: object, what: str, where: str) -> int:
    """A number of steps as a file has it, a number or a tensor of one.

    Raises:
        CheckpointError: it is no whole number.
    """
    number = real_number(value, what, where)
    if not (math.isfinite(number) and number == int(number)):
        raise CheckpointError(f"{where}: {what} is {number}, expected a whole number; copy the file again")
    return int(number)


def real_number(value: object, what: str, where: str) -> float:
    """A hyperparameter as a file has it, a number or a tensor of one.

    Raises:
        CheckpointError: it is something else.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{where}: {what} is of type {type(value).__name__}, expected a number; copy the file again"
        )
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf

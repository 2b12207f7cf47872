"""The first pass of a model that was loaded: sequences that any checkpoint can be tried on."""

from __future__ import annotations

import torch

from stepscope.policy.forward import excluded_logit, plain_experts
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.sharding import resharded
from stepscope.policy.state import Policy


def made_up_sequences(policy: Policy) -> tuple[list[list[int]], list[list[int]]]:
    """Made-up prompts and responses of different lengths, of tokens that the model does not exclude."""
    model = policy.model
    with torch.no_grad(), matching_precision(model), plain_experts(model), resharded(model):
        start = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
        logits = model(input_ids=start).logits[0, -1]
    possible = (~(logits < excluded_logit(logits.dtype))).nonzero().flatten().cpu()
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        chosen: list[int] = possible[torch.randint(0, len(possible), (count,), generator=generator)].tolist()
        return chosen

    return [tokens(n) for n in (3, 9, 5, 1)], [tokens(n) for n in (6, 2, 1, 8)]

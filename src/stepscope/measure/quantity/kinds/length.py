"""The length of responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepscope.measure.quantity.base import Quantity
from stepscope.policy.forward import TokenBatch, TokenOutputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Length(Quantity):
    """E[number of tokens that the policy writes]: 1 at each of its positions, a function of the prefix."""

    name = "length"
    sum_unit = "tokens"
    normalisations = ("per_seq",)
    versions = ("on_policy",)

    normalisation: str = "per_seq"

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """One at every position of the policy."""
        return batch.response_mask.to(outputs.logprobs.dtype)

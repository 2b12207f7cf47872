"""The entropy of the policy over responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepscope.measure.quantity.base import Quantity
from stepscope.policy.forward import TokenBatch, TokenOutputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Entropy(Quantity):
    """E[sum_k H_k], H_k the entropy of the next-token distribution: the Rao-Blackwellised -E[log pi(y)]."""

    name = "entropy"
    sum_unit = "nats"

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """H_k."""
        return outputs.entropies

    @property
    def fisher_sign(self) -> int:
        """-1: Hess H = -E[grad S grad S'] - E[(S - E S) (Hess pi)/pi]."""
        return -1

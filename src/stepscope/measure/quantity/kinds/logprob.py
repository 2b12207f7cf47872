"""The log-prob of responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepscope.measure.quantity.base import Quantity
from stepscope.policy.forward import TokenBatch, TokenOutputs


@dataclass(frozen=True, kw_only=True, eq=False)
class LogProb(Quantity):
    """E[sum_k l_k]. With ``fixed_prefix``: mean log-prob of the given responses; ``on_policy``: -entropy."""

    name = "logprob"
    sum_unit = "nats"

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """l_k."""
        return outputs.logprobs

    @property
    def fisher_sign(self) -> int:
        """-1 for given responses: Hess S = (Hess pi)/pi - grad S grad S'; on policy +1, as -entropy."""
        return 1 if self.on_policy else -1

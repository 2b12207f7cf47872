"""The KL divergence from a reference policy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import Quantity
from stepscope.policy.checkpoint.adapters import reference_adapter
from stepscope.policy.forward import Reading, TokenBatch, TokenOutputs, log_distributions
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

INFINITE = 1e6
"""Nats at one position that no finite logits reach; a token excluded by the reference alone exceeds it."""


@dataclass(frozen=True)
class Reference:
    """A frozen policy to compare with: another model, or a PEFT model under its reference adapter or none.

    Attributes:
        model: of the reference.
        temperature: of its distribution.
        switch_adapter: whether ``model`` is the adapted policy itself, see ``reference_adapter``.
        as_trained: of an adapter's base, see there.
    """

    model: nn.Module
    temperature: float
    switch_adapter: bool = False
    as_trained: bool = False

    def divergence(self, batch: TokenBatch) -> Reading:
        """KL(pi | ref) at some positions at a time: sum_v pi_v (log pi_v - log ref_v)."""
        switched = partial(reference_adapter, self.model, as_trained=self.as_trained)
        inside = switched if self.switch_adapter else nullcontext
        log_ref = log_distributions(self.model, batch, temperature=self.temperature, inside=inside)

        def read(log_pi: Tensor, at: slice) -> Tensor:
            return (log_pi.exp() * (log_pi - log_ref(at).to(log_pi.dtype))).sum(-1)

        return read


@dataclass(frozen=True, kw_only=True, eq=False)
class KL(Quantity):
    """E[sum_k KL(pi(.|s_k) | ref(.|s_k))]: Rao-Blackwellised per position, over the full vocabulary.

    Attributes:
        reference: what the policy is compared with.
    """

    name = "kl"
    sum_unit = "nats"

    reference: Reference | None = None

    def on(self, rollouts: Rollouts, policy: Policy | None, reference: nn.Module | None) -> KL:
        """With the reference model, or for an adapter with what its training started from."""
        if reference is not None:
            return replace(self, reference=Reference(reference, rollouts.temperature))
        if self.reference is not None:
            return self
        if policy is None:
            raise MeasurementError("kl needs the policy that sampled the batch; pass policy=")
        if not hasattr(policy.model, "disable_adapter"):
            raise MeasurementError(
                "kl: the policy is a full model, so it has no base model to compare with; give a reference "
                "model"
            )
        return replace(self, reference=Reference(policy.model, rollouts.temperature, switch_adapter=True))

    def reading(self, batch: TokenBatch) -> Reading:
        """The divergence from the reference."""
        if self.reference is None:
            raise MeasurementError("kl needs a reference; use make_quantity")
        return self.reference.divergence(batch)

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """sum_v pi_v (log pi_v - log ref_v)."""
        divergence = outputs.read[self.values_key]
        if not bool((divergence < INFINITE).all()):
            row, column = (~(divergence < INFINITE)).nonzero()[0].tolist()
            raise MeasurementError(
                f"kl: infinite before response token {column} of sequence {int(batch.seq_index[row])}, where "
                "the policy gives probability to a token that the reference excludes; take a reference with "
                "the same vocabulary, or measure without kl"
            )
        return divergence

    @property
    def fisher_sign(self) -> int:
        """+1: the negative entropy in it."""
        return 1

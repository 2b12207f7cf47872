"""A step taken again with other token weights, and what it does to entropy and reward on a probe batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.estimators import Sampled, per_decision, weights_of
from stepscope.measure.quantity.importance_weights import check_weights, last_weights
from stepscope.measure.quantity.probe import Bindings, bindings_on
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import Step, ascent_of_sequences, assemble_step, weighted_logprobs
from stepscope.measure.step.terms import term_gradients
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import BoolArray, FloatArray, Rollouts
from stepscope.stats import Estimate


class RemadeSteps:
    """Steps of one batch made anew (clipping, second moment) and measured on one probe batch.

    Attributes:
        step: the full step.
        lr: learning rate of all of them.
        bound: entropy per token and expected reward on the probe batch, in this order.

    Args:
        policy: where the steps start, with its optimizer's state; restored bitwise.
        step: the full step.
        probe: the probe batch.
        lr: learning rate of all of them; the step's own by default.
        baseline: rung of the baseline ladder.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
        budget: what may be used at a time.

    Raises:
        MeasurementError: a learning rate of zero; of the first step made anew, something in the loss that
            belongs to no sequence.
    """

    def __init__(
        self,
        policy: Policy,
        step: Step,
        probe: Rollouts,
        *,
        lr: float | None = None,
        baseline: str = "best",
        bindings: Bindings | None = None,
        budget: Budget = Budget(),
    ) -> None:
        self.lr = step.lr if lr is None else lr
        if not self.lr > 0:
            raise MeasurementError(
                "a step without tokens needs a learning rate above 0; the step's own is 0, give options one"
            )
        self.policy, self.step, self.probe, self.budget = policy, step, probe, budget
        known = bindings_on(bindings, policy, probe, step.direction, budget)
        self.bound = tuple(
            known.bind(quantity, baseline)
            for quantity in ("entropy", make_quantity("reward", probe, normalisation="per_seq"))
        )

    @cached_property
    def _ascent(self) -> dict[str, Tensor]:
        return ascent_of_sequences(self.policy, self.step, self.budget)

    @cached_property
    def _terms(self) -> dict[str, dict[str, Tensor]]:
        return term_gradients(self.policy, self.step.update, remade=True, budget=self.budget)

    def measured(self, direction: ParameterVector) -> tuple[list[Sampled], str]:
        """True changes of entropy and reward along a direction, and why its weights cannot be trusted."""
        quantities = [b.quantity for b in self.bound]
        table = values_at(self.policy, self.probe, quantities, direction, self.lr, budget=self.budget)
        moved = [table.quantity(i) for i in range(len(self.bound))]
        reward = self.bound[1]
        last = last_weights(weights_of(reward, moved[1]), reward.mask, token_dependent=True)
        changes = [per_decision(b, m) for b, m in zip(self.bound, moved, strict=True)]
        return changes, check_weights(last).reason

    def without(self, dropped: BoolArray) -> ParameterVector:
        """Direction of the step made without some tokens: their gradient is taken off that of the batch.

        Args:
            dropped: (tok,) of the policy's tokens.
        """
        step = self.step
        masks = step.update.rows(dropped)
        touched = [i for i, mask in enumerate(masks) if mask.any()]
        kept = tuple(np.where(mask, 0.0, w) for mask, w in zip(masks, step.token_weights, strict=True))
        rest = {n: t.clone() for n, t in self._ascent.items()}
        if touched:
            gone = [np.where(masks[i], step.token_weights[i], 0.0) for i in touched]
            part = self._gradient(touched, gone)
            rest = {n: t - part[n] for n, t in rest.items()}
        return assemble_step(self.policy, step.update, kept, rest, self._terms).direction

    def reweighted(self, factors: FloatArray) -> ParameterVector:
        """Direction of the step made with sequences that count more or less.

        Args:
            factors: (seq,) of the token weights of each sequence.
        """
        step = self.step
        weights = tuple(x * row for x, row in zip(factors, step.token_weights, strict=True))
        kept = [i for i, row in enumerate(weights) if np.any(row)]
        ascent = (
            self._gradient(kept, [weights[i] for i in kept]) if kept else vectors.zeros_like(self._ascent)
        )
        return assemble_step(self.policy, step.update, weights, ascent, self._terms).direction

    def estimate(self, which: int, sampled: Sampled, method: str, reason: str, **error: float) -> Estimate:
        """An estimate of quantity ``which`` of ``bound``."""
        probe = self.bound[which]
        found = probe.estimate(sampled, unit=probe.quantity.unit, method=method, **error)
        return found.doubted(reason)

    def _gradient(self, sequences: Sequence[int], weights: Sequence[FloatArray]) -> dict[str, Tensor]:
        update = self.step.update.select(list(sequences))
        return gradient(self.policy, update, weighted_logprobs(weights), budget=self.budget)

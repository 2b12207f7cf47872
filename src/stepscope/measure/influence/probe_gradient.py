"""The gradient of a quantity on a probe batch, with what is needed to put errors on its inner products.

grad F is a mean over probe sequences, so an inner product grad F . x is a mean too, and its sampling error
follows from its parts: one partial sum per group of prompts. Per token F is a ratio, and the delta method
adds the terms for the mean length and for Fbar, exactly as ``measure.quantity.estimators.linear`` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stepscope.intervals import studentised
from stepscope.measure.quantity.base import readings_of
from stepscope.measure.quantity.estimators import ProbeValues
from stepscope.measure.quantity.estimators import value as quantity_value
from stepscope.measure.quantity.objective import quantity_objective
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.gradients.products import group_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Brief, FloatArray, IntArray, Rollouts
from stepscope.stats import errors_from_sums


@dataclass(frozen=True, repr=False)
class Folds(Brief):
    """Disjoint parts of a probe batch, made of whole prompts.

    Attributes:
        labels: (probe seq,) fold of each probe sequence.
        shares: (fold,) share of the probe sequences.
        mixing: (fold, group + 1) what makes products with the fold's own gradient from those of the parts.
    """

    labels: IntArray
    shares: FloatArray
    mixing: FloatArray


@dataclass(frozen=True)
class ProbeGradient:
    """grad F in parts: what each group of prompts contributes.

    Attributes:
        probe: the quantity on the probe batch.
        parts: name to (group + 1, ...parameter shape): sums of the surrogate's gradient over each group's
            sequences, and last the gradient of the mean length (zero where it does not enter, nan where
            errors were not asked for).
        groups: (seq,) group of each probe sequence.
        by_prompt: whether each group is one prompt.
    """

    probe: ProbeValues
    parts: dict[str, Tensor]
    groups: IntArray
    by_prompt: bool

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1

    def mean(self) -> dict[str, Tensor]:
        """Grad F."""
        return {n: t[:-1].sum(0) / len(self.groups) for n, t in self.parts.items()}

    def dots(self, vector: ParameterVector) -> FloatArray:
        """(group + 1,) inner products of the parts with one vector."""
        return vectors.stack_dots(self.parts, vector)

    def residuals(self, products: FloatArray) -> FloatArray:
        """What each group adds to the error of inner products with grad F, for ``estimate_from_sums``.

        r_g / n with r_g the sum over group g of the residuals of the estimator: product - value, and
        per token (product - value * length / N) - (f - Fbar length) / N * dN / N with dN the product with the
        gradient of the mean length N.

        Args:
            products: (group + 1, item) inner products of the parts, as :meth:`dots` gives them.

        Returns:
            (group, item); they add up to zero over the groups.
        """
        return np.asarray(self._residuals() @ products / len(self.groups), dtype=np.float64)

    def errors(self, products: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Standard errors of inner products with grad F, by group, and half widths of 95 % intervals.

        ``stderr^2 = G/(G-1) sum_g r_g^2`` with :meth:`residuals`.

        Args:
            products: (group + 1, item) inner products of the parts, as :meth:`dots` gives them.

        Returns:
            Both (item,); nan with fewer than two groups.
        """
        residual = self.residuals(products)
        stderr = errors_from_sums(residual)
        if len(residual) < 2:
            return stderr, stderr
        return stderr, np.where(stderr > 0, studentised(residual), 0.0) * stderr

    def _residuals(self) -> FloatArray:
        """(group, group + 1) what makes r_g times the sequences from the products of the parts."""
        count, num, probe = self.num_groups, len(self.groups), self.probe
        share = probe.lengths / probe.mean_length if probe.quantity.per_token else np.ones(num)
        found = np.zeros((count, count + 1))
        found[:, :-1] = np.eye(count) - np.bincount(self.groups, weights=share)[:, None] / num
        if probe.quantity.per_token and probe.quantity.on_policy:
            excess = np.bincount(self.groups, weights=quantity_value(probe).residuals)
            found[:, -1] = -excess / probe.mean_length
        return found

    def folds(self, count: int) -> Folds:
        """The probe batch in disjoint parts of whole groups, each with a gradient of its own.

        A fold's gradient is grad F + sum r_g / its sequences, to first order what the fold alone would give;
        weighted by its share of the sequences the folds add up to grad F.

        Args:
            count: folds wanted; as many as there are groups where those are fewer.
        """
        groups = self.num_groups
        count = min(count, groups)
        fold = np.arange(groups)
        if count < groups:
            fold = np.random.default_rng(1).permutation(fold % count)
        members = fold == np.arange(count)[:, None]
        labels = np.asarray(fold[self.groups], dtype=np.int64)
        sizes = np.bincount(labels, minlength=count)
        mixing = members @ self._residuals() / sizes[:, None]
        mixing[:, :-1] += 1 / len(self.groups)
        return Folds(labels, sizes / sizes.sum(), mixing)


def probe_gradient(
    policy: Policy,
    rollouts: Rollouts,
    probe: ProbeValues,
    *,
    groups: IntArray | None = None,
    errors: bool = True,
    max_groups: int = 64,
    budget: Budget = Budget(),
) -> ProbeGradient:
    """Differentiate a quantity on its probe batch: one pass, and one for the errors of what is per token.

    Args:
        policy: its trainable parameters are differentiated.
        rollouts: the probe batch.
        probe: the quantity, from ``bind_quantity``.
        groups: (seq,) groups of whole prompts, 0, 1, ..., to be kept apart; by default prompts, or random
            pools of them.
        errors: whether errors are wanted; for a quantity per token and on policy they take the pass for the
            gradient of the mean length.
        max_groups: most groups of prompts kept apart by default; with more prompts, whole prompts are pooled
            at random.
        budget: what may be used at a time.
    """
    if groups is None:
        groups = prompt_groups(rollouts.prompt_index, min(max_groups, fitting_groups(policy, budget)))
    gradients = SequenceGradients(
        rollouts, quantity_objective(probe), as_trained=False, readings=partial(readings_of, [probe.quantity])
    )
    parts = group_gradients(policy, gradients, groups, budget=budget)
    slope = {n: torch.full_like(t[0], 0.0 if errors else math.nan) for n, t in parts.items()}
    if errors and probe.quantity.per_token and probe.quantity.on_policy:
        ahead = probe.length_ahead / len(rollouts)
        weights = tuple(row[:n] for row, n in zip(ahead, rollouts.num_tokens, strict=True))
        slope = gradient(policy, rollouts, weighted_logprobs(weights), as_trained=False, budget=budget)
    return ProbeGradient(
        probe=probe,
        parts={n: torch.cat([t, slope[n].to(t.dtype).unsqueeze(0)]) for n, t in parts.items()},
        groups=groups,
        by_prompt=int(groups.max()) + 1 == rollouts.num_prompts,
    )


def fitting_groups(policy: Policy, budget: Budget) -> int:
    """Most groups whose gradients the budget's memory holds, beside two more vectors; at least one."""
    return max(1, budget.memory_bytes // vectors.vector_bytes(policy.parameters) - 2)


def prompt_groups(prompts: Sequence[int] | IntArray, most: int) -> IntArray:
    """(seq,) group of each sequence: its prompt, or one of ``most`` random pools of prompts of equal size."""
    index = np.asarray(prompts, dtype=np.int64)
    count = int(index.max()) + 1
    if count <= most:
        return index
    pool = np.random.default_rng(0).permutation(np.arange(count) % most)
    return np.asarray(pool[index], dtype=np.int64)

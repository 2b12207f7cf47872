"""What the sequences of a step do to entropy and reward together, from each fold of a probe by itself.

To first order from one gradient of each quantity for every fold and a pass over the update batch; to second
order from second-order kernels (:mod:`stepscope.measure.curvature.pairs`), which have their own folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.change.online import BASELINE
from stepscope.measure.curvature.pairs import Folded, PairKernel
from stepscope.measure.influence.probe_gradient import fitting_groups, probe_gradient, prompt_groups
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.estimators import ProbeValues
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.reconstruct import Step, assemble_step, weighted_logprobs
from stepscope.measure.step.terms import term_gradients
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.products import compute_dtype, per_sequence_dots
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts
from stepscope.rules import FrontierWeights
from stepscope.rules.program import Effect, Program, members, units_of

QUANTITIES = (("reward", "per_seq"), ("entropy", "per_token"))
"""Expected reward of a response, and entropy per token, both on policy."""

_VECTORS_BESIDE = 6
"""Stacks of folds' gradients that a pass holds at a time, of both quantities."""


@dataclass(frozen=True)
class Folds:
    """Disjoint parts of a probe batch, of whole prompts.

    Attributes:
        labels: (probe seq,) fold of each probe sequence.
        shares: (fold,) share of the probe's sequences.
    """

    labels: IntArray
    shares: FloatArray

    @classmethod
    def of(cls, probe: Rollouts, most: int) -> Folds:
        """At most so many folds of a probe batch, as gradients and second-order kernels divide it."""
        labels = prompt_groups(probe.prompt_index, most)
        return cls(labels, np.bincount(labels) / len(labels))


@dataclass(frozen=True)
class Lasting:
    """What a batch does over its lifetime, in place of what its step does.

    Attributes:
        metric: P over the share of an unchanging gradient that a step takes at once.
        direction: along which the step's own change is taken.
    """

    metric: ParameterVector
    direction: ParameterVector


def first_order(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    bound: Sequence[ProbeValues],
    *,
    lr: float,
    num_folds: int = 64,
    lasting: Lasting | None = None,
    budget: Budget = Budget(),
) -> tuple[Program, Folds]:
    """The program of a step with first-order influences.

    Costs a gradient pass over the probe batch for each quantity and one for the mean length, a pass over the
    update batch for all products and one for the kernel.

    Args:
        policy: where the step starts.
        step: from an optimizer with a preconditioner.
        probe: the probe batch.
        bound: reward and entropy on it.
        lr: learning rate of the step.
        num_folds: most folds of probe prompts.
        lasting: metric and direction in place of the step's own.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the optimizer has no preconditioner.
    """
    P, direction = step.metric(), step.direction
    if lasting is not None:
        P, direction = dict(lasting.metric), dict(lasting.direction)
    own = SequenceGradients(step.update, weighted_logprobs(step.token_weights))
    units = _units(step)
    folds = Folds.of(probe, min(num_folds, max(2, fitting_groups(policy, budget) // _VECTORS_BESIDE)))
    slopes = [probe_gradient(policy, probe, values, groups=folds.labels, budget=budget) for values in bound]
    stacks: dict[str, Tensor] = {}
    for slope in slopes:
        pulled = {n: t.to(compute_dtype(P[n])) * P[n] for n, t in slope.parts.items()}
        stacks = {n: torch.cat([stacks[n], t]) for n, t in pulled.items()} if stacks else pulled
    products = per_sequence_dots(policy, own, stacks, budget=budget) @ members(units).T
    effects = []
    rows = len(folds.shares) + 1
    for i, slope in enumerate(slopes):
        along = slope.dots(direction)[:, None]
        both = lr * np.concatenate([products[i * rows : (i + 1) * rows], along], axis=1)
        value = both[:-1].sum(0) / len(probe)
        by_fold = value + slope.residuals(both) / folds.shares[:, None]
        effects.append(Effect(folds.shares, by_fold[:, -1], by_fold[:, :-1]))
    return Program(effects[0], effects[1], _kernel(policy, own, P, units, budget), units), folds


def second_order(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    kernels: Sequence[PairKernel],
    *,
    lr: float,
    budget: Budget = Budget(),
) -> tuple[Program, Folds]:
    """The program of a step with second-order kernels of reward per response and entropy per token.

    Units are sequences where the kernels have a row for each, prompts otherwise.

    Args:
        policy: where the step starts.
        step: from an optimizer with a preconditioner.
        probe: the batch that the kernels are from.
        kernels: of reward and of entropy, in this order.
        lr: learning rate of the step.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the kernels are of other quantities, or of other batches.
    """
    named = tuple((k.quantity, k.normalisation) for k in kernels)
    if named != QUANTITIES or any(k.version != "on_policy" for k in kernels):
        raise MeasurementError(
            f"frontier: second-order kernels of {named}, expected {QUANTITIES}, on policy; pass those"
        )
    if any(len(k.prompts) != len(step.update) for k in kernels):
        raise MeasurementError(
            f"frontier: kernels of {len(kernels[0].prompts)} sequences for a step of {len(step.update)}; "
            "make them of this step"
        )
    exact = all(k.exact for k in kernels)
    units = _units(step) if exact else _units(step, most=0)
    folds = Folds.of(probe, len(kernels[0].slope_sums))
    effects = [_curved(kernel, units, folds.shares, lr) for kernel in kernels]
    own = SequenceGradients(step.update, weighted_logprobs(step.token_weights))
    K = _kernel(policy, own, step.metric(), units, budget)
    return Program(effects[0], effects[1], K, units), folds


def before_step(
    policy: Policy,
    update: Rollouts,
    probe: Rollouts,
    *,
    logprobs: Sequence[FloatArray] | None = None,
    budget: Budget = Budget(),
) -> Program:
    """What the sequences of a batch would do to reward and entropy over their lifetime, before a step.

    Of the step that the loss would take without the rule, at its learning rate: lr grad Q . P c_i over the
    share of an unchanging gradient that a step takes at once, (1 - b1)/(1 - b1^t) for AdamW. Nothing of
    momentum or decay is in it.

    Args:
        policy: with its optimizer's state; its settings have the rule ``frontier``.
        update: the batch that makes the step.
        probe: fresh graded responses.
        logprobs: log-probs of the policy now, where it is not the one that sampled.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the settings have another rule, or the optimizer has no preconditioner.
    """
    rule = policy.settings.objective
    if not isinstance(rule, FrontierWeights):
        raise MeasurementError(f"a program before the step belongs to the objective frontier, got {rule!r}")
    assert policy.optimizer is not None
    weights = token_weights(update, replace(policy.settings, objective=None), logprobs=logprobs)
    ascent = gradient(policy, update, weighted_logprobs(weights), budget=budget)
    step = assemble_step(policy, update, weights, ascent, term_gradients(policy, update, budget=budget))
    shares = {n: policy.optimizer.own_shares(n)[1] for n in policy.optimizer.names}
    metric = {n: t / shares[n] for n, t in step.metric().items()}
    bound = [
        bind_quantity(
            policy,
            probe,
            make_quantity(name, probe, normalisation=normalisation),
            direction=step.direction,
            baseline=BASELINE,
            budget=budget,
        )
        for name, normalisation in QUANTITIES
    ]
    found, _ = first_order(
        policy,
        step,
        probe,
        bound,
        lr=step.lr,
        num_folds=rule.folds,
        lasting=Lasting(metric, {n: metric[n] * t for n, t in ascent.items()}),
        budget=budget,
    )
    return found


def _units(step: Step, **most: int) -> IntArray:
    weighted: BoolArray = np.array([bool(np.any(row)) for row in step.token_weights])
    return units_of(weighted, np.asarray(step.update.prompt_index), **most)


def _kernel(
    policy: Policy, own: SequenceGradients, P: Mapping[str, Tensor], units: IntArray, budget: Budget
) -> FloatArray:
    """(unit, unit) c_i' P c_j."""
    of = members(units)
    found = gram(policy, own, preconditioner=dict(P), budget=budget).numpy()
    return np.asarray(of @ found @ of.T)


def _curved(kernel: PairKernel, units: IntArray, shares: FloatArray, lr: float) -> Effect:
    """Own change, q and B of one quantity, fold by fold."""
    of, rows, count = members(units), kernel.rows, len(units)

    def by_fold(found: Folded) -> FloatArray:
        return found.value + found.sums / shares[:, None, None]

    pairs = by_fold(kernel.whole)
    slopes = kernel.slopes + kernel.slope_sums / shares[:, None]
    every = np.r_[rows.prompts, rows.parts]
    if kernel.exact:
        own = of @ pairs[:, rows.single]
    else:
        prompts = np.unique(kernel.prompts[units >= 0])
        own = pairs[:, prompts]
    first = lr * slopes[:, :count] @ of.T
    return Effect(
        shares,
        lr * slopes.sum(1) + lr**2 / 2 * pairs[:, every].sum((1, 2)),
        first + lr**2 * own.sum(2),
        lr**2 * own[..., :count] @ of.T,
    )

"""A quantity at one place of a path: its gradient in parts, its level, and the change to its neighbours.

The probe batch at a place is a sample of the policy there, to the same prompts at every place: what a prompt
adds to the error of one place it adds, in part, to that of the next, so errors are summed over the path by
prompt, or by pools of prompts, before they are squared. Responses may be drawn anew at each place or by the
same uniform numbers at all; the sum over the path is better known by the first. For ``fixed_prefix`` the
batch is that of the path's start at all places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepscope.measure.influence.probe_gradient import ProbeGradient, probe_gradient
from stepscope.measure.quantity.base import Quantity
from stepscope.measure.quantity.estimators import ESTIMATORS, Sampled, value, weights_of
from stepscope.measure.quantity.importance_weights import check_weights, last_weights
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.quantity.values import values_at
from stepscope.policy import vectors
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.results import Brief, FloatArray, IntArray, Rollouts
from stepscope.results.ledger import GroupSums, PlaceFigures


@dataclass(frozen=True, repr=False, kw_only=True)
class Looked(Brief):
    """A quantity and the batch that it is looked at on.

    Attributes:
        label: its name in the ledger.
        quantity: bound to the batch.
        probe: sampled at the place, or at the start of the path for fixed prefixes.
    """

    label: str
    quantity: Quantity
    probe: Rollouts


@dataclass(frozen=True, repr=False)
class PlaceSlopes(Brief):
    """Gradients of all quantities at one place.

    Attributes:
        rows: name to (quantity x fold, ...parameter shape): grad F of each fold of the probe prompts.
        shares: (quantity, row) makes grad F of each quantity.
        parts: in the order of the quantities.
    """

    rows: dict[str, Tensor]
    shares: FloatArray
    parts: tuple[ProbeGradient, ...]


def place_slopes(
    policy: Policy,
    looked: Sequence[Looked],
    *,
    groups: IntArray,
    num_folds: int,
    baseline: str = "position",
    direction: ParameterVector,
    budget: Budget = Budget(),
) -> PlaceSlopes:
    """The gradient of each quantity at the policy's parameters, by folds and groups of probe prompts.

    Args:
        policy: at the place.
        looked: the quantities.
        groups: (probe seq,) groups of whole prompts kept apart for errors, the same at every place.
        num_folds: folds of those that tokens are told apart by; 1 leaves tokens without errors.
        baseline: rung of the baseline ladder, or ``best``.
        direction: along which ``best`` judges the rungs.
        budget: what may be used at a time.
    """
    found = []
    for each in looked:
        bound = bind_quantity(
            policy, each.probe, each.quantity, direction=direction, baseline=baseline, budget=budget
        )
        found.append(probe_gradient(policy, each.probe, bound, groups=groups, budget=budget))
    folds = [slope.folds(num_folds) for slope in found]
    stacks = [vectors.mixed(slope.parts, fold.mixing) for slope, fold in zip(found, folds, strict=True)]
    rows = {name: torch.cat([stack[name] for stack in stacks]) for name in stacks[0]}
    count = len(folds[0].shares)
    shares = np.zeros((len(found), count * len(found)))
    for i, fold in enumerate(folds):
        shares[i, i * count : (i + 1) * count] = fold.shares
    return PlaceSlopes(rows, shares, tuple(found))


def place_figures(
    policy: Policy,
    slopes: PlaceSlopes,
    looked: Sequence[Looked],
    sums: Mapping[str, Mapping[str, ParameterVector]],
    neighbours: Mapping[str, ParameterVector],
    *,
    budget: Budget = Budget(),
) -> tuple[PlaceFigures, ...]:
    """All that a place adds to the account but the entries of tokens, by quantity.

    Args:
        policy: at the place; restored bitwise.
        slopes: of the quantities there.
        looked: the quantities.
        sums: name to part to the displacement whose product with the gradient is wanted.
        neighbours: name to parameters at which the quantity is also wanted, from the same samples.
        budget: what may be used at a time.
    """
    found = []
    for each, slope in zip(looked, slopes.parts, strict=True):
        products = {}
        for name, parts in sums.items():
            for part, vector in parts.items():
                dots = slope.dots(vector)
                level = float(dots[:-1].sum()) / len(slope.groups)
                products[f"{name}.{part}"] = GroupSums(level, slope.residuals(dots[:, None])[:, 0])
        changes, doubts = {}, []
        for name, theta in neighbours.items():
            with placed(policy.parameters, theta):
                moved = values_at(policy, each.probe, [slope.probe.quantity], budget=budget).quantity(0)
            changes[name] = group_sums(ESTIMATORS["per_decision"](slope.probe, moved), slope.groups)
            if slope.probe.quantity.on_policy:
                weights = last_weights(
                    weights_of(slope.probe, moved),
                    slope.probe.mask,
                    token_dependent=bool((moved.token != 0).any()),
                )
                doubts.append(check_weights(weights).reason)
        found.append(
            PlaceFigures(
                level=group_sums(value(slope.probe), slope.groups),
                products=products,
                changes=changes,
                doubt="; ".join(dict.fromkeys(filter(None, doubts))),
            )
        )
    return tuple(found)


def group_sums(sampled: Sampled, groups: IntArray) -> GroupSums:
    """An estimate with what each group of prompts adds to its error."""
    residuals = np.bincount(groups, weights=sampled.residuals) / len(groups)
    return GroupSums(sampled.value, residuals - residuals.mean())

"""The account of a quantity: what its places and steps add up to, with errors clustered by probe prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.results import FloatArray
from stepscope.results.ledger import Account, GroupSums, PlaceFigures, fold_sums, total
from stepscope.stats import Estimate, exact

ALL, HALF = "all", "half"
"""Sums of displacements that belong to a place: with all places, and with every second one left out."""

EARLIER, LATER = "earlier", "later"
"""The neighbours of a place."""

INTERPOLATION_LIMIT = 0.05
"""Share of the predicted change that interpolation may be off."""

ROUNDING_LIMIT = 0.05
"""Share of the predicted change that may be in no part: more than the rounding of a training in bfloat16."""


@dataclass(frozen=True)
class Batches:
    """What the batches of all steps did, by fold of the probe.

    Attributes:
        shares: (fold,) of the probe sequences.
        tokens: (fold,) all entries of tokens.
        bonus: (fold,) of an entropy bonus.
        decay: (fold,) of a decay inside the gradient.
        through_optimizer: (fold,) all entries of tokens with nothing held; None where they were not made.
    """

    shares: FloatArray
    tokens: FloatArray
    bonus: FloatArray
    decay: FloatArray
    through_optimizer: FloatArray | None


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What an account is of.

    Attributes:
        label: the quantity's name in the ledger.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        unit: of the quantity.
        baseline: rungs of the baseline ladder in use.
        pooled: whether groups are pools of prompts.
        every: distance of the places in steps.
    """

    label: str
    normalisation: str
    version: str
    unit: str
    baseline: str
    pooled: bool
    every: int


def make_account(
    looks: Looks,
    places: Sequence[PlaceFigures],
    batches: Batches,
    ends: tuple[GroupSums, GroupSums],
) -> Account:
    """Add up an account.

    Args:
        looks: what it is of.
        places: where the gradient was taken, from the start of the path to its end.
        batches: what the entries of all steps add up to.
        ends: the quantity before the first step and after the last.
    """
    unit = looks.unit
    errors = f"clustered by probe prompts{' (pooled at random)' if looks.pooled else ''}"
    along = f"gradient at every {looks.every} step(s), baseline {looks.baseline}, {errors}"
    by_folds = f"{along}, from {len(batches.shares)} folds"

    def product(name: str) -> GroupSums:
        return total(place.products[name] for place in places)

    whole, before, decay = (product(f"{ALL}.{part}") for part in ("whole", "momentum_before", "decay"))
    tokens, bonus, coupled = (
        fold_sums(batches.shares, rows) for rows in (batches.tokens, batches.bonus, batches.decay)
    )
    parts = tokens.value + bonus.value + before.value + decay.value + coupled.value
    predicted = GroupSums(parts, whole.groups)
    if not (batches.bonus.any() or batches.decay.any()):
        tokens = GroupSums(tokens.value, whole.groups - before.groups - decay.groups)
    decayed = decay.estimate(unit, f"weight decay of every step, {along}")
    if batches.decay.any():
        decayed = coupled.estimate(unit, f"weight decay of every step, {by_folds}")
    realised = ends[1].plus(ends[0], -1.0)
    closing = realised.plus(predicted, -1.0).estimate(unit, f"realised less predicted, {errors}")
    chained = total(
        [
            *(place.changes[LATER].scaled(0.5) for place in places[:-1]),
            *(place.changes[EARLIER].scaled(-0.5) for place in places[1:]),
        ]
    )
    weighted = f"importance weights from place to place, both ways, {errors}"
    doubts = list(dict.fromkeys(place.doubt for place in places if place.doubt))
    interpolation = _interpolation(whole, product(f"{HALF}.whole"), len(places), unit, errors)
    estimate = predicted.estimate(unit, f"sum of all parts, {along}")
    known = interpolation.reliable and interpolation.resolved
    if known and abs(interpolation.value) > INTERPOLATION_LIMIT * abs(predicted.value):
        off = abs(interpolation.value / predicted.value)
        estimate = estimate.doubted(
            f"interpolation between places is about {off:.0%} off; take a lower --every"
            if looks.every > 1
            else f"the mean of two gradients is about {off:.0%} off: they turn within single steps"
        )
    left = whole.value - parts
    if abs(left) > ROUNDING_LIMIT * max(abs(parts), estimate.stderr):
        estimate = estimate.doubted(
            f"{left:.2g} {unit} of the change along the displacements are in no part: on this model the "
            "recorded token weights do not make the recorded gradients"
        )
    if closing.resolved:
        estimate = estimate.doubted(
            f"the account does not close: {closing.value:.2g} {unit} of the realised change are in no part"
        )
    nothing = None
    if batches.through_optimizer is not None:
        nothing = fold_sums(batches.shares, batches.through_optimizer)
    return Account(
        quantity=looks.label,
        normalisation=looks.normalisation,
        version=looks.version,
        unit=unit,
        before=ends[0].estimate(unit, f"sampled before the first step, {errors}"),
        after=ends[1].estimate(unit, f"sampled after the last step, {errors}"),
        predicted=estimate,
        realised=realised.estimate(unit, f"sampled at both ends, paired by prompt, {errors}"),
        closing_error=closing,
        chained=chained.estimate(unit, weighted).doubted(*doubts[:1]),
        curvature=chained.plus(predicted, -1.0)
        .estimate(unit, f"less predicted, {weighted}")
        .doubted(*doubts[:1]),
        tokens=tokens.estimate(unit, f"entries of all tokens, {along}"),
        bonus=bonus.estimate(unit, f"entropy bonus of every step, {by_folds}")
        if batches.bonus.any()
        else exact(0.0, len(whole.groups), unit, "no entropy bonus"),
        momentum_before=before.estimate(unit, f"moments before the first step, {along}")
        if before.groups.any()
        else exact(before.value, len(whole.groups), unit, "no moments before the first step"),
        decay=decayed,
        rounding=exact(left, len(whole.groups), unit, "along the displacements, less predicted"),
        interpolation=interpolation,
        through_optimizer=None
        if nothing is None
        else nothing.estimate(unit, f"entries of all tokens with nothing held, {by_folds}"),
    )


def _interpolation(whole: GroupSums, half: GroupSums, places: int, unit: str, errors: str) -> Estimate:
    """How far the sum is off: interpolated gradients err by the square of the distance of the places."""
    method = f"a third of the difference to half as many places, {errors}"
    if places < 4:
        return Estimate(
            math.nan,
            math.nan,
            len(whole.groups),
            unit,
            method,
            False,
            f"{places} places are too few to halve",
        )
    return half.plus(whole, -1.0).scaled(1 / 3).estimate(unit, method)


def halved(places: Sequence[int]) -> tuple[int, ...]:
    """Every second place, counted from the end, and the start."""
    return tuple(sorted({places[0], *places[::-2]}))


def padded(weights: FloatArray, places: Sequence[int], all_places: Sequence[int]) -> FloatArray:
    """Rows of weights put at their places among all, zero elsewhere."""
    found = np.zeros((len(all_places), weights.shape[1]))
    found[[list(all_places).index(place) for place in places]] = weights
    return found

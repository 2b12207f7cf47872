"""Kinship over the steps of a training: sums, shares and how far tabular theory goes, with intervals.

A step that was looked at stands for its neighbours, with weight q_s. The figure of a kin is X = sum_s q_s
X_s, and its error is over the training's prompts g as a sample, by what each takes part in (the projection of
a sum over pairs, Hoeffding 1948; for pairs of clusters Fafchamps & Gubert 2007),

    r_g = sum_s q_s (done by its tokens + received at its positions from others), less the mean

so that the draw of tokens is in it; with the error over held-out prompts added to the variance. A share X/T
has the errors of (r_X - X/T r_T)/T (delta method). Correlations are about 0, with the jackknife over training
prompts (tokens) or steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.intervals import FEWEST, student
from stepscope.results import FloatArray
from stepscope.results.kinship import (
    FORMULAS,
    HELD_OUT,
    OWN_STEP,
    WHOLE,
    KinRows,
    KinShare,
    Kinship,
    KinStep,
    KinTheory,
    KinTotal,
)
from stepscope.stats import Estimate, estimate_from_sums, jackknife

ALL, EARLY, LATE = "all", "first third", "last third"

UNIT = "nats/token"

FEWEST_STEPS = 3
"""Steps in a third below which nothing is said of it."""


def looked_at(count: int, every: int) -> list[tuple[int, int]]:
    """Steps that are looked at, and how many each stands for: the middle of every ``every`` in turn."""
    starts = range(0, count, every)
    windows = [(start, min(start + every, count)) for start in starts]
    return [((start + stop - 1) // 2, stop - start) for start, stop in windows]


@dataclass(frozen=True)
class _Figure:
    """A figure with what its parts add to the error.

    Attributes:
        value: the figure.
        prompts: (prompt,) of the training.
        groups: (group,) of held-out prompts; zeros where none enter.
        draw: variance by drawing tokens, which the prompts' parts have in them.
    """

    value: float
    prompts: FloatArray
    groups: FloatArray
    draw: float

    def plus(self, other: _Figure, factor: float = 1.0) -> _Figure:
        """``self + factor * other``; not for the draw, which parts may share."""
        return _Figure(
            self.value + factor * other.value,
            self.prompts + factor * other.prompts,
            self.groups + factor * other.groups,
            math.nan,
        )

    def over(self, whole: _Figure) -> _Figure:
        """Their ratio."""
        if not whole.value:
            return _Figure(math.nan, self.prompts * np.nan, self.groups * np.nan, math.nan)
        ratio = self.value / whole.value
        rest = self.plus(whole, -ratio)
        return _Figure(ratio, rest.prompts / whole.value, rest.groups / whole.value, math.nan)

    def estimate(self, unit: str, method: str) -> Estimate:
        """With its interval."""
        parts = self.prompts - self.prompts.mean()
        many, some = len(parts), len(self.groups)
        variance = many / (many - 1) * float((parts**2).sum()) if many > 1 else math.nan
        if self.groups.any():
            variance += some / (some - 1) * float((self.groups**2).sum()) if some > 1 else math.nan
        also = " and by held-out prompts" * bool(self.groups.any())
        how = f"{method}; clustered by training prompts{also}"
        return estimate_from_sums(self.value, parts, unit=unit, method=how, stderr=math.sqrt(variance))


@dataclass(frozen=True)
class _Steps:
    """Some steps, with the numbers of their prompts over the whole training."""

    steps: Sequence[KinStep]
    weights: FloatArray
    prompts: Sequence[list[int]]
    num_prompts: int

    @classmethod
    def of(cls, steps: Sequence[KinStep], weights: FloatArray) -> _Steps:
        known: dict[str, int] = {}
        prompts = [[known.setdefault(key, len(known)) for key in step.prompts] for step in steps]
        return cls(steps, weights, prompts, len(known))

    def figure(self, look: str, kin: str, through: str) -> _Figure:
        parts = np.zeros(self.num_prompts)
        value, draw, groups = 0.0, 0.0, np.zeros(1)
        for step, weight, prompts in zip(self.steps, self.weights, self.prompts, strict=True):
            part = step.part(look, kin, through)
            np.add.at(parts, prompts, weight * (part.done + part.received))
            value += weight * float(part.done.sum())
            draw += weight**2 * part.draw_variance
            groups = groups + weight * part.groups if len(part.groups) else groups
        return _Figure(value, parts, groups, draw)

    def kins(self, look: str) -> list[str]:
        found = [p.kin for p in self.steps[0].parts if p.look == look and p.through == WHOLE]
        return list(dict.fromkeys(found))

    def total(self, look: str, through: str) -> _Figure:
        first, *rest = (self.figure(look, kin, through) for kin in self.kins(look))
        for other in rest:
            first = first.plus(other)
        return first


def kin_account(
    steps: Sequence[KinStep],
    weights: Sequence[int],
    *,
    first_step: int,
    last_step: int,
    every: int,
    num_probe_prompts: int,
    ledger_tokens: Estimate,
) -> Kinship:
    """Add up the steps.

    Args:
        steps: those that were looked at.
        weights: how many steps each stands for.
        first_step: number of the first step in the account.
        last_step: of the last.
        every: one in so many was looked at.
        num_probe_prompts: held out.
        ledger_tokens: what the ledger's entries of the same tokens add up to, with the same weights.
    """
    stand = np.asarray(weights, dtype=np.float64)
    numbers = np.array([step.number for step in steps], dtype=np.int64)
    place = (numbers - first_step) / (last_step - first_step + 1)
    windows = {ALL: np.full(len(steps), True), EARLY: place < 1 / 3, LATE: place >= 2 / 3}
    shares: list[KinShare] = []
    totals: list[KinTotal] = []
    for name, chosen in windows.items():
        if name != ALL and chosen.sum() < FEWEST_STEPS:
            continue
        some = [step for step, own in zip(steps, chosen, strict=True) if own]
        more = _window(name, _Steps.of(some, stand[chosen]))
        shares, totals = shares + more[0], totals + more[1]
    everything = _Steps.of(steps, stand)
    return Kinship(
        first_step=first_step,
        last_step=last_step,
        every=every,
        steps=numbers,
        num_prompts=everything.num_prompts,
        num_probe_prompts=num_probe_prompts,
        tokens=sum(step.tokens for step in steps),
        drawn=sum(step.drawn for step in steps),
        shares=tuple(shares),
        totals=tuple(totals),
        theory=tuple(_theory(name, everything) for name in FORMULAS),
        ledger_tokens=ledger_tokens,
    )


def _window(name: str, chosen: _Steps) -> tuple[list[KinShare], list[KinTotal]]:
    looks = list(dict.fromkeys(part.look for part in chosen.steps[0].parts))
    along = f"first order from where each of {len(chosen.steps)} steps starts"
    whole, own = f"{along}, over the rest of the path", f"{along}, own step"
    held_out = chosen.total(HELD_OUT, WHOLE)
    shares, totals = [], []
    for look in looks:
        everything = chosen.total(look, WHOLE)
        totals.append(
            KinTotal(
                steps=name,
                look=look,
                influence=everything.estimate(UNIT, whole),
                own_step=chosen.total(look, OWN_STEP).estimate(UNIT, own),
            )
        )
        for kin in chosen.kins(look):
            figure = chosen.figure(look, kin, WHOLE)
            shares.append(
                KinShare(
                    steps=name,
                    look=look,
                    kin=kin,
                    influence=figure.estimate(UNIT, whole),
                    own_step=chosen.figure(look, kin, OWN_STEP).estimate(UNIT, own),
                    share=figure.over(everything).estimate("", f"of the whole look, {whole}"),
                    against_held_out=figure.over(held_out).estimate(
                        "", f"over all on held-out prompts, {whole}"
                    ),
                    draw_stderr=math.sqrt(figure.draw),
                    pairs=sum(step.pairs[look].get(kin, 0) for step in chosen.steps),
                )
            )
    return shares, totals


def _theory(name: str, chosen: _Steps) -> KinTheory:
    """The correlations of a formula."""
    squares, products, own = (np.zeros(chosen.num_prompts) for _ in range(3))
    sums = []
    for step, prompts in zip(chosen.steps, chosen.prompts, strict=True):
        formula = next(f for f in step.formulas if f.name == name)
        np.add.at(squares, prompts, formula.squares)
        np.add.at(products, prompts, formula.products)
        np.add.at(own, prompts, step.own_squares)
        sums.append(float(formula.sums.sum()))
    at_steps = {}
    for look in dict.fromkeys(part.look for part in chosen.steps[0].parts):
        moved = [
            sum(float(step.part(look, kin, WHOLE).done.sum()) for kin in chosen.kins(look))
            for step in chosen.steps
        ]
        x, y = np.array(sums), np.array(moved)
        at_steps[look] = _correlation(x * y, x**2, y**2, f"over steps, {look}")
    return KinTheory(name, _correlation(products, squares, own, "over tokens by prompt"), at_steps)


def _correlation(products: FloatArray, first: FloatArray, second: FloatArray, method: str) -> Estimate:
    """Sum of products over the root of those of squares; jackknife over parts, on the scale of atanh."""
    count = len(products)

    def value(of: Callable[[FloatArray], float | FloatArray]) -> float | FloatArray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(of(products) / np.sqrt(of(first) * of(second)), -1.0, 1.0)

    whole = float(value(lambda part: float(part.sum())))
    with np.errstate(divide="ignore"):
        without = np.arctanh(value(lambda part: part.sum() - part))
    _, error = jackknife(without, math.atanh(whole) if abs(whole) < 1 else math.nan)
    reason = f"{count} parts, where an interval needs at least {FEWEST}" if count < FEWEST else ""
    if not math.isfinite(error):
        return Estimate(whole, math.nan, count, "", f"correlation about 0, {method}", not reason, reason)
    ends = np.tanh(math.atanh(whole) + np.array([-1, 1]) * student(count) * error)
    return Estimate(
        whole,
        error * (1 - whole**2),
        count,
        "",
        f"correlation about 0, jackknife {method}",
        not reason,
        reason,
        float(ends[0]),
        float(ends[1]),
    )


def kin_rows(steps: Sequence[KinStep], weights: Sequence[int]) -> KinRows:
    """The table of all steps that were looked at."""
    tables = []
    for step, weight in zip(steps, weights, strict=True):
        count = len(step.prompts)
        for part in step.parts:
            if part.through != WHOLE:
                continue
            tables.append(
                KinRows(
                    step=np.full(count, step.number, dtype=np.int64),
                    stands_for=np.full(count, weight, dtype=np.int64),
                    prompt=np.array(step.prompts, dtype=np.object_),
                    sequence_id=step.sequence_ids,
                    look=np.full(count, part.look, dtype=np.object_),
                    kin=np.full(count, part.kin, dtype=np.object_),
                    influence=part.done,
                    own_step=step.part(part.look, part.kin, OWN_STEP).done,
                    received=part.received,
                )
            )
    return KinRows.joined(tables)

"""Sums of kinship over steps, with what each prompt adds to their errors.

The error of a figure is over the prompts that pushed, as a sample, by what each takes part in (the projection
of a sum over pairs, Hoeffding 1948; for pairs of clusters Fafchamps & Gubert 2007); see
:mod:`stepscope.measure.ledger.kin_account`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.intervals import FEWEST, student
from stepscope.results import FloatArray
from stepscope.results.kinship import WHOLE, KinStep
from stepscope.stats import Estimate, estimate_from_sums, jackknife


@dataclass(frozen=True)
class KinFigure:
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

    def plus(self, other: KinFigure, factor: float = 1.0) -> KinFigure:
        """``self + factor * other``; not for the draw, which parts may share."""
        return KinFigure(
            self.value + factor * other.value,
            self.prompts + factor * other.prompts,
            self.groups + factor * other.groups,
            math.nan,
        )

    def times(self, factor: float) -> KinFigure:
        """``factor * self``."""
        return KinFigure(
            factor * self.value, factor * self.prompts, factor * self.groups, factor**2 * self.draw
        )

    def over(self, whole: KinFigure) -> KinFigure:
        """Their ratio."""
        if not whole.value:
            return KinFigure(math.nan, self.prompts * np.nan, self.groups * np.nan, math.nan)
        ratio = self.value / whole.value
        rest = self.plus(whole, -ratio)
        return KinFigure(ratio, rest.prompts / whole.value, rest.groups / whole.value, math.nan)

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
class KinSteps:
    """Some steps, with the numbers of their prompts over the whole training.

    Attributes:
        steps: those that were looked at.
        weights: (step,) what each counts.
        prompts: (step,) numbers of its prompts.
        num_prompts: different ones.
    """

    steps: Sequence[KinStep]
    weights: FloatArray
    prompts: Sequence[list[int]]
    num_prompts: int

    @classmethod
    def of(cls, steps: Sequence[KinStep], weights: Sequence[float] | FloatArray) -> KinSteps:
        """Number the prompts."""
        known: dict[str, int] = {}
        prompts = [[known.setdefault(key, len(known)) for key in step.prompts] for step in steps]
        return cls(steps, np.asarray(weights, dtype=np.float64), prompts, len(known))

    def figure(self, look: str, kin: str, through: str) -> KinFigure:
        """What was done to one kin of a look, per position of it.

        A prompt brings positions, too, so that its part is what it takes part in less their share of the
        whole.
        """
        parts = np.zeros(self.num_prompts)
        value, draw, groups = 0.0, 0.0, np.zeros(1)
        for step, weight, prompts in zip(self.steps, self.weights, self.prompts, strict=True):
            part = step.part(look, kin, through)
            whole = float(part.done.sum())
            brought = whole * step.at_prompts[look] / step.positions[look]
            np.add.at(parts, prompts, weight * (part.done + part.received - brought))
            value += weight * whole
            draw += weight**2 * part.draw_variance
            groups = groups + weight * part.groups if len(part.groups) else groups
        return KinFigure(value, parts, groups, draw)

    def kins(self, look: str) -> list[str]:
        """Kin that a look has."""
        found = [p.kin for p in self.steps[0].parts if p.look == look and p.through == WHOLE]
        return list(dict.fromkeys(found))

    def total(self, look: str, through: str) -> KinFigure:
        """What was done to the whole of a look."""
        first, *rest = (self.figure(look, kin, through) for kin in self.kins(look))
        for other in rest:
            first = first.plus(other)
        return first

    def at_tokens(self, formula: str) -> Estimate:
        """Correlation about 0 of a formula of tabular theory with the effects on the own position."""
        squares, products, own = (np.zeros(self.num_prompts) for _ in range(3))
        for step, prompts in zip(self.steps, self.prompts, strict=True):
            known = next(f for f in step.formulas if f.name == formula)
            np.add.at(squares, prompts, known.squares)
            np.add.at(products, prompts, known.products)
            np.add.at(own, prompts, step.own_squares)
        return about_zero(products, squares, own, "over tokens by prompt")


def about_zero(products: FloatArray, first: FloatArray, second: FloatArray, method: str) -> Estimate:
    """Correlation about 0: sum of products over the root of those of squares.

    Args:
        products: (part,) sums of x y.
        first: (part,) sums of x^2.
        second: (part,) sums of y^2.
        method: what the parts are; recorded.

    Returns:
        With an interval by the jackknife over parts, on the scale of atanh.
    """
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

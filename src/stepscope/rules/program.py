"""Which weights the sequences of a batch should have: the most reward at a given change of the entropy.

A step is d(x) = (what is there without the batch) + sum_i x_i v_i over units i (sequences, or prompts), v_i =
P c_i with preconditioner and clip coefficient as they are; x = 1 is the step itself. With y = x - 1 a
quantity changes by

    Q(x) = Q(1) + q'y + y'By/2

where q is the first-order influence times lr, to second order q_i = lr grad Q . v_i + lr^2 v_i' Hess(Q) d(1)
and B_ij = lr^2 v_i' Hess(Q) v_j; to first order B = 0. The program

    maximise    r'y + y'B_R y/2 - z se_R(y)
    subject to  H(1) + h'y + y'B_H y/2 - z se_H(y) >= e,
                x'Kx <= 1'K1,  K_ij = c_i' P c_j,     0 <= x_i <= most

holds the step to its own length in the metric of P (so that no direction wins by being longer), and counts
what it gains over the step itself less z standard errors of that, se(y)^2 = y'Sy: where nothing is known to
be better than the step, x = 1 is best. To first order it is convex, and its maximum is global. With curved
effects there may be several: the best of those that a search from the step's own weights and from some at
random comes to is taken, which is no proof that there is none better.

S is the covariance of q over folds of the probe's prompts, shrunk to a multiple of K, which it would be if
gradients of prompts had the covariance 1/P: of a few folds alone it has directions without any error, and a
program finds those (intensity by Ledoit & Wolf 2004, Schaefer & Strimmer 2005). What noise in B adds is not
in it, and shows where weights are judged on other prompts than those that chose them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.results import BoolArray, FloatArray, IntArray

Aim = Literal["reward", "entropy"]

TOLERANCE = 1e-6
"""Largest violation of a constraint that a solution may have, in units of the constraint's own scale."""

MOST_UNITS = 160
"""Sequences that have a weight each; of a batch with more every prompt has one (time is cubic)."""

MORE_STARTS = 11
"""Random weights that a search with second-order effects starts from, beside the step's own."""

SMOOTH = 1e-6
"""Share of the scale of an error below which it is rounded off, so that it has a derivative at y = 0."""


@dataclass(frozen=True)
class Effect:
    """What units of a batch do to a quantity by one step, from each fold of a probe by itself.

    A fold's values are those of the whole estimate plus what the fold adds to its error over its share, so
    that their mean by shares is the estimate.

    Attributes:
        shares: (fold,) share of the probe's sequences; they sum to 1.
        own: (fold,) change by the step as it is, Q(1).
        slope: (fold, unit) q.
        bend: (fold, unit, unit) B; None to first order.
    """

    shares: FloatArray
    own: FloatArray
    slope: FloatArray
    bend: FloatArray | None = None

    def on(self, folds: BoolArray) -> Effect:
        """The effect as some folds alone have it."""
        part = self.shares[folds]
        bend = None if self.bend is None else self.bend[folds]
        return Effect(part / part.sum(), self.own[folds], self.slope[folds], bend)

    def scaled(self, factor: float) -> Effect:
        """``factor`` times it."""
        bend = None if self.bend is None else factor * self.bend
        return replace(self, own=factor * self.own, slope=factor * self.slope, bend=bend)

    def mean(self) -> tuple[float, FloatArray, FloatArray | None]:
        """Q(1), q and B over all folds."""
        bend = None if self.bend is None else np.einsum("f,fij->ij", self.shares, self.bend)
        return float(self.shares @ self.own), self.shares @ self.slope, bend

    def gain(self, y: FloatArray) -> FloatArray:
        """(fold,) Q(x) - Q(1)."""
        first = self.slope @ y
        return first if self.bend is None else first + np.einsum("i,fij,j->f", y, self.bend, y) / 2

    def covariance(self, gram: FloatArray) -> FloatArray:
        """(unit, unit) S of the mean of q, shrunk to a multiple of K; zero of a single fold."""
        count = len(self.shares)
        if count < 2:
            return np.zeros_like(gram)
        away = self.shares[:, None] * (self.slope - self.shares @ self.slope)
        sample = count / (count - 1) * away.T @ away
        size = float(np.trace(gram))
        if not size > 0:
            return sample
        target = float(np.trace(sample)) / size * gram
        apart = float(((sample - target) ** 2).sum())
        squares = float(((away**2).sum(1) ** 2).sum()) * count**2
        noise = max(squares / count - float((sample**2).sum()), 0.0) / (count - 1)
        weight = min(1.0, noise / apart) if apart > 0 else 1.0
        return np.asarray((1 - weight) * sample + weight * target)


@dataclass(frozen=True)
class Program:
    """The program of one batch.

    Attributes:
        reward: effect on the expected reward.
        entropy: effect on the entropy.
        gram: (unit, unit) K.
        units: (seq,) unit of each sequence of the batch, -1 for one without a part in the step.
        most: largest weight; at least 1.
        caution: z, standard errors that a gain over the step is counted less.
    """

    reward: Effect
    entropy: Effect
    gram: FloatArray
    units: IntArray
    most: float = 2.0
    caution: float = 1.0

    def spread(self, weights: FloatArray) -> FloatArray:
        """(seq,) the weight of each sequence, 1 for one without a part in the step."""
        found = np.ones(len(self.units))
        found[self.units >= 0] = weights[self.units[self.units >= 0]]
        return found

    def on(self, folds: BoolArray) -> Program:
        """The program as some folds of the probe alone have it."""
        return replace(self, reward=self.reward.on(folds), entropy=self.entropy.on(folds))

    def sure(self, aim: Aim, weights: FloatArray) -> float:
        """What a quantity changes by, less z standard errors of the gain over the step."""
        own, value, _ = self._sure(aim)
        return own + value(weights - 1)[0]

    def solve(
        self,
        *,
        aim: Aim = "reward",
        at_least: float | None = None,
        start: FloatArray | None = None,
    ) -> FloatArray:
        """(unit,) the best weights.

        Args:
            aim: what is maximised; the other is held.
            at_least: the other's change, less z standard errors of its gain over the step, is at least that;
                None leaves it free.
            start: weights to start from, that meet the constraints best; the step's own by default.

        Raises:
            MeasurementError: no weights within the bounds meet the constraint, or the solver gives up.
        """
        from scipy.optimize import minimize  # settings are read without it

        _, objective, scale = self._sure(aim)
        other, held, held_scale = self._sure("entropy" if aim == "reward" else "reward")
        count = len(self.gram)
        length = float(self.gram.sum())
        if not length > 0:
            return np.ones(count)

        def room(y: FloatArray) -> tuple[float, FloatArray]:
            pulled = self.gram @ (1 + y)
            return 1 - float((1 + y) @ pulled) / length, -2 * pulled / length

        limits = [room]
        if at_least is not None:

            def level(y: FloatArray) -> tuple[float, FloatArray]:
                value, slope = held(y)
                return (other + value - at_least) / held_scale, slope / held_scale

            limits.append(level)

        def down(y: FloatArray) -> tuple[float, FloatArray]:
            value, slope = objective(y)
            return -value / scale, -slope / scale

        def missed(y: FloatArray) -> float:
            return max(-limit(y)[0] for limit in limits)

        begin = np.zeros(count) if start is None else start - 1
        ends, said = [np.zeros(count), begin], ""  # of equals the step's own weights come first
        for first in [begin, *self._further_starts()]:
            found = minimize(
                down,
                first,
                jac=True,
                method="SLSQP",
                bounds=[(-1.0, self.most - 1)] * count,
                constraints=[_constraint(limit) for limit in limits],
                options={"ftol": 1e-10, "maxiter": 500},
            )
            ends.append(np.clip(found.x, -1.0, self.most - 1))
            said = said or str(found.message)
        met = [y for y in ends if missed(y) <= TOLERANCE]
        if not met:
            what = "entropy" if aim == "reward" else "reward"
            raise MeasurementError(
                f"no weights up to {self.most:g} change the {what} by {at_least} (missed by "
                f"{min(map(missed, ends)):.1g} of its scale; {said}); ask for less"
            )
        return np.asarray(1 + min(met, key=lambda y: down(y)[0]))

    def _further_starts(self) -> list[FloatArray]:
        """Weights less 1 to start from as well, where curved effects may have several best places."""
        if self.reward.bend is None and self.entropy.bend is None:
            return []
        random = np.random.default_rng(0)
        drawn = random.uniform(0.0, self.most, (MORE_STARTS, len(self.gram)))
        longer = np.sqrt(np.einsum("si,ij,sj->s", drawn, self.gram, drawn) / self.gram.sum())
        return [x / max(1.0, size) - 1 for x, size in zip(drawn, longer, strict=True)]

    def _sure(self, aim: Aim) -> tuple[float, Callable[[FloatArray], tuple[float, FloatArray]], float]:
        """Q(1); the gain less z standard errors, with its derivative, as a function of y; its scale."""
        effect = self.reward if aim == "reward" else self.entropy
        own, slope, bend = effect.mean()
        noise = effect.covariance(self.gram)
        z = self.caution
        least = (SMOOTH**2) * float(np.trace(noise))

        def gain(y: FloatArray) -> tuple[float, FloatArray]:
            curved = np.zeros_like(slope) if bend is None else bend @ y
            pulled = noise @ y
            error = float(np.sqrt(y @ pulled + least))
            value = float(slope @ y + curved @ y / 2)
            if not error > 0 or z == 0:
                return value, slope + curved
            return value - z * (error - least**0.5), slope + curved - z * pulled / error

        size = float(np.linalg.norm(slope)) + (0.0 if bend is None else float(np.linalg.norm(bend)))
        return own, gain, size if size > 0 else 1.0


def _constraint(limit: Callable[[FloatArray], tuple[float, FloatArray]]) -> dict[str, Any]:
    return {"type": "ineq", "fun": lambda y: limit(y)[0], "jac": lambda y: limit(y)[1]}


def units_of(weighted: BoolArray, prompts: IntArray, most: int = MOST_UNITS) -> IntArray:
    """(seq,) unit of each sequence: itself, or its prompt where too many have a part; -1 for one without.

    Args:
        weighted: (seq,) whether a sequence has a part in the step.
        prompts: (seq,) prompt of each.
        most: largest number of sequences with a unit each.
    """
    own = np.arange(len(weighted)) if int(weighted.sum()) <= most else prompts
    found = np.full(len(weighted), -1)
    found[weighted] = np.unique(own[weighted], return_inverse=True)[1]
    return found


def members(units: IntArray) -> FloatArray:
    """(unit, seq) 1 where a sequence belongs to a unit."""
    count = int(units.max(initial=-1)) + 1
    return np.asarray(units[None, :] == np.arange(count)[:, None], dtype=np.float64)


def no_program(sequences: int) -> Program:
    """That of a batch without a step: no sequence has a weight."""
    nothing = Effect(np.ones(1), np.zeros(1), np.zeros((1, 0)))
    return Program(nothing, nothing, np.zeros((0, 0)), np.full(sequences, -1))

"""The frontier of a step: what other weights of the batch's sequences would buy, predicted and realised.

Weights are the program's (:mod:`stepscope.rules.program`), at a few levels of the entropy from that of the
most reward to the most that any weights reach. They are chosen by one half of the probe's prompts and judged
on the other, both ways (cross-fitting, Chernozhukov et al. 2018): chosen and judged on the same prompts they
look better than they are. The errors of the two halves are added as if they were one and the same, since
where influences are noise alone both products are nearly the same number; where they are not, the interval
is up to 1.4 times too long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.criteria.remade import RemadeSteps
from stepscope.measure.curvature.pairs import PairKernel
from stepscope.measure.frontier.effects import Folds, first_order, second_order
from stepscope.measure.quantity.estimators import Sampled
from stepscope.measure.quantity.probe import Bindings, bindings_on
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.passes import Budget, track
from stepscope.policy.state import Policy
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts
from stepscope.results.frontier import Frontier, FrontierPoint, Place, RulePoint
from stepscope.rules.program import Effect, Program
from stepscope.stats import Estimate, clustered_estimate, estimate_from_sums

IN_SAMPLE = "predicted on the probe prompts that chose the weights"
"""Why a figure is too good."""

Key = tuple[str, float]
"""Name and level of a point."""


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """How a frontier is made.

    Attributes:
        levels: points of the curve; at least 2, its ends.
        most: largest weight of a sequence.
        caution: standard errors that a predicted gain is counted less.
        num_folds: most folds of probe prompts, to first order.
        lr: learning rate of the steps; the step's own by default.
        baseline: rung of the baseline ladder.
        realise: whether the steps are taken and measured, too; a gradient of the batch and a forward pass
            over the probe batch for each point and half.
        seed: of the halves of the probe.
    """

    levels: int = 5
    most: float = 2.0
    caution: float = 1.0
    num_folds: int = 64
    lr: float | None = None
    baseline: str = "best"
    realise: bool = True
    seed: int = 0


def frontier(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    *,
    kernels: Sequence[PairKernel] | None = None,
    rules: Mapping[str, BoolArray] | None = None,
    options: FrontierOptions = FrontierOptions(),
    bindings: Bindings | None = None,
    budget: Budget = Budget(),
) -> Frontier:
    """The most reward that non-negative weights of a batch's sequences buy at a given change of the entropy.

    Weights between 0 and ``most`` whose step is no longer than the batch's own in the metric of its
    preconditioner. Prediction holds preconditioner and clip coefficient; realised steps do not.

    Args:
        policy: where the step starts, with its optimizer's state; restored bitwise.
        step: from an optimizer with a preconditioner.
        probe: the probe batch, with rewards; at least four prompts.
        kernels: second-order kernels of reward per response and entropy per token on that probe batch, from
            :func:`stepscope.second_order_kernel`; to first order without them.
        rules: name to (tok,) tokens that a rule leaves out of the loss, measured on the same plane.
        options: levels, bounds, errors.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the optimizer has no preconditioner, a learning rate of zero, too few prompts, or
            kernels of another step.
    """
    if options.levels < 2 or options.most < 1 or options.caution < 0:
        raise MeasurementError(
            f"frontier: levels {options.levels}, most {options.most:g} and caution {options.caution:g}; "
            "expected at least 2, 1 and 0"
        )
    if probe.num_prompts < 4:
        raise MeasurementError(
            f"frontier: {probe.num_prompts} probe prompts cannot be halved with an error; take at least 4"
        )
    known = bindings_on(bindings, policy, probe, step.direction, budget)
    remade = RemadeSteps(
        policy, step, probe, lr=options.lr, baseline=options.baseline, bindings=known, budget=budget
    )
    entropy, reward = remade.bound
    if kernels is None:
        program, folds = first_order(
            policy,
            step,
            probe,
            (reward, entropy),
            lr=remade.lr,
            num_folds=options.num_folds,
            budget=budget,
        )
    else:
        program, folds = second_order(policy, step, probe, kernels, lr=remade.lr, budget=budget)
    program = replace(program, most=options.most, caution=options.caution)
    half = halves(len(folds.shares), options.seed)
    whole = chosen(program, options.levels)
    by_half = [chosen(program.on(half == h), options.levels) for h in range(2)]
    how = f"{'first' if kernels is None else 'second'} order at lr {remade.lr:g}, given the update batch"
    judged = _Judged(program, half, how)
    measured = _Measured(remade, folds, half) if options.realise else None
    points = []
    for key in track(list(whole), "frontier", budget):
        name, level = key
        both = [choice[key] for choice in by_half]
        points.append(
            FrontierPoint(
                name=name,
                level=level,
                left_out=float((whole[key] < 0.01).mean()) if len(whole[key]) else 0.0,
                at_most=float((whole[key] > 0.99 * options.most).mean()) if len(whole[key]) else 0.0,
                in_sample=judged.in_sample(whole[key]),
                predicted=judged.place(both),
                realised=None if measured is None else measured.place([program.spread(x) for x in both]),
            )
        )
    own = judged.own()
    return Frontier(
        lr=remade.lr,
        order=1 if kernels is None else 2,
        units="sequences" if _single(program.units) else "prompts",
        num_units=len(program.gram),
        num_folds=len(folds.shares),
        most=options.most,
        caution=options.caution,
        entropy=own[0],
        reward=own[1],
        realised_entropy=None if measured is None else measured.own[0],
        realised_reward=None if measured is None else measured.own[1],
        points=tuple(points),
        rules=()
        if measured is None
        else tuple(
            RulePoint(name, int(gone.sum()), measured.without(gone)) for name, gone in (rules or {}).items()
        ),
        weights={label(key): program.spread(x) for key, x in whole.items()},
    )


def label(key: Key) -> str:
    """Name of a point, with its level where it has one."""
    name, level = key
    return name if math.isnan(level) else f"{name}_{level:g}"


def halves(count: int, seed: int) -> IntArray:
    """(fold,) 0 or 1, at random; folds of a probe are of one size or nearly."""
    return np.asarray(np.random.default_rng([seed, 3]).permutation(np.arange(count) % 2), dtype=np.int64)


def chosen(program: Program, levels: int) -> dict[Key, FloatArray]:
    """Weights by point: the curve from most reward to most entropy, and the two at the step's own changes."""
    count = len(program.gram)
    grid = np.linspace(0.0, 1.0, levels)
    if not count:
        nothing = np.ones(0)
        return {("frontier", float(t)): nothing for t in grid} | {
            (name, math.nan): nothing for name in ("same_entropy", "same_reward")
        }
    most = program.solve(aim="reward")
    least, widest = program.sure("entropy", most), program.solve(aim="entropy")
    high = program.sure("entropy", widest)
    found: dict[Key, FloatArray] = {("frontier", 0.0): most}
    last = most
    for t in grid[1:-1]:
        start = last if program.sure("entropy", last) >= least + t * (high - least) else widest
        last = program.solve(aim="reward", at_least=least + float(t) * (high - least), start=start)
        found["frontier", float(t)] = last
    found["frontier", 1.0] = widest
    step = np.ones(count)
    nan = math.nan
    found["same_entropy", nan] = program.solve(aim="reward", at_least=program.sure("entropy", step))
    found["same_reward", nan] = program.solve(aim="entropy", at_least=program.sure("reward", step))
    return found


def _single(units: IntArray) -> bool:
    known = units[units >= 0]
    return len(np.unique(known)) == len(known)


@dataclass(frozen=True)
class _Judged:
    """Predictions by a program, in sample and across halves."""

    program: Program
    half: IntArray
    how: str

    def own(self) -> tuple[Estimate, Estimate]:
        """Of the step as it is: entropy, reward."""
        entropy, reward = (
            self._estimate(effect, effect.own, unit, whole=True) for effect, unit in self._effects()
        )
        return entropy, reward

    def in_sample(self, weights: FloatArray) -> Place:
        """On the prompts that chose."""
        gains = [effect.gain(weights - 1) for effect, _ in self._effects()]
        return self._place(gains, whole=True).doubted(IN_SAMPLE)

    def place(self, by_half: Sequence[FloatArray]) -> Place:
        """Weights of each half on the other."""
        gains = []
        for effect, _ in self._effects():
            first, second = (effect.gain(x - 1) for x in by_half)
            gains.append(np.where(self.half == 1, first, second))
        return self._place(gains, whole=False)

    def _effects(self) -> tuple[tuple[Effect, str], tuple[Effect, str]]:
        return (self.program.entropy, "nats/token"), (self.program.reward, "reward")

    def _place(self, gains: Sequence[FloatArray], *, whole: bool) -> Place:
        found = [
            self._estimate(effect, values, unit, whole=whole)
            for (effect, unit), gain in zip(self._effects(), gains, strict=True)
            for values in (effect.own + gain, gain)
        ]
        return Place(entropy=found[0], reward=found[2], entropy_gain=found[1], reward_gain=found[3])

    def _estimate(self, effect: Effect, values: FloatArray, unit: str, *, whole: bool) -> Estimate:
        shares, count = effect.shares, len(effect.shares)
        parts = [np.ones(count, dtype=np.bool_)] if whole else [self.half == h for h in range(2)]
        sums, error = np.zeros(count), 0.0
        for part in parts:
            mean = float(shares[part] @ values[part] / shares[part].sum())
            sums[part] = shares[part] * (values[part] - mean)
            size = int(part.sum())
            error += float(np.sqrt(size / (size - 1) * (sums[part] ** 2).sum())) if size > 1 else math.nan
        where = "" if whole else ", weights of each half of the probe prompts on the other"
        return estimate_from_sums(
            float(shares @ values),
            sums,
            unit=unit,
            method=f"{self.how}{where}; errors over {count} folds of probe prompts",
            stderr=error,
        )


class _Measured:
    """True changes by steps made anew, across the halves of the probe."""

    def __init__(self, remade: RemadeSteps, folds: Folds, half: IntArray) -> None:
        self.remade = remade
        self.half = half[folds.labels]
        self.full, self.reason = remade.measured(remade.step.direction)
        self.how = f"per decision at lr {remade.lr:g}, step made anew, given the update batch"
        own = [remade.estimate(i, f, self.how, self.reason) for i, f in enumerate(self.full)]
        self.own = own[0], own[1]

    def place(self, factors: Sequence[FloatArray]) -> Place:
        """Weights of each half, measured on the other."""
        made = [self.remade.measured(self.remade.reweighted(x)) for x in factors]
        changes = [self._across(*both) for both in zip(made[0][0], made[1][0], strict=True)]
        reason = "; ".join(dict.fromkeys(r for r in (self.reason, *(r for _, r in made)) if r))
        full = [self._across(f, f) for f in self.full]
        how = f"{self.how}, weights of each half of the probe prompts on the other"
        found = [
            self.remade.estimate(i, values, how, reason, stderr=self._error(i, values))
            for i, (change, own) in enumerate(zip(changes, full, strict=True))
            for values in (change, change.plus(own, -1.0))
        ]
        return Place(entropy=found[0], reward=found[2], entropy_gain=found[1], reward_gain=found[3])

    def without(self, tokens: BoolArray) -> Place:
        """The step made without some tokens."""
        changes, reason = self.remade.measured(self.remade.without(tokens))
        reason = "; ".join(dict.fromkeys(r for r in (self.reason, reason) if r))
        found = [
            self.remade.estimate(i, values, self.how, reason)
            for i, (change, own) in enumerate(zip(changes, self.full, strict=True))
            for values in (change, change.plus(own, -1.0))
        ]
        return Place(entropy=found[0], reward=found[2], entropy_gain=found[1], reward_gain=found[3])

    def _across(self, first: Sampled, second: Sampled) -> Sampled:
        """Residuals are centred in each half, since each half has a step of its own."""
        values = np.where(self.half == 1, first.value + first.residuals, second.value + second.residuals)
        residuals = values.copy()
        for h in range(2):
            residuals[self.half == h] -= values[self.half == h].mean()
        return Sampled(float(values.mean()), residuals)

    def _error(self, which: int, sampled: Sampled) -> float:
        """Errors of the halves, added."""
        clusters = self.remade.bound[which].clusters
        return sum(
            clustered_estimate(
                sampled.value, np.where(self.half == h, sampled.residuals, 0.0), clusters, unit="", method=""
            ).stderr
            for h in range(2)
        )

"""``frontier.json``: the most reward that other weights of the batch buy at a change of the entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stepscope.results.frames import frame
from stepscope.results.records import FloatArray, Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Place(Record):
    """Where a step lies on the plane of entropy and reward, and its distance from the step as it is.

    Attributes:
        entropy: change of the entropy per token.
        reward: change of the expected reward.
        entropy_gain: the first less that of the step as it is, on the same samples.
        reward_gain: the second less that of the step as it is.
    """

    entropy: Estimate
    reward: Estimate
    entropy_gain: Estimate
    reward_gain: Estimate


@dataclass(frozen=True)
class FrontierPoint(Record):
    """One reweighting of the batch.

    Attributes:
        name: ``frontier`` for a point of the curve; ``same_entropy`` for most reward at the step's own change
            of the entropy, ``same_reward`` for most entropy at its own change of the reward.
        level: of a point of the curve, from 0 (most reward) to 1 (most entropy); nan of the others.
        left_out: share of the units whose weight is below a hundredth.
        at_most: share of the units whose weight is the largest allowed, within a hundredth.
        in_sample: predicted on the prompts that chose the weights: too good.
        predicted: by weights from one half of the probe's prompts, on the other half, both ways.
        realised: true changes by the same weights in steps made anew, on the half that did not choose; None
            where no step was taken.
    """

    name: str
    level: Number
    left_out: float
    at_most: float
    in_sample: Place
    predicted: Place
    realised: Place | None


@dataclass(frozen=True)
class RulePoint(Record):
    """A step made anew with the tokens of a published rule left out of the loss.

    Attributes:
        name: of the rule.
        num_tokens: tokens that it left out.
        realised: true changes.
    """

    name: str
    num_tokens: int
    realised: Place


@dataclass(frozen=True, repr=False)
class Frontier(Plotted, Record):
    """The frontier of one step.

    Attributes:
        lr: learning rate of all steps.
        order: 1 for predictions by first-order influence, 2 with second-order kernels.
        units: what has a weight of its own, ``sequences`` or ``prompts``.
        num_units: how many of them.
        num_folds: folds of the probe prompts.
        most: largest weight.
        caution: standard errors that a predicted gain was counted less by the choice of weights.
        entropy: predicted change of the entropy by the step as it is.
        reward: predicted change of the reward by the step as it is.
        realised_entropy: true change of the entropy by the step as it is; None where no step was taken.
        realised_reward: true change of the reward by the step as it is; likewise.
        points: the curve from most reward to most entropy, then the two others.
        rules: published rules on the same plane.
        weights: (seq,) of each sequence of the batch, from the whole probe, by the name of a point (with its
            level).
    """

    lr: float
    order: int
    units: str
    num_units: int
    num_folds: int
    most: float
    caution: float
    entropy: Estimate
    reward: Estimate
    realised_entropy: Estimate | None
    realised_reward: Estimate | None
    points: tuple[FrontierPoint, ...]
    rules: tuple[RulePoint, ...]
    weights: Mapping[str, FloatArray]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each of ``points``."""
        return frame(self.points)

    def _viewed(self) -> Parts:
        return Parts("Exploration against performance", {"frontier": self})

    def point(self, name: str) -> FrontierPoint:
        """The first point of that name."""
        return next(point for point in self.points if point.name == name)

    def doubted_by(self, predicted: tuple[str, ...], realised: tuple[str, ...]) -> Frontier:
        """The same frontier with reasons not to trust what it predicts, or what was measured."""
        points = tuple(
            replace(
                p,
                in_sample=p.in_sample.doubted(*predicted),
                predicted=p.predicted.doubted(*predicted),
                realised=None if p.realised is None else p.realised.doubted(*realised),
            )
            for p in self.points
        )
        own = (self.realised_entropy, self.realised_reward)
        entropy, reward = (None if e is None else e.doubted(*realised) for e in own)
        return replace(
            self,
            entropy=self.entropy.doubted(*predicted),
            reward=self.reward.doubted(*predicted),
            realised_entropy=entropy,
            realised_reward=reward,
            points=points,
            rules=tuple(replace(r, realised=r.realised.doubted(*realised)) for r in self.rules),
        )

"""Configuration of what ``stepscope train`` adds to TRL's loss: an objective, and a curriculum of prompts.

All objectives but the entropy bonus are the classes of :mod:`stepscope.rules` themselves.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepscope.config.base import Section
from stepscope.rules import (
    ClipCov,
    DiscriminatorClipping,
    FrontierWeights,
    InfluenceClipping,
    KlCov,
    Reweighting,
    Steer,
    TopEntropy,
    Without,
)


class EntropyBonusConfig(Section):
    """Entropy bonus: the loss less ``coefficient`` times the mean entropy over tokens (TRL's own term).

    Attributes:
        coefficient: weight of the bonus; where it adapts, the weight to begin with.
        target: entropy in nats per token below which the bonus acts and its weight grows; above it the bonus
            rests and its weight shrinks. Null keeps the weight and lets it act always.
        delta: change of the weight after each step.
        max_coefficient: largest weight.
    """

    name: Literal["entropy_bonus"] = "entropy_bonus"
    coefficient: float = Field(default=0.005, ge=0)
    target: float | None = Field(default=None, gt=0)
    delta: float = Field(default=0.005, gt=0)
    max_coefficient: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _acts(self) -> EntropyBonusConfig:
        if self.target is None and self.coefficient == 0.0:
            raise ValueError("coefficient 0 without a target is no bonus; set one of them")
        return self


ObjectiveConfig = Annotated[
    ClipCov
    | KlCov
    | TopEntropy
    | Reweighting
    | Steer
    | DiscriminatorClipping
    | InfluenceClipping
    | FrontierWeights
    | Without
    | EntropyBonusConfig,
    Field(discriminator="name"),
]
"""What changes TRL's loss. Clip-higher is no objective: it is ``rl.epsilon_high`` above ``epsilon_low``."""


class CurriculumConfig(Section):
    """Prompts are drawn by how often they were solved lately.

    Every prompt has a running pass rate, an exponential average over the groups sampled for it. Within a
    bucket prompts are equally likely; a bucket's share of the batch is its weight over the sum of the weights
    of all buckets that hold prompts. A measurement of a checkpoint draws its prompts uniformly all the same.

    Attributes:
        hard: weight of prompts with a pass rate below ``hard_below``.
        medium: weight of the prompts between.
        easy: weight of prompts with a pass rate above ``easy_above``.
        hard_below: bound of the hard bucket.
        easy_above: bound of the easy bucket.
        decay: share of the old average that a new group leaves.
        unseen: pass rate of a prompt that was not asked yet.
    """

    hard: float = Field(default=0.25, gt=0)
    medium: float = Field(default=0.6, gt=0)
    easy: float = Field(default=0.15, gt=0)
    hard_below: float = Field(default=0.2, ge=0, le=1)
    easy_above: float = Field(default=0.8, ge=0, le=1)
    decay: float = Field(default=0.5, ge=0, lt=1)
    unseen: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _buckets(self) -> CurriculumConfig:
        if self.hard_below > self.easy_above:
            raise ValueError(
                f"hard_below {self.hard_below} is above easy_above {self.easy_above}; the buckets overlap"
            )
        return self

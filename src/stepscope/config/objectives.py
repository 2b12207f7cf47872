"""Configuration of what ``stepscope train`` adds to TRL's loss: an objective, and a curriculum of prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepscope.config.base import Section

Scope = Literal["batch", "micro_batch"]
"""What means, quantiles and maxima of an objective are taken over: all tokens of the optimizer step, or those
of one micro-batch on one device, as most public code does."""


class ClipCovConfig(Section):
    """Clip-Cov: some tokens of high covariance between log-prob and advantage leave the loss.

    The published runs nearly switch PPO's clipping off beside it: set ``rl.epsilon_low`` and
    ``rl.epsilon_high`` to 1 for that. The default fraction is meant for batches of millions of tokens.

    Attributes:
        name: ``clip_cov``.
        fraction: share of the tokens that leave the loss (at least one token).
        low: smallest covariance of a candidate.
        high: largest covariance of a candidate.
        scope: what the covariance is centred over.
    """

    name: Literal["clip_cov"]
    fraction: float = Field(default=2e-4, gt=0, le=1)
    low: float = 1.0
    high: float = 5.0
    scope: Scope = "batch"

    @model_validator(mode="after")
    def _bounds(self) -> ClipCovConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}; give a range of covariances")
        return self


class KlCovConfig(Section):
    """KL-Cov: tokens of the highest covariance are held to the policy that sampled; PPO's clipping is off.

    The penalty is the size of log pi - log pi_old, whose gradient vanishes while the two are the same policy:
    it acts from the second update on a batch, so ``rl.num_iterations`` must be at least 2.

    Attributes:
        name: ``kl_cov``.
        fraction: share of the tokens that are penalised (at least one token).
        coefficient: weight of the penalty.
        scope: what the covariance is centred over.
    """

    name: Literal["kl_cov"]
    fraction: float = Field(default=2e-3, gt=0, le=1)
    coefficient: float = Field(default=1.0, gt=0)
    scope: Scope = "batch"


class TopEntropyConfig(Section):
    """Only tokens before which the policy is most uncertain stay in the loss.

    Attributes:
        name: ``top_entropy``.
        fraction: share of the tokens that stay.
        scope: what the quantile is taken over; TRL's own ``top_entropy_quantile`` means ``micro_batch``.
    """

    name: Literal["top_entropy"]
    fraction: float = Field(default=0.2, gt=0, le=1)
    scope: Scope = "batch"


class ReweightingConfig(Section):
    """Advantages reweighted by probability: A (alpha p + 1 - alpha), which plays improbable tokens down.

    Attributes:
        name: ``reweighting``.
        alpha: 0 leaves the advantages as they are.
    """

    name: Literal["reweighting"]
    alpha: float = Field(default=0.3, ge=0, le=1)


class SteerConfig(Section):
    """STEER: tokens count the less, the more their own tabular entropy change is.

    Attributes:
        name: ``steer``.
        form: ``theorem`` for the change as derived, ``released`` for the authors' code, which divides the
            advantage by the probability that sampled instead of multiplying with the ratio.
        min_weight: weight of the token that changes entropy most.
        scope: what that token is looked for in.
    """

    name: Literal["steer"]
    form: Literal["theorem", "released"] = "theorem"
    min_weight: float = Field(default=0.7, gt=0, lt=1)
    scope: Scope = "batch"


class DiscriminatorConfig(Section):
    """Discriminator clipping: tokens of negative advantage that lower entropy most leave the loss.

    Attributes:
        name: ``discriminator``.
        form: ``vocabulary`` centres each token's score over the vocabulary, which makes it the exact tabular
            entropy change (Clip_V); ``batch`` centres it over the batch (Clip_B).
        threshold: standard deviations of the score beyond which a token leaves; published: 8.5 for
            ``vocabulary``, 2.5 for ``batch``.
        max_fraction: largest share of the tokens that may leave.
        scope: what mean and standard deviation are taken over.
    """

    name: Literal["discriminator"]
    form: Literal["vocabulary", "batch"] = "vocabulary"
    threshold: float = Field(default=2.5, ge=0)
    max_fraction: float = Field(default=1.0, gt=0, le=1)
    scope: Scope = "batch"


class InfluenceConfig(Section):
    """Measured influence: tokens that cost too much entropy for the reward they buy leave the loss.

    Before every optimizer step the influence of each token of the batch on entropy and expected reward is
    measured on a fresh probe batch, with AdamW's own preconditioner. That costs several times the step.

    Attributes:
        name: ``influence``.
        fraction: largest share of the tokens that are chosen.
        price: nats per token of entropy that a token may cost for a reward of 1 it buys; 0 chooses those
            that lower entropy most, whatever they buy.
        weight: what the chosen tokens' advantages are multiplied by; 0 takes the tokens out of the loss.
        num_prompts: prompts of the probe batch, of the training split, with one response each.
    """

    name: Literal["influence"]
    fraction: float = Field(default=0.02, gt=0, le=1)
    price: float = Field(default=0.0, ge=0)
    weight: float = Field(default=0.0, ge=0, lt=1)
    num_prompts: int = Field(default=64, ge=2)


class EntropyBonusConfig(Section):
    """Entropy bonus: the loss less ``coefficient`` times the mean entropy over tokens (TRL's own term).

    Attributes:
        name: ``entropy_bonus``.
        coefficient: weight of the bonus; where it adapts, the weight to begin with.
        target: entropy in nats per token below which the bonus acts and its weight grows; above it the bonus
            rests and its weight shrinks. Null keeps the weight and lets it act always.
        delta: change of the weight after each step.
        max_coefficient: largest weight.
    """

    name: Literal["entropy_bonus"]
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
    ClipCovConfig
    | KlCovConfig
    | TopEntropyConfig
    | ReweightingConfig
    | SteerConfig
    | DiscriminatorConfig
    | InfluenceConfig
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

"""Interventions: what a training changes in TRL's loss, with the published parameters as defaults.

A loss -min(r A, clip(r) A) whose A is a number per token covers masks and weights, w A with w >= 0, and,
where clipping is off, any further term whose derivative by the log-prob is known: TRL's own loss runs
unchanged on the advantages that an intervention makes. What is no function of the log-probs, an entropy
bonus, is a further component of the step.

A class is what a configuration says (``rl.objective``), what a checkpoint records, what the training applies
and what the reconstruction of a step applies again. Criteria rank tokens by the same rules.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepscope.errors import ConfigError, MeasurementError
from stepscope.results import BoolArray, FloatArray
from stepscope.rules.tokens import Tokens, covariance, largest

UNCLIPPED = 1e9
"""Upper clip range that no ratio reaches."""

RELEASED_FLOOR = 0.02
"""Smallest normaliser of STEER's released code, which keeps weights near 1 where no token matters."""


class Intervention(BaseModel):
    """Base of all: by default a loss as it is.

    Attributes:
        name: under which configurations and checkpoints know it.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    off_policy_only: ClassVar[bool] = False
    """It does nothing while the policy is still the one that sampled."""

    unclipped: ClassVar[bool] = False
    """It is published for a loss without PPO's clipping."""

    measures: ClassVar[bool] = False
    """It looks at measured influences of the tokens."""

    shapes_advantages: ClassVar[bool] = True
    """It acts through advantages per token, and not by a further component of the step."""

    name: str

    @property
    def micro_batch_size(self) -> int | None:
        """Sequences that its statistics are over; None for all of the step."""
        return None

    @property
    def needs_discriminators(self) -> bool:
        """Whether it looks at sums over the vocabulary."""
        return False

    @property
    def needs_texts(self) -> bool:
        """Whether it looks at what tokens say."""
        return False

    @property
    def entropy_weight(self) -> float:
        """Weight of the mean entropy over the tokens of the loss in what the next step maximises."""
        return 0.0

    def to_record(self) -> dict[str, Any]:
        """What a checkpoint keeps: name, parameters, and the sequences that its statistics are over."""
        return {**self.model_dump(exclude={"scope"}), "micro_batch_size": self.micro_batch_size}

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """(tok,) what stands in the loss in place of A, from tokens before the update.

        Args:
            tokens: all that its statistics are over.
            random: for rules that draw.
        """
        return tokens.advantage


class ScopedIntervention(Intervention):
    """An intervention with means, quantiles or maxima over tokens.

    Attributes:
        scope: what these are over: ``batch``, all tokens of the optimizer step; ``micro_batch``, those of one
            micro-batch on one device, as most public code does; or those of so many sequences.
    """

    scope: Literal["batch", "micro_batch"] | Annotated[int, Field(ge=1)] = "batch"

    def over(self, micro_batch: int) -> Self:
        """The same with the number of sequences of a micro-batch, where its scope is one."""
        return self.model_copy(update={"scope": micro_batch}) if self.scope == "micro_batch" else self

    @property
    def micro_batch_size(self) -> int | None:
        """The number that the scope is.

        Raises:
            ConfigError: the micro-batch has no number yet.
        """
        if self.scope == "micro_batch":
            raise ConfigError(f"{self.name}: a micro-batch of how many sequences? set scope to a number")
        return None if self.scope == "batch" else self.scope


class ClipCov(ScopedIntervention):
    """Clip-Cov: some tokens of high covariance between log-prob and advantage leave the loss.

    max(1, int(fraction N)) tokens are drawn among those with low < Cov < high that PPO does not clip. The
    published runs nearly switch PPO's clipping off beside it: set ``rl.epsilon_low`` and ``rl.epsilon_high``
    to 1 for that. The default fraction is meant for batches of millions of tokens.

    Source: Cui et al. 2025 (arXiv:2505.22617), Eq. 10; verl's ``compute_policy_loss_clip_cov``.

    Attributes:
        fraction: share of the tokens that leave the loss (at least one token).
        low: smallest covariance of a candidate.
        high: largest covariance of a candidate.
    """

    name: Literal["clip_cov"] = "clip_cov"
    fraction: float = Field(default=2e-4, gt=0, le=1)
    low: float = 1.0
    high: float = 5.0

    @model_validator(mode="after")
    def _bounds(self) -> ClipCov:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}; give a range of covariances")
        return self

    def candidates(self, tokens: Tokens) -> BoolArray:
        """(tok,) True on tokens that may be drawn."""
        found = covariance(tokens)
        return np.asarray((found > self.low) & (found < self.high) & ~tokens.clipped)

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A, and 0 on the tokens drawn."""
        places = random.permutation(np.flatnonzero(self.candidates(tokens)))
        made = tokens.advantage
        made[places[: max(1, int(self.fraction * len(tokens)))]] = 0.0
        return made


class KlCov(ScopedIntervention):
    """KL-Cov: tokens of the highest covariance are held to the policy that sampled; PPO's clipping is off.

    The gradient of -r A + coefficient |log r| on the max(1, int(fraction N)) tokens of highest Cov, of -r A
    elsewhere. As d|log r|/dl = sign(log r) and dr/dl = r, the advantage A - coefficient sign(log r)/r has
    that gradient in an unclipped loss. It vanishes while the two are the same policy: it acts from the second
    update on a batch, so ``rl.num_iterations`` must be at least 2.

    Source: Cui et al. 2025 (arXiv:2505.22617); verl's ``compute_policy_loss_kl_cov``.

    Attributes:
        fraction: share of the tokens that are penalised (at least one token).
        coefficient: weight of the penalty.
    """

    off_policy_only = True
    unclipped = True

    name: Literal["kl_cov"] = "kl_cov"
    fraction: float = Field(default=2e-3, gt=0, le=1)
    coefficient: float = Field(default=1.0, gt=0)

    def penalised(self, tokens: Tokens) -> BoolArray:
        """(tok,) True on tokens that are held back."""
        return largest(covariance(tokens), max(1, int(self.fraction * len(tokens))))

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A, and A - coefficient sign(log r)/r on the penalised tokens.

        Raises:
            ConfigError: PPO's clipping is on.
        """
        if tokens.epsilon_low < 1 or tokens.epsilon_high < UNCLIPPED:
            raise ConfigError(
                f"kl_cov: the ratio is clipped to {1 - tokens.epsilon_low:g} ... "
                f"{1 + tokens.epsilon_high:g}, and this objective has no clipping; set epsilon_low to 1 and "
                f"epsilon_high to {UNCLIPPED:g}"
            )
        pull = self.coefficient * np.sign(tokens.logprob - tokens.old_logprob) / tokens.ratio
        return tokens.advantage - np.where(self.penalised(tokens), pull, 0.0)


class TopEntropy(ScopedIntervention):
    """Only tokens before which the policy is most uncertain stay in the loss.

    Source: Wang et al. 2025 (arXiv:2506.01939); TRL's ``GRPOTrainer.get_high_entropy_mask``, where the
    quantile is over a micro-batch.

    Attributes:
        fraction: share of the tokens that stay.
    """

    name: Literal["top_entropy"] = "top_entropy"
    fraction: float = Field(default=0.2, gt=0, le=1)

    def kept(self, tokens: Tokens) -> BoolArray:
        """(tok,) True where H is at or above its (1 - fraction)-quantile."""
        return np.asarray(tokens.entropy >= np.quantile(tokens.entropy, 1 - self.fraction))

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A on the tokens that stay, 0 elsewhere."""
        return tokens.advantage * self.kept(tokens)


class Reweighting(Intervention):
    """Advantages reweighted by probability, which plays improbable tokens down.

    Source: Yang et al. 2025 (arXiv:2505.12929), advantage reweighting.

    Attributes:
        alpha: 0 leaves the advantages as they are.
    """

    name: Literal["reweighting"] = "reweighting"
    alpha: float = Field(default=0.3, ge=0, le=1)

    def factor(self, tokens: Tokens) -> FloatArray:
        """(tok,) alpha p + 1 - alpha."""
        return self.alpha * tokens.probability + 1 - self.alpha

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A (alpha p + 1 - alpha)."""
        return tokens.advantage * self.factor(tokens)


class Steer(ScopedIntervention):
    """STEER: tokens count the less, the more their own tabular entropy change is.

    Source: Hao et al. 2025 (arXiv:2510.10150), Theorem 1 and ``core_algos.py`` of its code.

    Attributes:
        form: ``theorem`` for the change as derived, ``released`` for the authors' code, which divides the
            advantage by the probability that sampled instead of multiplying with the ratio.
        min_weight: weight of the token that changes entropy most.
    """

    name: Literal["steer"] = "steer"
    form: Literal["theorem", "released"] = "theorem"
    min_weight: float = Field(default=0.7, gt=0, lt=1)

    def change(self, tokens: Tokens) -> FloatArray:
        """(tok,) Omega = r A p (1 - p)(l + H), 0 where PPO clips.

        ``released``: A/p_old instead of r A, which is a factor p more, and no clipping.
        """
        tabular = tokens.advantage * tokens.discriminant * tokens.missing
        if self.form == "released":
            return np.asarray(tabular / np.exp(tokens.old_logprob))
        return np.where(tokens.clipped, 0.0, tabular * tokens.ratio)

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A min_weight^(|Omega| / max |Omega|); ``released`` has a maximum of at least 0.02."""
        size = np.abs(self.change(tokens))
        most = max(float(size.max()), RELEASED_FLOOR if self.form == "released" else 0.0)
        if most == 0.0:
            return tokens.advantage
        return tokens.advantage * np.exp(math.log(self.min_weight) * size / most)


class DiscriminatorClipping(ScopedIntervention):
    """Discriminator clipping: tokens of negative advantage that lower entropy most leave the loss.

    Source: Wang et al. 2026 (arXiv:2602.03392), Theorem 3.3, Clip_V and Clip_B.

    Attributes:
        form: ``vocabulary`` centres each token's score over the vocabulary, which makes it the exact tabular
            entropy change (Clip_V); ``batch`` centres it over the batch (Clip_B).
        threshold: standard deviations of the score beyond which a token leaves; published: 8.5 for
            ``vocabulary``, 2.5 for ``batch``.
        max_fraction: largest share of the tokens that may leave.
    """

    name: Literal["discriminator"] = "discriminator"
    form: Literal["vocabulary", "batch"] = "vocabulary"
    threshold: float = Field(default=2.5, ge=0)
    max_fraction: float = Field(default=1.0, gt=0, le=1)

    @property
    def needs_discriminators(self) -> bool:
        """For the form that centres over the vocabulary."""
        return self.form == "vocabulary"

    def deviation(self, tokens: Tokens) -> FloatArray:
        """(tok,) D, with S = p (l + H): E_{v~pi}[S_v] - S over the vocabulary, mean S - S over the batch.

        Over the vocabulary, r A D is the exact entropy change of a tabular softmax policy.

        Raises:
            MeasurementError: ``vocabulary`` without discriminators.
        """
        if self.form == "batch":
            return np.asarray(tokens.discriminant.mean() - tokens.discriminant)
        if tokens.discriminator is None:
            raise MeasurementError(
                "discriminator: the form `vocabulary` needs sum_v pi_v^2 (log pi_v + H) of every position, "
                "got none; pass those of policy.rollouts.score_discriminators"
            )
        return tokens.discriminator - tokens.discriminant

    def dropped(self, tokens: Tokens, fewest: int = 0) -> BoolArray:
        """(tok,) True where A < 0 and D > threshold std(D) over all N tokens.

        At most int(max_fraction N) tokens, or ``fewest`` where that is more: those of largest D.
        """
        deviation = self.deviation(tokens)
        beyond = (tokens.advantage < 0) & (deviation > self.threshold * deviation.std())
        return largest(deviation, max(fewest, int(self.max_fraction * len(tokens))), beyond)

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A, and 0 on the tokens that leave."""
        return np.where(self.dropped(tokens), 0.0, tokens.advantage)


class InfluenceClipping(Intervention):
    """Measured influence: tokens that cost too much entropy for the reward they buy leave the loss.

    Before every optimizer step the influence of each token of the batch on entropy and expected reward, I_H
    and I_R, is measured on a fresh probe batch, with AdamW's own preconditioner. That costs several times the
    step.

    Source: DESIGN 3.4 to 3.7; no published method. The first-order condition of reward + entropy/price.

    Attributes:
        fraction: largest share of the tokens that are chosen.
        price: nats per token of entropy that a token may cost for a reward of 1 it buys; 0 chooses those
            that lower entropy most, whatever they buy.
        weight: what the chosen tokens' advantages are multiplied by; 0 takes the tokens out of the loss.
        num_prompts: prompts of the probe batch, of the training split, with one response each.
    """

    measures = True

    name: Literal["influence"] = "influence"
    fraction: float = Field(default=0.02, gt=0, le=1)
    price: float = Field(default=0.0, ge=0)
    weight: float = Field(default=0.0, ge=0, lt=1)
    num_prompts: int = Field(default=64, ge=2)

    def chosen(self, tokens: Tokens) -> BoolArray:
        """(tok,) True on the int(fraction N) of largest -I_H - price I_R where that and -I_H are above 0.

        Raises:
            MeasurementError: the table has no influences.
        """
        if tokens.entropy_influence is None or tokens.reward_influence is None:
            raise MeasurementError(
                "influence: the objective needs every token's influence on entropy and reward, got none; "
                "pass those of measure.influence.token_influence"
            )
        cost = -tokens.entropy_influence - self.price * tokens.reward_influence
        costly = (tokens.entropy_influence < 0) & (cost > 0)
        return largest(cost, int(self.fraction * len(tokens)), costly)

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A, and weight A on the chosen tokens."""
        return np.where(self.chosen(tokens), self.weight * tokens.advantage, tokens.advantage)


class EntropyBonus(ScopedIntervention):
    """Entropy bonus: the loss less ``coefficient`` times the mean entropy over its tokens (TRL's own term).

    It is no function of the log-probs and has no part in the advantages.

    Attributes:
        coefficient: weight in the next step; 0 where a bonus that adapts rests.
    """

    shapes_advantages = False

    name: Literal["entropy_bonus"] = "entropy_bonus"
    coefficient: float

    @property
    def entropy_weight(self) -> float:
        """The coefficient."""
        return self.coefficient

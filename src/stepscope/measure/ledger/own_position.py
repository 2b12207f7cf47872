"""What the tokens of a step do to the entropy at their own positions, and what tabular theory says of it.

A token's effect on its own position takes two gradients of its own,

    y = w (grad H . Q . grad l)

so where there are many, some are drawn: with replacement and probabilities pi, half of them uniform, half by
the size of the tabular formula x = -w (S - M), which is close to y up to a factor. The sum over all tokens is
estimated by the difference estimator (Hansen & Hurwitz 1943; Cassel, Saerndal & Wretman 1976),

    b sum x + 1/n sum_d (y_d - b x_d)/pi_d,    variance  1/(n(n-1)) sum_d (z_d - mean z)^2, z = (y - b x)/pi

with b the slope of y on x over the drawn ones; in the variance over the others of them, since a slope from
few fits each too well. Copies of a token in one context are one token with the sum of their weights. All of
them, where they are few enough, is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from stepscope.intervals import FLAT
from stepscope.measure.criteria.facts import token_facts
from stepscope.measure.influence.attribution import Weighted
from stepscope.measure.kernel.fisher import split_tokens
from stepscope.measure.ledger.contexts import Contexts
from stepscope.policy.gradients.derivatives import response_entropy, response_logprob
from stepscope.policy.gradients.products import paired_dots
from stepscope.policy.gradients.store import Metrics
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.results.kinship import NATURAL, PLAIN


@dataclass(frozen=True)
class Drawn:
    """An estimate of a sum over tokens.

    Attributes:
        by_prompt: (prompt,) what the tokens of each prompt add to it.
        variance: of the whole sum, over draws.
    """

    by_prompt: FloatArray
    variance: float


@dataclass(frozen=True)
class Units:
    """The distinct tokens of a batch that have a weight.

    Attributes:
        first: (unit,) where each occurs first among the tokens that the policy wrote.
        weights: (unit,) sum of the token weights of its copies.
        prompts: (unit,) its prompt.
        formulas: name to (unit,) what tabular theory says per unit of a logit step: weight times that of a
            token.
        design: (unit,) how many of all units each stands for; 0 where it was not drawn.
        kernel: metric to (unit,) grad H . Q . grad l; 0 where it was not drawn.
        times: (unit,) how often each was drawn; 1 where all were taken.
        num_prompts: prompts of the batch.
    """

    first: IntArray
    weights: FloatArray
    prompts: IntArray
    formulas: Mapping[str, FloatArray]
    design: FloatArray
    kernel: Mapping[str, FloatArray]
    times: IntArray
    num_prompts: int

    @property
    def drawn(self) -> int:
        """Number of units that were looked at."""
        return int((self.times > 0).sum())

    def summed(self, metric: str, at: FloatArray) -> Drawn:
        """Sum of the effects on the own position, each times how often that occurs.

        Args:
            metric: Q.
            at: (unit,) how often its context occurs.
        """
        effects = self.weights * self.kernel[metric] * at
        if (self.times == 1).all() and (self.design == 1).all():
            return Drawn(self._by_prompt(effects), 0.0)
        helper = self.formulas[PLAIN] * at
        square = float(self.design @ helper**2)
        slope = float(self.design @ (helper * effects)) / square if square else 0.0
        rest = effects - slope * helper
        count = int(self.times.sum())
        leverage = self.design * helper**2 / square if square else np.zeros(len(rest))
        without = np.full(len(rest), np.inf)  # y - b x with the slope of the others
        np.divide(rest, 1 - leverage, out=without, where=leverage < 1 - FLAT)
        each = count * self.design / np.maximum(self.times, 1) * np.where(self.times > 0, without, 0.0)
        if not np.isfinite(each).all():
            return Drawn(self._by_prompt(slope * helper + self.design * rest), np.inf)
        spread = float(self.times @ (each - self.times @ each / count) ** 2)
        by_prompt = self._by_prompt(slope * helper + self.design * rest)
        return Drawn(by_prompt, spread / (count * (count - 1)) if count > 1 else np.nan)

    def moments(self, metric: str, at: FloatArray) -> tuple[FloatArray, dict[str, tuple[FloatArray, ...]]]:
        """By prompt the sum of y^2; and for each formula x the sums of x, x^2 and x y."""
        effects = self.weights * self.kernel[metric] * at
        found = {}
        for name, formula in self.formulas.items():
            x = formula * at
            parts = (x, self.design * x**2, self.design * x * effects)
            found[name] = tuple(self._by_prompt(part) for part in parts)
        return self._by_prompt(self.design * effects**2), found

    def _by_prompt(self, values: FloatArray) -> FloatArray:
        sums = np.bincount(self.prompts, weights=values, minlength=self.num_prompts)
        return np.asarray(sums, dtype=np.float64)


def own_positions(
    policy: Policy,
    step: Weighted,
    contexts: Contexts,
    metrics: Metrics,
    *,
    most: int,
    seed: int,
    budget: Budget = Budget(),
) -> Units:
    """Look at the tokens of a step at their own positions.

    Costs a forward pass over the batch, and two gradient passes over as many sequences as there are tokens.

    Args:
        policy: where the step starts.
        step: batch and token weights.
        contexts: of the batch.
        metrics: name to Q.
        most: tokens that are looked at; with more of them some are drawn.
        seed: of the draw.
        budget: what may be used at a time.

    Raises:
        BatchError: more than 4096 tokens are to be looked at.
    """
    update = step.update
    weights = update.flat(step.token_weights)
    ids = update.flat([np.array(row, dtype=np.int64) for row in update.response_token_ids])
    pushing = np.flatnonzero(weights)
    keys = np.stack([update.flat(contexts.own)[pushing], ids[pushing]])
    _, first, unit = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    chosen = pushing[first]
    whole: FloatArray = np.zeros(len(chosen))
    np.add.at(whole, unit.reshape(-1), weights[pushing])
    formulas = {name: whole * rate[chosen] for name, rate in _tabular(policy, update, budget).items()}
    times, design = draw(np.abs(formulas[PLAIN]), most, seed)
    looked = np.flatnonzero(times)
    kernel = {name: np.zeros(len(chosen)) for name in metrics}
    if len(looked):
        single, _ = split_tokens(update, chosen[looked])
        dots = paired_dots(
            policy,
            SequenceGradients(single, response_logprob),
            SequenceGradients(single, response_entropy, as_trained=False),
            metrics,
            budget=budget,
        )
        for name, values in dots.items():
            kernel[name][looked] = values
    return Units(
        first=chosen,
        weights=whole,
        prompts=contexts.prompts[update.places[0][chosen]],
        formulas=formulas,
        design=design,
        kernel=kernel,
        times=times,
        num_prompts=contexts.num_prompts,
    )


def draw(sizes: FloatArray, most: int, seed: int) -> tuple[IntArray, FloatArray]:
    """How often each unit is drawn, and how many of all it stands for: all once, where they are few enough.

    Args:
        sizes: (unit,) what half of the draws go by.
        most: number of draws.
        seed: of them.
    """
    count = len(sizes)
    if count <= most:
        return np.ones(count, dtype=np.int64), np.ones(count)
    share = sizes / sizes.sum() if sizes.any() else np.full(count, 1 / count)
    chance = 0.5 / count + 0.5 * share
    times = np.random.default_rng(seed).multinomial(most, chance / chance.sum())
    return times.astype(np.int64), times / (most * chance)


def _tabular(policy: Policy, update: Rollouts, budget: Budget) -> dict[str, FloatArray]:
    """(tok,) change of the entropy at the own position per unit of weight and logit step."""
    known = update if update.advantages is not None else replace(update, advantages=np.zeros(len(update)))
    facts = token_facts(policy, known, budget=budget)
    return {PLAIN: facts.discriminator - facts.discriminant, NATURAL: -facts.surprise}

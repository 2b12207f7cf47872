"""A solvable model of kinship: random features on a tree of shared prefixes, under a softmax.

B prompts have G responses of L tokens each. Two responses to a prompt have the same context up to where they
branch, and agree on their first k tokens with probability s_k: q^k, where two draws from a context agree with
probability q, so that log 1/q is the (collision) entropy of the policy. A context x has features h_x in R^d,
normal with variance 1/d and overlap E[h_x . h_x'] = rho(x, x'), of four parts that add up to one:

    h = sqrt(common) m + sqrt(prompt) u_prompt + sqrt(place) v_k + sqrt(tree) t_x
    t_x = memory t_parent + sqrt(1 - memory^2) xi_x

so that rho is 1 in one context; common + prompt + tree memory^|k - l| in one response; common + prompt +
place [k = l] + tree memory^(|k - s| + l - s) for a context l that another response goes through alone, s the
last that both have; and common + place [k = l] across prompts. Logits are W h with small normal W, and
rewards of tokens favour likely ones in proportion, which is what sharpens a policy. A token pushes by its
advantage, in expectation in proportion to the logits less their mean, and so does the entropy's slope; the
last layer's kernel of two positions is (h . h') times the overlap of these two, so that in expectation a
token at t does to the entropy at x

    -c (V - 1)/V^2 E[(h_x . h_t)^2] = -c (V - 1)/V^2 f(rho(x, t)),    f(rho) = rho^2 + (1 + rho^2)/d

to leading order in the logits, with baselines of the group in c. Summed over pairs of a kin that is a finite
sum over positions and branching points; shares are free of c. (Own derivation;
``tests/measure/test_kin_model.py`` holds the sums to all pairs of a tree that is written out, and to
policies, trees, tokens and advantages that are drawn from the model.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from stepscope.errors import MeasurementError
from stepscope.results import FloatArray
from stepscope.results.kinship import OTHER_PROMPTS, SAME_POSITION, SAME_PROMPT, SAME_RESPONSE
from stepscope.stats import Estimate


@dataclass(frozen=True)
class Batch:
    """What the shares depend on beside the features.

    Attributes:
        shared: (position,) s_k: probability that two responses to a prompt agree on their first k tokens; its
            length is that of the responses, and s_0 is 1.
        group_size: responses to a prompt, G.
        prompts: B.
        fresh: the entropy is looked at G other responses to each prompt, and not at the batch's own.

    Raises:
        MeasurementError: s does not fall from 1, or there is no response or no prompt.
    """

    shared: FloatArray
    group_size: int
    prompts: int
    fresh: bool = False

    def __post_init__(self) -> None:
        s = np.asarray(self.shared)
        if not (len(s) and s[0] == 1 and (np.diff(s) <= 0).all() and s[-1] >= 0):
            raise MeasurementError(
                f"shares of common prefixes must fall from 1 to 0 or more, got {s.tolist()}"
            )
        if min(self.group_size, self.prompts) < 1:
            raise MeasurementError(
                f"a batch has {self.prompts} prompts with {self.group_size} responses each, expected at "
                "least 1 of both"
            )

    @classmethod
    def branching(cls, length: int, collision: float, group_size: int, prompts: int) -> Batch:
        """Where two draws from any context agree with the same probability: s_k = collision^k."""
        shared: FloatArray = np.float64(collision) ** np.arange(length)
        return cls(shared, group_size, prompts)


@dataclass(frozen=True)
class KinModel:
    """Random features on a tree of prefixes.

    Attributes:
        common: share of the features' squared length that all contexts have in common.
        prompt: that all contexts of a prompt have.
        place: that all contexts at the same position have.
        memory: overlap of the rest from one position to the next.
        dimension: d; features of no fixed dimension have no overlap by chance.

    Raises:
        MeasurementError: a share below 0, shares that add up to more than 1, or a memory outside of 0 to 1.
    """

    common: float
    prompt: float
    memory: float
    place: float = 0.0
    dimension: float = math.inf

    def __post_init__(self) -> None:
        parts = (self.common, self.prompt, self.place)
        if not (min(parts) >= 0 and self.tree >= -1e-12 and 0 <= self.memory <= 1 and self.dimension > 0):
            raise MeasurementError(
                f"shares of the features must be 0 or more and add up to at most 1, got {parts}; memory lies "
                f"between 0 and 1, got {self.memory}; the dimension above 0, got {self.dimension}"
            )

    @property
    def tree(self) -> float:
        """Share of the features that a context has of its own, and its descendants with memory."""
        return 1 - self.common - self.prompt - self.place

    def effect(self, overlap: FloatArray) -> FloatArray:
        """f(rho) = rho^2 + (1 + rho^2)/d."""
        return np.asarray(overlap**2 + (1 + overlap**2) / self.dimension)

    def sums(self, batch: Batch) -> dict[str, float]:
        """Expected sum of f over the positions that a token acts on, by kin, over that of its own context.

        With L = len(shared), M_l = [batch] + (G - [batch]) s_l positions that have a response's l-th context,
        p_s = s_s - s_(s+1) the probability to part after s tokens, and means over k:

            own position      mean_k M_k
            own response      mean_k sum_(l != k) M_l f(k, l)/f(1)
            same prompt       (G - [batch]) mean_k sum_s p_s sum_(l > s) f(k, l, s)/f(1)
            other prompts     (B - 1) G mean_k sum_l f(k, l)/f(1)
        """
        s = np.asarray(batch.shared, dtype=np.float64)
        length, places = len(s), np.arange(len(s))
        itself = 0 if batch.fresh else 1
        beside = batch.group_size - itself
        there = itself + beside * s
        k, to = np.meshgrid(places, places, indexing="ij")
        level = self.common + self.prompt
        decay = self.memory ** np.arange(2 * length)
        inside = self.effect(level + self.tree * decay[np.abs(k - to)])
        inside[places, places] = 0.0
        across = self.effect(self.common + self.place * (k == to))
        parting = s - np.append(s[1:], 0.0)
        parting[-1] = s[-1]
        apart = 0.0
        for depth, chance in enumerate(parting):
            if not chance:
                continue
            beyond = places[depth + 1 :]
            far = np.abs(places - depth)[:, None] + beyond - depth  # by the last context that both have
            at = self.place * (places[:, None] == beyond)
            apart += chance * float(self.effect(level + at + self.tree * decay[far]).sum())
        own = float(self.effect(np.ones(1))[0]) * length
        return {
            SAME_POSITION: float(there.mean()),
            SAME_RESPONSE: float((inside @ there).sum()) / own,
            SAME_PROMPT: beside * apart / own,
            OTHER_PROMPTS: (batch.prompts - 1) * batch.group_size * float(across.sum()) / own,
        }

    def shares(self, batch: Batch) -> dict[str, float]:
        """Expected sums by kin over the sum of all."""
        sums = self.sums(batch)
        whole = sum(sums.values())
        return {kin: value / whole for kin, value in sums.items()}


def fit_kin_model(
    measured: Sequence[tuple[Batch, Mapping[str, Estimate]]], *, dimension: float = math.inf
) -> KinModel:
    """``common``, ``prompt`` and ``memory`` by least squares of shares, each over its standard error.

    Args:
        measured: a batch, and the shares of its kin.
        dimension: of the features.

    Raises:
        MeasurementError: no shares, or one without a value or a standard error.
    """
    rows = [(batch, kin, share) for batch, shares in measured for kin, share in shares.items()]
    if not rows:
        raise MeasurementError("model of kinship: no shares to fit to; measure with --stages kinship")
    for _, kin, share in rows:
        if not (math.isfinite(share.value) and 0 < share.stderr < math.inf):
            raise MeasurementError(
                f"the share {kin} is {share.value} with standard error {share.stderr}, expected a finite "
                "number with one above 0; leave it out, or measure more prompts"
            )

    def model(values: FloatArray) -> KinModel:
        common, rest, memory = values
        return KinModel(common, (1 - common) * rest, memory, dimension=dimension)

    def off(values: FloatArray) -> FloatArray:
        found = model(values)
        predicted = {id(batch): found.shares(batch) for batch, _ in measured}
        return np.array([(predicted[id(b)][kin] - share.value) / share.stderr for b, kin, share in rows])

    starts = [(0.1, 0.1, 0.5), (0.02, 0.02, 0.1), (0.3, 0.3, 0.8), (0.05, 0.3, 0.2)]
    fits = [least_squares(off, start, bounds=(0.0, 1.0), x_scale=0.1) for start in starts]
    return model(min(fits, key=lambda fit: float(fit.cost)).x)

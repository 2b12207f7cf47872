"""What every token of a step did to a quantity over the whole path: the entries of the ledger.

For a path theta_0 ... theta_T of steps Delta_j, G_j the mean of the quantity's gradients before and after
step j, the change along the path is sum_j G_j . Delta_j + O(Delta^3), and the entry of token (s, i, k) is
w_sik dR/dw_sik, where

    R = sum_j 1/2 { [F(theta_j + Delta_j) - F(theta_j)] + [F(theta_{j+1}) - F(theta_{j+1} - Delta_j)] }

with the theta_j held where they were and the Delta_j those that AdamW makes of the gradients: each step is
taken from where it was taken, and taken back from where it ended. R is the realised change exactly,
F(theta_T) - F(theta_0), and its derivative in Delta_j is G_j. So an entry is an exact derivative of the
realised change, not of its linearisation, along the path as it was: that a token also changes *where* later
gradients are taken, and what later decay takes off, is not followed. Through ``fixed`` clip coefficients and
D are held, too, and entries, momentum before the path, decay and bonus add up to sum_j G_j . Delta_j;
through ``optimizer`` they are not, and the entries answer what a little more or less weight would do.
(:mod:`stepscope.measure.ledger.adjoint`; the derivative is tested on listed policies in
``tests/measure/test_ledger.py``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from stepscope.measure.influence.attribution import token_products
from stepscope.measure.ledger.adjoint import Adjoint, pull
from stepscope.measure.ledger.path import Path
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.measure.step.terms import weighted_entropies
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.optim.base import Through
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import placed
from stepscope.results import Brief, FloatArray, Rollouts

Rows = Mapping[str, Tensor]
"""Name to (row, ...parameter shape): gradients of quantities, or of each through parts of a probe batch."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Entries(Brief):
    """What one step of a path did to some quantities.

    Attributes:
        number: of optimizer steps after it.
        through: ``fixed`` or ``optimizer``.
        update: its batch.
        whole: (row, tok) entry of each token that the policy wrote, over the rest of the path.
        own: (quantity, tok) its part through this step alone; the rest goes through the moments of later
            steps.
        bonus: (row,) the same for an entropy bonus, all tokens together; zero without one.
        decay: (row,) what a decay inside the gradient did; zero where there is none.
    """

    number: int
    through: Through
    update: Rollouts
    whole: FloatArray
    own: FloatArray
    bonus: FloatArray
    decay: FloatArray


def step_entries(
    policy: Policy,
    path: Path,
    place: int,
    gains: Rows,
    after: Adjoint,
    *,
    shares: FloatArray,
    through: Through = "fixed",
    budget: Budget = Budget(),
) -> tuple[Entries, Adjoint]:
    """The entries of one step, given what came after it.

    Costs a forward-mode pass over its batch for each row and each quantity; a gradient of it where nothing is
    held and none was recorded; one more with a bonus.

    Args:
        policy: the model of the path; its parameters are restored bitwise.
        path: the training.
        place: which step.
        gains: G of this step.
        after: derivatives with respect to the moments that it left; empty after the last step.
        shares: (quantity, row) makes quantities of rows.
        through: ``fixed`` or ``optimizer``.
        budget: what may be used at a time.

    Returns:
        The entries, and the derivatives with respect to the moments before the step.
    """
    step = path.step(place)
    theta = path.parameters(place)
    with placed(policy.parameters, theta):
        bonus: dict[str, Tensor] = {}
        if step.entropy_weights is not None:
            bonus = gradient(policy, step.update, weighted_entropies(step.entropy_weights), budget=budget)
        taken = replace(step.taken, parameters=theta)
        if through == "optimizer" and not taken.ascent:
            made = gradient(policy, step.update, weighted_logprobs(step.token_weights), budget=budget)
            taken = replace(taken, ascent=vectors.add(made, bonus) if bonus else made)
        found = pull(taken, gains, after, through)
        whole = {n: found.own[n] + found.later[n] for n in found.own}
        each = np.eye(shares.shape[1])
        entries = token_products(policy, step, whole, each, budget=budget)
        own = token_products(policy, step, found.own, shares, budget=budget)
    made_by_batch = Entries(
        number=step.number,
        through=through,
        update=step.update,
        whole=entries,
        own=own,
        bonus=vectors.stack_dots(whole, bonus) if bonus else np.zeros(len(each)),
        decay=-vectors.stack_dots(found.decay, theta) if found.decay else np.zeros(len(each)),
    )
    return made_by_batch, found.before

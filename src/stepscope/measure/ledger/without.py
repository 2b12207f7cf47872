"""Where a training would have gone without some tokens: its recorded steps taken again with less of them.

With w_ik (1 - d) for w_ik on the tokens of a rule, the steps of the optimizer are taken again from the same
start, clipping, moments, second moments and decay answering as they would have (torch's own AdamW). What
each step's gradient is, is told by one of two predictions:

    held          a_t - d a^R_t, a_t = -grad Loss as recorded and a^R_t its part through the rule's tokens,
                  both at theta_t: gradients stay where they were taken, and responses are those recorded
    reweighted    sum_ik r_i w_ik (1 - d [ik in rule]) grad l_ik(theta~_t), at the shifted parameters, with
                  r_i = pi_theta~(response i)/pi_theta(response i), normalised to mean 1 over the batch: what
                  the recorded batch says of the gradient that the shifted policy would have had, in
                  expectation over its responses

The first is what the entries of a ledger add up: to first order in d, the sum over steps of G_j . (Delta~_j -
Delta_j) is -d times the rule's entries through the optimizer. The second follows what the first leaves out:
that gradients are taken elsewhere, and that other responses are sampled, as far as the recorded ones tell.
Neither knows prompts that would have been drawn in place of dead groups, or advantages that new responses
would have had. Costs: a gradient of the rule's tokens for every step (held, for all doses at once); a scoring
pass and a gradient for every step and dose (reweighted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stepscope.measure.ledger.path import Path, PathStep
from stepscope.measure.step.reconstruct import CLIP_EPSILON, weighted_logprobs
from stepscope.measure.step.terms import weighted_entropies
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.passes import Budget
from stepscope.policy.recorded import TrainingState, adamw_step
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.results import BoolArray, FloatArray

Scores = tuple[Sequence[FloatArray], Sequence[FloatArray]]
"""Log-probs and entropies, one (tok,) array per sequence each."""

Chosen = Callable[[PathStep, Scores | None], Sequence[BoolArray]]
"""(tok,) True on the tokens of a rule in a step's batch, per sequence, given what a shifted policy says of
them; None for the policy as it was."""


@dataclass(frozen=True)
class Shifted:
    """Where a training would have been after a step.

    Attributes:
        state: parameters and moments.
        effective: smallest effective share of a batch so far, (sum r)^2/(n sum r^2); 1 where held.
    """

    state: TrainingState
    effective: float = 1.0


def held_paths(
    policy: Policy,
    path: Path,
    start: TrainingState,
    chosen: Chosen,
    doses: Sequence[float],
    *,
    budget: Budget = Budget(),
) -> Iterator[tuple[Shifted, ...]]:
    """The states after each step for every dose, gradients held as recorded.

    Args:
        policy: the model of the path; its parameters are restored bitwise.
        path: the training.
        start: parameters and moments before its first step.
        chosen: tells the rule's tokens.
        doses: shares d of their weight that are taken away.
        budget: what may be used at a time.
    """
    states = [start] * len(doses)
    for place in range(len(path)):
        step = path.step(place)
        part: ParameterVector = {}
        rows = _apart(step, chosen(step, None))
        with placed(policy.parameters, path.parameters(place)):
            if any(row.any() for row in rows):
                part = gradient(policy, step.update, weighted_logprobs(rows), budget=budget)
            whole = step.taken.ascent or _ascent(policy, step, step.token_weights, budget)
        states = [
            _taken(step, state, vectors.add(whole, vectors.scale(part, -dose)) if part else whole)
            for state, dose in zip(states, doses, strict=True)
        ]
        yield tuple(map(Shifted, states))


def reweighted_path(
    policy: Policy,
    path: Path,
    start: TrainingState,
    chosen: Chosen,
    dose: float,
    *,
    budget: Budget = Budget(),
) -> Iterator[Shifted]:
    """The state after each step, gradients taken at the shifted parameters on the recorded batches.

    Args:
        policy: the model of the path; its parameters are restored bitwise.
        path: the training.
        start: parameters and moments before its first step.
        chosen: tells the rule's tokens, as the shifted policy sees them.
        dose: share d of their weight that is taken away.
        budget: what may be used at a time.
    """
    state, effective = start, 1.0
    for place in range(len(path)):
        step = path.step(place)
        update = step.update
        with placed(policy.parameters, state.parameters):
            scores = score_rollouts(policy, update, budget=budget)
            inside = chosen(step, scores)
            logs = np.array(
                [
                    float((now - then)[own].sum())
                    for now, then, own in zip(scores[0], update.logprobs, update.written, strict=True)
                ]
            )
            ratios = np.exp(logs - logs.max())
            share = float(ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()))
            effective = min(effective, share)
            ratios /= ratios.mean()
            rows = [
                ratio * np.where(own, 1 - dose, 1.0) * row
                for ratio, own, row in zip(ratios, inside, step.token_weights, strict=True)
            ]
            whole = _ascent(policy, step, rows, budget)
        state = _taken(step, state, whole)
        yield Shifted(state, effective)


def _apart(step: PathStep, inside: Sequence[BoolArray]) -> list[FloatArray]:
    """Token weights of the rule's tokens, 0 elsewhere."""
    return [np.where(own, row, 0.0) for own, row in zip(inside, step.token_weights, strict=True)]


def _ascent(
    policy: Policy, step: PathStep, weights: Sequence[FloatArray], budget: Budget
) -> dict[str, torch.Tensor]:
    """-grad Loss at the policy's parameters, of some token weights and the step's own bonus."""
    made = gradient(policy, step.update, weighted_logprobs(weights), budget=budget)
    if step.entropy_weights is None:
        return made
    bonus = gradient(policy, step.update, weighted_entropies(step.entropy_weights), budget=budget)
    return vectors.add(made, bonus)


def _taken(step: PathStep, state: TrainingState, ascent: ParameterVector) -> TrainingState:
    """The state after AdamW's step on another gradient, clipped as the training clips."""
    groups = step.taken.state.groups
    names = [name for group in groups for name in group.names]
    own = {name: ascent[name].to(state.exp_avg[name].dtype) for name in names}
    clip = 1.0
    if step.taken.max_norm > 0:
        clip = min(1.0, step.taken.max_norm / (vectors.norm(own) + CLIP_EPSILON))
    return adamw_step(state, groups, [group.lr for group in groups], vectors.scale(own, -clip))


def apart(a: ParameterVector, b: ParameterVector) -> float:
    """|a - b| in parameter space."""
    return vectors.norm({name: a[name].double() - b[name].double() for name in a})

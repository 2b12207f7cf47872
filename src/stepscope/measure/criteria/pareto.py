"""What rules of the kind "drop these tokens" buy: the step taken again without them, and measured again.

A rule scores the tokens of the update batch; the tokens with the lowest scores below zero are dropped, that
is their part of the gradient is left out. The step is then made anew (clipping, second moment) and its
true effect on entropy and reward measured on the probe batch. Against the full step, paired on the same
samples,

    entropy kept     = change of the entropy without the tokens - change with them
    reward given up  = change of the reward with the tokens - change without them

Errors are over probe prompts, given the update batch.

A rule that looked at the probe is judged on the half of its prompts that it did not see: tokens chosen by one
half, the step measured on the other, both ways, every probe sequence counted where it did not choose
(cross-fitting, Chernozhukov et al. 2018). Chosen and judged on the same prompts such a rule looks better than
it is, since it picks their noise, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.criteria.leaderboard import Leaderboard
from stepscope.measure.criteria.remade import RemadeSteps
from stepscope.measure.quantity.estimators import Sampled
from stepscope.measure.quantity.probe import Bindings
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.passes import Budget, track
from stepscope.policy.state import Policy
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts
from stepscope.results.criteria import AblatedStep, Pareto
from stepscope.rules import largest

CRITERIA = ("disc_v", "cov_batch", "steer_thm", "npg", "top_ent_mask", "neg_A_missing")
"""Criteria that are tried as rules unless others are named."""


def drop_rules(
    board: Leaderboard,
    *,
    reward_influence: FloatArray,
    criteria: Sequence[str] = CRITERIA,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Scores of the rules worth comparing, lowest dropped first; (2, tok) where halves of the probe choose.

    ``influence`` drops the tokens that lower the entropy most; ``influence_fixed_prefix`` those that do so at
    given prefixes, which is known from fewer prompts; ``influence_no_reward`` only those among the first
    that do not raise the expected reward; ``random`` any; a signed criterion those it predicts to lower the
    entropy most, a magnitude criterion those it scores highest.

    Args:
        board: the leaderboard of the update batch.
        reward_influence: (2, tok) influence of each token on the expected reward through each half of the
            probe prompts, as the truths of the board divide them (``GroundTruth.probe_half``).
        criteria: names of token criteria of the board.
        seed: of ``random``.

    Raises:
        MeasurementError: the board has no such token criterion.
    """
    truth = board.truth("column", "adamw", "on_policy")
    exact, at_prefixes = truth.halves, board.truth("column", "adamw", "fixed_prefix").halves
    assert exact is not None
    assert at_prefixes is not None
    if unknown := sorted(set(criteria) - set(board.scores)):
        raise MeasurementError(
            f"no token criterion {unknown[0]} to drop by; choose from {', '.join(sorted(board.scores))}"
        )
    signed = {c.name for c in board.criteria if c.target == "signed"}
    return {
        "influence": exact,
        "influence_fixed_prefix": at_prefixes,
        "influence_no_reward": np.where(reward_influence <= 0, exact, 0.0),
        "random": -np.random.default_rng(seed).uniform(0.5, 1.0, len(truth.values)),
        **{n: board.scores[n] if n in signed else -board.scores[n] for n in criteria},
    }


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """How steps are taken again without some tokens.

    Attributes:
        shares: of the tokens with a weight; at least one is dropped.
        lr: learning rate of the steps; the step's own by default.
        baseline: rung of the baseline ladder.
    """

    shares: tuple[float, ...] = (0.02, 0.1)
    lr: float | None = None
    baseline: str = "best"


def drop_tokens(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    rules: Mapping[str, FloatArray],
    *,
    probe_half: IntArray | None = None,
    options: AblationOptions = AblationOptions(),
    bindings: Bindings | None = None,
    budget: Budget = Budget(),
) -> Pareto:
    """Take the step again without the tokens that each rule drops, and measure entropy and reward.

    Costs, for each rule and share, one gradient over the sequences that lose a token and one forward pass
    over the probe batch; twice that for a rule with scores from halves.

    Args:
        policy: where the step starts, with its optimizer's state; restored bitwise.
        step: the full step.
        probe: the probe batch.
        rules: name to (tok,) scores; the lowest below zero are dropped. (2, tok) scores of a rule that looked
            at one half of the probe prompts each are judged on the other. See :func:`drop_rules`.
        probe_half: (probe seq,) 0 or 1, the half of each probe sequence.
        options: shares, learning rate, baseline.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
        budget: what may be used at a time.

    Raises:
        MeasurementError: a learning rate of zero, a share outside (0, 1), scores of another batch, or scores
            from halves that are not named.
    """
    weights = step.update.flat(step.token_weights)
    for name, scores in rules.items():
        if scores.ndim == 2 and (probe_half is None or set(np.unique(probe_half)) != {0, 1}):
            raise MeasurementError(
                f"rule {name}: scores from halves of the probe batch, and probe_half does not divide it in "
                "two; pass probe_half= as GroundTruth.probe_half gives it"
            )
        if scores.shape not in (weights.shape, (2, *weights.shape)):
            raise MeasurementError(
                f"rule {name}: {scores.shape} scores for {len(weights)} tokens; score the step's own batch"
            )
    if wrong := [share for share in options.shares if not 0 < share < 1]:
        raise MeasurementError(f"share of tokens to drop: got {wrong[0]}, expected between 0 and 1")
    remade = RemadeSteps(
        policy, step, probe, lr=options.lr, baseline=options.baseline, bindings=bindings, budget=budget
    )
    rate = remade.lr
    full, full_reason = remade.measured(step.direction)
    points = []
    jobs = [(name, scores, share) for name, scores in rules.items() for share in options.shares]
    for name, scores, share in track(jobs, "re-made steps", budget):
        dropped = [_dropped(own, weights, share) for own in np.atleast_2d(scores)]
        made = [remade.measured(remade.without(own)) for own in dropped]
        changes, reason = made[0]
        words = f"per decision at lr {rate:g}, given the update batch"
        if len(made) == 2:
            assert probe_half is not None
            changes = [_unseen(*both, probe_half) for both in zip(made[0][0], made[1][0], strict=True)]
            reason = "; ".join(dict.fromkeys(r for _, r in made if r))
            words += ", tokens chosen by the other half of the probe prompts"
        absolute = [remade.estimate(i, change, words, reason) for i, change in enumerate(changes)]
        both = "; ".join(dict.fromkeys(r for r in (full_reason, reason) if r))
        paired = f"{words}, paired with the full step"
        points.append(
            AblatedStep(
                rule=name,
                share=share,
                num_dropped=round(float(np.mean([own.sum() for own in dropped]))),
                cross_fitted=len(made) == 2,
                entropy_change=absolute[0],
                reward_change=absolute[1],
                entropy_kept=remade.estimate(0, changes[0].plus(full[0], -1.0), paired, both),
                reward_given_up=remade.estimate(1, full[1].plus(changes[1], -1.0), paired, both),
            )
        )
    words = f"per decision at lr {rate:g}, given the update batch"
    whole = [remade.estimate(i, f, words, full_reason) for i, f in enumerate(full)]
    return Pareto(rate, whole[0], whole[1], tuple(points))


def _unseen(first: Sampled, second: Sampled, half: IntArray) -> Sampled:
    """The change of each probe sequence under the step that the other half of the prompts chose."""
    changes = np.where(half == 1, first.value + first.residuals, second.value + second.residuals)
    return Sampled(float(changes.mean()), changes - changes.mean())


def _dropped(scores: FloatArray, weights: FloatArray, share: float) -> BoolArray:
    """(tok,) True on the lowest scores below zero of tokens with a weight; ties in the batch's order."""
    most = max(1, int(share * np.count_nonzero(weights)))
    return largest(-scores, most, (weights != 0) & (scores < 0))

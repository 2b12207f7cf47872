"""Influence: the share of a step's first-order effect that each sequence and each token of the update has.

With direction = momentum + decay + sum_i P c_i, c_i = sum_k w_ik grad l_ik, and u = P grad F,

    dF/dlr = grad F . momentum + grad F . decay + sum_ik w_ik (u . grad l_ik)

The last sum runs over the tokens of the update batch: token (i, k) has influence w_ik (u . grad l_ik), and
the derivatives u . grad l_ik of all tokens come from one forward-mode pass in direction u. (P is symmetric,
so it may stand with grad F.) All values are per unit of the learning rate.

That holds P and the clip coefficient ``fixed``, although both depend on the batch: it splits the change of
the step as it is. Through the ``optimizer``, u is grad F times the step's total derivative instead
(:mod:`stepscope.measure.step.derivative`): a token's influence is then the derivative of the change with
respect to that token's weight, the answer to "what if it counted a little less?". The first adds up to the
linear change, the second does not; for a gradient that is clipped its sum over the batch is about 0, since
scaling the batch moves nothing.

u is taken from each of a few folds of the probe prompts by itself: the derivatives are linear in u, so the
folds add up to the whole, and how far they differ says how sure each token's influence and the ranks of all
are (:mod:`stepscope.measure.influence.reliability`).

An optimizer whose step is not linear in its gradient has one of the two ways only, and its shares are not
those of the step (:mod:`stepscope.measure.step.nonlinear`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.influence.probe_gradient import ProbeGradient, probe_gradient
from stepscope.measure.influence.shares import Influence
from stepscope.measure.quantity.base import Quantity, readings_of
from stepscope.measure.quantity.objective import quantity_objective
from stepscope.measure.quantity.probe import Bindings, bindings_on
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.nonlinear import nonlinear_doubt
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import Mode, directional_derivatives, response_logprob
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.products import per_sequence_dots
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.optim.base import THROUGHS, Through
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.stats import Estimate, estimate_from_sums

NUM_FOLDS = 8
"""Folds of the probe prompts by default: 35 ways to halve them, seven degrees of freedom for an error."""

DISAGREEMENT_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Largest difference between the two ways to a sequence's influence, relative to the largest influence."""

NEGLECTED_LIMIT = 0.2
"""Share of the tokens' influence that may go through what is held fixed; above it the sum is unreliable."""


_SUMS = {
    "fixed": "sum over the update batch, preconditioner and clip coefficient fixed",
    "optimizer": "sum over the update batch, through preconditioner and clip coefficient",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class InfluenceOptions:
    """How influence is estimated.

    Attributes:
        baseline: rung of the baseline ladder or ``best``, as in ``measure_change``.
        probe_resolved: also compute the fixed effect through every single probe sequence, which holds the
            update's gradients in the budget's memory.
        mode: how token derivatives are taken, see ``directional_derivatives``.
        groups: (probe seq,) groups of whole probe prompts to keep apart for the errors; by default prompts,
            or random pools of them.
        num_folds: folds of the probe that tokens are told apart by, made of the groups; 1 saves passes, and
            leaves tokens without errors.
        max_groups: most groups of probe prompts kept apart by default.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
    """

    baseline: str = "best"
    probe_resolved: bool = False
    mode: Mode = "auto"
    groups: IntArray | None = None
    num_folds: int = NUM_FOLDS
    max_groups: int = 64
    bindings: Bindings | None = None


def influence(
    policy: Policy,
    step: Step,
    update: Rollouts,
    probe: Rollouts,
    *,
    through: Through = "fixed",
    quantity: str | Quantity = "entropy",
    options: InfluenceOptions = InfluenceOptions(),
    budget: Budget = Budget(),
) -> Influence:
    """The first-order effect of every sequence and token of an update on a quantity.

    Costs a forward and backward pass over the probe batch (two per token and on policy, the second for the
    mean length), one over the update batch, and a forward-mode pass over the update batch for each fold,
    whatever the number of sequences; besides what the baseline needs.

    Args:
        policy: where the step starts; not changed.
        step: the step, from ``reconstruct_step`` on ``update``.
        update: the batch that makes the step.
        probe: samples of the policy that are not in the update batch.
        through: ``fixed`` splits the change of the step, with preconditioner and clip coefficient as they
            are; ``optimizer`` differentiates through both, which says what a change of the batch would do.
        quantity: a name, or a quantity.
        options: baseline, folds and groups.
        budget: what may be used at a time.

    Returns:
        Influences per unit of lr. Tokens add up to sequences exactly; ``fixed`` sequences, momentum and
        decay add up to the linear change of ``measure_change`` to round-off.

    Raises:
        MeasurementError: the step is not of this update batch, an unknown ``through``, or forward and
            reverse mode disagree.
    """
    found = influences(
        policy,
        step,
        update,
        probe,
        throughs=(through,),
        quantity=quantity,
        options=options,
        budget=budget,
    )
    return found[0]


def influences(
    policy: Policy,
    step: Step,
    update: Rollouts,
    probe: Rollouts,
    *,
    throughs: Sequence[Through] | None = None,
    quantity: str | Quantity = "entropy",
    options: InfluenceOptions = InfluenceOptions(),
    budget: Budget = Budget(),
) -> tuple[Influence, ...]:
    """:func:`influence` for several ``throughs`` from the same passes over the probe batch.

    Each beyond the first costs a forward-mode pass over the update batch for each fold. Where both are asked
    for, the sum of the fixed one is flagged where much goes through what it holds.

    Args:
        policy: where the step starts; not changed.
        step: the step, from ``reconstruct_step`` on ``update``.
        update: the batch that makes the step.
        probe: samples of the policy that are not in the update batch.
        throughs: ``fixed``, ``optimizer``, or both; by default what the optimizer has.
        quantity: a name, or a quantity.
        options: baseline, folds and groups.
        budget: what may be used at a time.

    Raises:
        MeasurementError: as :func:`influence`.
    """
    assert policy.optimizer is not None
    throughs = policy.optimizer.throughs if throughs is None else throughs
    for through in throughs:
        if through not in THROUGHS:
            raise MeasurementError(
                f"through: got {through!r}, expected one of {', '.join(THROUGHS)}; use one of these"
            )
    _check_update(step, update)
    bindings = bindings_on(options.bindings, policy, probe, step.direction, budget)
    bound = bindings.bind(quantity, options.baseline)
    slope = probe_gradient(
        policy,
        probe,
        bound,
        groups=options.groups,
        max_groups=options.max_groups,
        budget=replace(budget, memory_bytes=budget.memory_bytes // (1 + len(throughs))),
    )
    folds = slope.folds(options.num_folds)
    whole_only = step.preconditioner is None
    others = {n: slope.dots(part) for n, part in step.components.items() if whole_only or n != "sequences"}
    linear = slope.dots(step.direction)
    rows = slope.num_groups + 1
    pulled: dict[str, Tensor] = {}
    for through in throughs:
        own = step_derivative(policy, step, through).pulled(slope.parts)
        pulled = {n: torch.cat([pulled[n], t]) for n, t in own.items()} if pulled else own
    own_gradients = SequenceGradients(update, weighted_logprobs(step.token_weights))
    products = per_sequence_dots(policy, own_gradients, pulled, budget=budget)
    resolved = None
    if options.probe_resolved:
        resolved = gram(
            policy,
            own_gradients,
            preconditioner=step.metric(),
            other=SequenceGradients(
                probe,
                quantity_objective(bound),
                as_trained=False,
                readings=partial(readings_of, [bound.quantity]),
            ),
            budget=budget,
        ).numpy()
    unit = f"{bound.quantity.unit}/lr"
    parts = ", ".join(dict.fromkeys(["sequences", *others]))
    components = {name: _estimate(slope, by, unit, f"grad F . {name}") for name, by in others.items()}
    found = []
    for i, through in enumerate(throughs):
        part = slice(i * rows, (i + 1) * rows)
        own = {n: t[part] for n, t in pulled.items()}
        fold_tokens = token_products(policy, step, own, folds.mixing, mode=options.mode, budget=budget)
        tokens = update.rows(folds.shares @ fold_tokens)
        sequences = np.array([t.sum() for t in tokens])
        own_products = products[part]
        stderr, reach = slope.errors(own_products)
        whole = None  # of what does not add up, the linear change itself
        if through == "fixed":
            whole = float(sequences.sum() + np.sum(list(others.values()), 0)[:-1].sum() / len(probe))
        found.append(
            Influence(
                quantity=bound.quantity.name,
                through=through,
                normalisation=bound.quantity.normalisation,
                version=bound.quantity.version,
                baseline=bound.baseline.kind,
                lr=step.lr,
                unit=unit,
                sequences=sequences,
                stderr=stderr,
                reach=reach,
                tokens=tokens,
                folds=folds,
                fold_tokens=fold_tokens,
                update=update,
                components=components,
                total=_estimate(slope, linear, unit, f"sum over {parts}", value=whole),
                sum_of_sequences=_estimate(
                    slope, own_products.sum(1), unit, _SUMS[through], value=float(sequences.sum())
                ),
                disagreement=_disagreement(policy, sequences, own_products[:-1].sum(0) / len(probe)),
                probe_resolved=resolved if through == "fixed" else None,
            )
        )
    if policy.optimizer.nonlinear:
        return tuple(_doubted(f, nonlinear_doubt(policy, step, f.through)) for f in found)
    by_name = {f.through: f for f in found}
    if len(by_name) < len(THROUGHS):
        return tuple(found)
    doubt = fixed_doubt(policy, step, by_name["fixed"], by_name["optimizer"])
    return tuple(_doubted(f, doubt) if f.through == "fixed" else f for f in found)


class Weighted(Protocol):
    """A batch with its token weights, such as a step."""

    @property
    def update(self) -> Rollouts: ...  # noqa: D102
    @property
    def token_weights(self) -> Sequence[FloatArray]: ...  # noqa: D102


def token_products(
    policy: Policy,
    step: Weighted,
    pulled: Mapping[str, Tensor],
    mixing: FloatArray,
    *,
    mode: Mode = "auto",
    budget: Budget = Budget(),
) -> FloatArray:
    """(fold, tok) w_ik (u . grad l_ik) of each token of the policy, a tangent in forward mode for each u.

    Sequences without a token weight have no part in the pass; their products are exactly 0.

    Args:
        policy: where the step starts; not changed.
        step: the batch and its token weights.
        pulled: name to (part, ...parameter shape).
        mixing: (fold, part) makes the vectors u from the parts.
        mode: how token derivatives are taken, see ``directional_derivatives``.
        budget: what may be used at a time.
    """
    weights = step.update.flat(step.token_weights)
    pushed = [i for i, row in enumerate(step.token_weights) if np.any(row)]
    found = np.zeros((len(mixing), len(weights)))
    if not pushed:
        return found
    part = step.update.select(pushed)
    places = np.isin(step.update.places[0], pushed)
    directions = (vectors.mixed(pulled, row) for row in mixing)
    slopes = directional_derivatives(policy, part, response_logprob, directions, mode=mode, budget=budget)
    for own, slope in zip(found, slopes, strict=True):
        own[places] = weights[places] * part.flat([d.double().cpu().numpy() for d in slope])
    return found


def neglected_share(fixed: Influence, optimizer: Influence) -> Estimate:
    """Sum over tokens of |optimizer - fixed| / |fixed|: what goes through preconditioner and clipping.

    No error: for this update and this probe batch. Above 0.2, for a clipped gradient and in an optimizer's
    first steps it is flagged: the fixed influence then splits the change of the step, and no longer says what
    a change of the batch would do.
    """
    one, other = np.concatenate(fixed.tokens), np.concatenate(optimizer.tokens)
    whole = float(np.abs(one).sum())
    share = float(np.abs(other - one).sum()) / whole if whole > 0 else float("nan")
    return Estimate(
        share,
        float("nan"),
        fixed.sum_of_sequences.n,
        "share of |influence|",
        "sum over tokens of |influence through the optimizer - fixed influence| / sum of |fixed influence|",
        reliable=share <= NEGLECTED_LIMIT,
        reason="" if share <= NEGLECTED_LIMIT else f"more than {NEGLECTED_LIMIT:.0%}",
    )


def fixed_doubt(policy: Policy, step: Step, fixed: Influence, optimizer: Influence) -> str:
    """Why the fixed influence is not what a change of the batch would do; empty where it nearly is."""
    assert policy.optimizer is not None
    reasons = []
    if step.clip_coefficient < 1:
        reasons.append(f"the gradient is clipped (c = {step.clip_coefficient:.2g})")
    if young := policy.optimizer.youth:
        reasons.append(young)
    share = neglected_share(fixed, optimizer)
    if not share.reliable:
        reasons.append(f"{share.value:.0%} of the tokens' influence goes through what is held fixed")
    if not reasons:
        return ""
    held = "preconditioner and clip coefficient are held fixed"
    return f"{held}, and {', and '.join(reasons)}: see through=optimizer"


def _doubted(found: Influence, doubt: str) -> Influence:
    return replace(found, sum_of_sequences=found.sum_of_sequences.doubted(doubt)) if doubt else found


def _check_update(step: Step, update: Rollouts) -> None:
    if update.response_token_ids != step.update.response_token_ids:
        raise MeasurementError(
            f"the step was made by another batch ({len(step.update)} sequences) than the update given "
            f"({len(update)} sequences); pass step.update or rebuild the step"
        )


def _estimate(
    slope: ProbeGradient, products: FloatArray, unit: str, how: str, *, value: float | None = None
) -> Estimate:
    level = float(products[:-1].sum()) / len(slope.groups) if value is None else value
    pooled = "" if slope.by_prompt else " (pooled at random)"
    errors = f"clustered by probe prompts{pooled}, given the update batch"
    method = f"{how}, first order, baseline {slope.probe.baseline.kind}, {errors}"
    return estimate_from_sums(level, slope.residuals(products[:, None])[:, 0], unit=unit, method=method)


def _disagreement(policy: Policy, by_tokens: FloatArray, by_sequences: FloatArray) -> float:
    largest = float(np.abs(by_sequences).max())
    found = float(np.abs(by_tokens - by_sequences).max()) / largest if largest != 0 else 0.0
    limit = DISAGREEMENT_LIMIT.get(policy.dtype, 0.1)
    if not found <= limit:
        raise MeasurementError(
            f"influence by forward mode and by reverse mode differ by {found:.1e} of the largest "
            f"sequence's, expected less than {limit:g}; measure with --precision float64, and report this "
            "architecture if that does not help"
        )
    return found

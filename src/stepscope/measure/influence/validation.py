"""Ground truth for influence: change the weights of sequences, redo the AdamW step, measure again.

Three counterfactuals, from little to much: the weight of one sequence changes a little (``reweighted``, a
derivative), one sequence is left out, and a random half is left out. Two ways of leaving out, which are not
the same either:

- ``zeroed``: its gradient is gone, everything else as it was (what influence claims to predict);
- ``recomputed``: the advantages of its group are those of the remaining responses (what training without it
  would have used). The divisor of the loss stays that of the full batch in both.

A re-step goes through clipping and the second moment anew, so it holds AdamW's own nonlinearity too. The
linear datamodelling score is the rank correlation over random subsets of summed influence with the true
change (Park et al. 2023, arXiv:2303.14186).

Prediction and truth on one probe batch share its noise: their agreement says that the change is linear, not
that the ranking would be found again. That is said by predictions from one half of the probe prompts against
the truth on the other, stepped up to two whole probes (:mod:`stepscope.measure.influence.reliability`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.influence.probe_gradient import Folds
from stepscope.measure.influence.reliability import split_half
from stepscope.measure.influence.shares import Influence
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.estimators import ProbeValues, per_decision
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import Step, assemble_step, weighted_logprobs
from stepscope.measure.step.terms import term_gradients
from stepscope.policy import vectors
from stepscope.policy.gradients.products import weighted_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.estimators import with_advantages
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.passes import Budget, track
from stepscope.policy.state import Policy
from stepscope.results import BoolArray, FloatArray, Rollouts
from stepscope.results.validation import Agreement, Validation
from stepscope.stats import Estimate, bootstrap

Removal = Literal["zeroed", "recomputed"]
REMOVALS: tuple[Removal, ...] = ("zeroed", "recomputed")

REWEIGHTING = 1e-3
"""Relative change of a sequence's weight on either side, for the derivative with respect to it."""


@dataclass(frozen=True, kw_only=True)
class RemovalOptions:
    """Which sequences are left out of re-made steps, and how.

    Attributes:
        removal: ``zeroed`` or ``recomputed``.
        lr: learning rate of the steps; the step's own by default.
        num_subsets: random subsets; 0 for none.
        subset_share: share of the sequences that stay in a subset.
        num_single: sequences left out one at a time, drawn at random; 0 for none.
        seed: of subsets and sequences.

    Raises:
        MeasurementError: an unknown removal.
    """

    removal: Removal = "zeroed"
    lr: float | None = None
    num_subsets: int = 64
    subset_share: float = 0.5
    num_single: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        if self.removal not in REMOVALS:
            raise MeasurementError(f"unknown removal {self.removal!r}; choose from {', '.join(REMOVALS)}")


@dataclass(frozen=True)
class Remade:
    """True changes of a quantity under steps made again with other weights of the sequences.

    Attributes:
        quantity: name of the quantity.
        removal: how sequences were taken out.
        lr: learning rate of the re-made steps.
        subsets: (subset, seq) True where the sequence stayed.
        subset_true: (subset,) change under the step re-made from the sequences that stayed.
        single_index: (single,) sequences left out, or reweighted, one at a time.
        single_true: (single,) change under the full step minus that without the sequence.
        reweighted_true: (single,) derivative of the change with respect to the sequence's relative weight;
            none where advantages are recomputed, and none of an optimizer whose step has no derivative that
            differences find: Lion's is a sign, and Muon's is computed in bfloat16.
        subset_folds: (fold, subset) ``subset_true`` on each fold of the probe alone.
        single_folds: (fold, single) the same of ``single_true``.
    """

    quantity: str
    removal: Removal
    lr: float
    subsets: BoolArray
    subset_true: FloatArray
    single_index: tuple[int, ...]
    single_true: FloatArray
    reweighted_true: FloatArray
    subset_folds: FloatArray
    single_folds: FloatArray


def remake_steps(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    found: Influence,
    *,
    quantity: str | Quantity | None = None,
    options: RemovalOptions = RemovalOptions(),
    budget: Budget = Budget(),
) -> Remade:
    """Make a step again with other weights of its sequences, and measure each.

    Costs one forward and backward pass over the update batch for all re-made gradients together, and one
    forward pass over the probe batch for each subset and each sequence left out, two for each reweighted;
    none where only sequences without a token weight are left out. Use float64: in float32 the effect of one
    sequence drowns in round-off.

    Args:
        policy: where the step starts, with AdamW's state; restored bitwise.
        step: the full step.
        probe: the batch on which changes are measured.
        found: what says of which quantity: its name, normalisation, version and baseline.
        quantity: as it was given to ``influence``; by default the quantity of that name.
        options: which sequences are left out, and how.
        budget: what may be used at a time.

    Raises:
        MeasurementError: a learning rate of zero, or a loss whose token weights are not
            proportional to the advantage (a KL penalty, an off-policy batch), for ``recomputed``.
    """
    rate = step.lr if options.lr is None else options.lr
    if not rate > 0:
        raise MeasurementError("validation needs a learning rate above 0; the step's own is 0, pass lr=")
    chosen = make_quantity(
        found.quantity if quantity is None else quantity,
        probe,
        policy=policy,
        normalisation=found.normalisation,
        version=found.version,
    )
    bound = bind_quantity(
        policy, probe, chosen, direction=step.direction, baseline=found.baseline, budget=budget
    )
    count = len(step.update)
    rng = np.random.default_rng(options.seed)
    kept = max(1, min(count - 1, round(options.subset_share * count)))
    subsets = np.zeros((options.num_subsets, count), dtype=bool)
    for row in subsets:
        row[rng.choice(count, kept, replace=False)] = True
    singles = np.sort(rng.choice(count, min(options.num_single, count), replace=False))
    without = np.ones((len(singles), count), dtype=bool)
    without[np.arange(len(singles)), singles] = False
    masks = np.concatenate([np.ones((1, count), dtype=bool), subsets, without])
    assert policy.optimizer is not None
    reweighted = options.removal == "zeroed" and not policy.optimizer.nonlinear
    if options.removal == "zeroed":
        per_unit, shares = step.token_weights, masks.astype(np.float64)
        little = REWEIGHTING * ~without
        if reweighted:
            shares = np.concatenate([shares, 1 + little, 1 - little])
    else:
        per_unit, shares = _unit_weights(policy, step), _advantages_within(policy, step.update, masks)
    gradients = weighted_gradients(
        policy, SequenceGradients(step.update, weighted_logprobs(per_unit)), shares, budget=budget
    )
    # sequences without a weight leave every gradient as it is, and so do steps that differ by them alone
    pushed = np.array([bool(np.any(row)) for row in per_unit])
    _, first, same = np.unique(shares[:, pushed], axis=0, return_index=True, return_inverse=True)
    gradients = vectors.rows(gradients, first)
    truth, by_fold = _true_changes(policy, step, probe, bound, gradients, rate, found.folds, budget)
    truth, by_fold = truth[same], by_fold[:, same]
    parts = np.cumsum([1, len(subsets), len(singles), len(singles)])
    whole, halves, alone, more, less = np.split(truth, parts)
    whole_folds, halves_folds, alone_folds, *_ = np.split(by_fold, parts, axis=1)
    if not reweighted:
        more = less = np.empty(0)
    return Remade(
        quantity=found.quantity,
        removal=options.removal,
        lr=rate,
        subsets=subsets,
        subset_true=halves,
        single_index=tuple(int(i) for i in singles),
        single_true=whole[0] - alone,
        reweighted_true=(more - less) / (2 * REWEIGHTING),
        subset_folds=halves_folds,
        single_folds=whole_folds - alone_folds,
    )


def compare(remade: Remade, found: Influence) -> Validation:
    """Hold influences against the true changes of re-made steps.

    Args:
        remade: true changes, from :func:`remake_steps` on the same batches.
        found: influences on the same quantity.
    """
    lr, removal, count = remade.lr, remade.removal, len(found.sequences)
    singles = list(remade.single_index)
    kept = int(remade.subsets[0].sum()) if len(remade.subsets) else 0
    half = lr * (found.total.value - ~remade.subsets @ found.sequences)
    single = lr * found.sequences[singles]
    one = f"{len(singles)} of {count} sequences"
    folds, shares = found.fold_sequences, found.folds.shares
    halves = _agreement(
        half, remade.subset_true, f"{removal}, {len(remade.subsets)} subsets of {kept} of {count} sequences"
    )
    singly = _agreement(single, remade.single_true, f"{removal}, {one} left out one at a time")
    half_across = split_half(
        folds @ remade.subsets.T.astype(np.float64),
        shares,
        remade.subset_folds,
        what=f"predicted and true changes ({removal}, {len(remade.subsets)} subsets)",
    )
    single_across = split_half(
        folds[:, singles],
        shares,
        remade.single_folds,
        rank=False,
        what=f"predicted and true changes ({removal}, {one} left out one at a time)",
    )
    return Validation(
        quantity=found.quantity,
        removal=removal,
        through=found.through,
        lr=lr,
        lds=halves.spearman,
        lds_pearson=halves.pearson,
        leave_one_out=singly.pearson,
        leave_one_out_spearman=singly.spearman,
        lds_across=half_across.whole,
        lds_across_halves=half_across.halves,
        leave_one_out_across=single_across.whole,
        leave_one_out_across_halves=single_across.halves,
        subsets=tuple(tuple(np.flatnonzero(row).tolist()) for row in remade.subsets),
        subset_true=halves.true,
        subset_predicted=halves.predicted,
        single_index=remade.single_index,
        single_true=singly.true,
        single_predicted=singly.predicted,
        half=halves,
        single=singly,
        reweighted=_agreement(
            single[: len(remade.reweighted_true)], remade.reweighted_true, f"{one} reweighted one at a time"
        ),
    )


def _true_changes(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    bound: ProbeValues,
    gradients: dict[str, Tensor],
    lr: float,
    folds: Folds,
    budget: Budget,
) -> tuple[FloatArray, FloatArray]:
    """True change of the quantity under the step re-made with each (case, ...parameter shape) gradient.

    (case,) on the whole probe batch, and (fold, case) on each fold of it.
    """
    members = folds.labels == np.arange(len(folds.shares))[:, None]
    members = members / members.sum(1, keepdims=True)
    terms = term_gradients(policy, step.update, remade=True, budget=budget)
    count = len(next(iter(gradients.values())))
    changes = np.empty(count)
    by_fold = np.empty((len(members), count))
    for row in track(range(count), "re-made steps", budget):
        ascent = vectors.row(gradients, row, policy.dtype)
        remade = assemble_step(policy, step.update, step.token_weights, ascent, terms)
        moved = values_at(policy, probe, (bound.quantity,), remade.direction, lr, budget=budget).quantity(0)
        change = per_decision(bound, moved)
        changes[row] = change.value
        by_fold[:, row] = change.value + members @ change.residuals
    return changes, by_fold


def _unit_weights(policy: Policy, step: Step) -> tuple[FloatArray, ...]:
    """Token weights per unit of advantage, on-policy: w_ik = A_i times these.

    Raises:
        MeasurementError: the step's weights are not of that form.
    """
    update = step.update
    assert update.advantages is not None
    settings = replace(policy.settings, objective=None)
    unit = token_weights(replace(update, advantages=np.ones(len(update)), token_advantages=None), settings)
    proportional = settings == policy.settings and settings.beta == 0.0 and settings.kl_in_reward == 0.0
    proportional = proportional and all(
        np.allclose(a * b, w, rtol=1e-6, atol=1e-12)
        for a, b, w in zip(update.advantages, unit, step.token_weights, strict=True)
    )
    if not proportional:
        raise MeasurementError(
            "recomputed advantages: this loss's token weights are not proportional to the advantage (a KL "
            "penalty, an objective that weighs tokens, or a batch sampled by another policy); validate with "
            "removal='zeroed'"
        )
    return unit


def _advantages_within(policy: Policy, update: Rollouts, masks: BoolArray) -> FloatArray:
    """(mask, seq) advantages among the sequences of each mask, zero for the others.

    Raises:
        MeasurementError: the step's own are not those of the rewards, so that these would be of another step.
    """
    own, all_of_them = update.advantages, with_advantages(update, policy.settings).advantages
    assert own is not None
    assert all_of_them is not None
    apart = float(np.abs(own - all_of_them).max())
    if apart > 1e-3 * max(1.0, float(np.abs(all_of_them).max())):
        raise MeasurementError(
            f"recomputed advantages: those of the update batch are up to {apart:.3g} from those of its "
            "rewards by the settings, so those of a part of it cannot be told; validate with removal='zeroed'"
        )
    found = np.zeros(masks.shape)
    for row, mask in enumerate(masks):
        remaining = with_advantages(update.select(np.flatnonzero(mask)), policy.settings)
        found[row, mask] = remaining.advantages
    return found


def _agreement(predicted: FloatArray, true: FloatArray, words: str) -> Agreement:
    size, missed = float(np.linalg.norm(true)), float(np.linalg.norm(true - predicted))
    square = float(predicted @ predicted)
    return Agreement(
        pearson=_correlation(predicted, true, words, rank=False),
        spearman=_correlation(predicted, true, words, rank=True),
        slope=float(predicted @ true) / square if square > 0 else float("nan"),
        error=missed / size if size > 0 else float("nan"),
        predicted=predicted,
        true=true,
    )


def _correlation(predicted: FloatArray, true: FloatArray, words: str, *, rank: bool) -> Estimate:
    """Spearman's or Pearson's correlation with a bootstrap error over subsets (or sequences)."""
    count = len(true)
    name = "Spearman" if rank else "Pearson"
    method = f"{name} correlation of predicted and true change, {words}, bootstrap error"

    def statistic(index: Any) -> float:
        x, y = predicted[index], true[index]
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            return float("nan")
        return float(spearmanr(x, y).statistic if rank else pearsonr(x, y).statistic)

    if count < 3:
        return Estimate(
            float("nan"),
            float("nan"),
            count,
            "correlation",
            method,
            reliable=False,
            reason=f"{count} points: a correlation needs at least three",
        )
    value = statistic(np.arange(count))
    error = bootstrap(statistic, np.arange(count), num_resamples=400).stderr
    return Estimate(value, error, count, "correlation", method)

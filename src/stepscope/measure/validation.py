"""Ground truth for influence: take sequences out of the update, redo the AdamW step, measure again.

Two ways of taking a sequence out, which are not the same counterfactual:

- ``zeroed``: its gradient is gone, everything else as it was (what influence claims to predict);
- ``recomputed``: the advantages of its group are those of the remaining responses (what training without it
  would have used). The divisor of the loss stays that of the full batch in both.

A re-step goes through clipping and the second moment anew, so it holds AdamW's own nonlinearity too. The
linear datamodelling score is the rank correlation over random subsets of summed influence with the true
change (Park et al. 2023, arXiv:2303.14186).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from rich.progress import track
from scipy.stats import pearsonr, spearmanr

from stepscope.errors import MeasurementError
from stepscope.measure.estimators import per_decision
from stepscope.measure.influence import Influence
from stepscope.measure.line import values_at
from stepscope.measure.probe_gradient import BoundQuantity, bind_quantity
from stepscope.measure.quantities import Quantity
from stepscope.measure.step import Step, assemble_step, weighted_logprobs
from stepscope.policy.objective import advantages, token_weights
from stepscope.policy.products import weighted_gradients
from stepscope.policy.state import Policy
from stepscope.results import BoolArray, FloatArray, Rollouts
from stepscope.stats import Estimate, bootstrap

Removal = Literal["zeroed", "recomputed"]
REMOVALS: tuple[Removal, ...] = ("zeroed", "recomputed")


@dataclass(frozen=True)
class Validation:
    """Influence against true changes of re-made steps.

    Attributes:
        quantity: name of the quantity.
        removal: how sequences were taken out.
        lr: learning rate of the re-made steps.
        lds: Spearman correlation over random subsets of predicted and true change.
        lds_pearson: Pearson correlation over the same.
        leave_one_out: Pearson correlation over single sequences of predicted and true effect.
        leave_one_out_spearman: Spearman correlation over the same.
        subsets: (subset, seq) True where the sequence stayed.
        subset_true: (subset,) true change of the quantity under the re-made step.
        subset_predicted: (subset,) lr * (influence of the sequences that stayed + momentum + decay).
        single_index: (single,) sequences left out one at a time.
        single_true: (single,) true change of the full step minus that without the sequence.
        single_predicted: (single,) lr * influence of the sequence.
    """

    quantity: str
    removal: str
    lr: float
    lds: Estimate
    lds_pearson: Estimate
    leave_one_out: Estimate
    leave_one_out_spearman: Estimate
    subsets: BoolArray
    subset_true: FloatArray
    subset_predicted: FloatArray
    single_index: tuple[int, ...]
    single_true: FloatArray
    single_predicted: FloatArray

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary; subsets as lists of the sequences that stayed."""
        return {
            "quantity": self.quantity,
            "removal": self.removal,
            "lr": self.lr,
            "lds": self.lds.to_dict(),
            "lds_pearson": self.lds_pearson.to_dict(),
            "leave_one_out": self.leave_one_out.to_dict(),
            "leave_one_out_spearman": self.leave_one_out_spearman.to_dict(),
            "subsets": [np.flatnonzero(row).tolist() for row in self.subsets],
            "subset_true": self.subset_true.tolist(),
            "subset_predicted": self.subset_predicted.tolist(),
            "single_index": list(self.single_index),
            "single_true": self.single_true.tolist(),
            "single_predicted": self.single_predicted.tolist(),
        }


def validate_influence(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    found: Influence,
    *,
    quantity: str | Quantity | None = None,
    removal: Removal = "zeroed",
    lr: float | None = None,
    num_subsets: int = 64,
    subset_share: float = 0.5,
    num_single: int = 32,
    seed: int = 0,
    max_sequences: int = 16,
    progress: bool = False,
) -> Validation:
    """Compare influences with true changes of steps re-made without some of the sequences.

    Costs one forward and backward pass over the update batch for all re-made gradients together, and one
    forward pass over the probe batch for each subset and each sequence left out. Use float64: in float32 the
    effect of one sequence drowns in round-off.

    Args:
        policy: where the step starts, with AdamW's state; restored bitwise.
        step: the full step.
        probe: the probe batch of ``found``.
        found: influences of ``step.update``.
        quantity: as it was given to ``influence``; by default the quantity of that name.
        removal: ``zeroed`` or ``recomputed``.
        lr: learning rate of the steps; the step's own by default.
        num_subsets: random subsets; 0 for none.
        subset_share: share of the sequences that stay in a subset.
        num_single: sequences left out one at a time, drawn at random; 0 for none.
        seed: of subsets and sequences.
        max_sequences: micro-batch size.
        progress: show a progress bar.

    Raises:
        MeasurementError: an unknown removal, a learning rate of zero, or a loss whose token weights are not
            proportional to the advantage (a KL penalty, an off-policy batch), for ``recomputed``.
    """
    rate = step.lr if lr is None else lr
    if removal not in REMOVALS:
        raise MeasurementError(f"unknown removal {removal!r}; choose from {', '.join(REMOVALS)}")
    if not rate > 0:
        raise MeasurementError("validation needs a learning rate above 0; the step's own is 0, pass lr=")
    bound = bind_quantity(
        policy,
        probe,
        found.quantity if quantity is None else quantity,
        direction=step.direction,
        normalisation=found.normalisation,
        version=found.version,
        baseline=found.baseline,
        max_sequences=max_sequences,
    )
    count = len(step.update)
    rng = np.random.default_rng(seed)
    kept = max(1, min(count - 1, round(subset_share * count)))
    subsets = np.zeros((num_subsets, count), dtype=bool)
    for row in subsets:
        row[rng.choice(count, kept, replace=False)] = True
    singles = np.sort(rng.choice(count, min(num_single, count), replace=False))
    without = np.ones((len(singles), count), dtype=bool)
    without[np.arange(len(singles)), singles] = False
    masks = np.concatenate([np.ones((1, count), dtype=bool), subsets, without])
    truth = _true_changes(policy, step, probe, bound, masks, removal, rate, max_sequences, progress)
    base = found.momentum.value + found.decay.value
    predicted = rate * (masks @ found.sequences + base)
    chosen = slice(1, 1 + num_subsets)
    single_true, single_predicted = truth[0] - truth[1 + num_subsets :], rate * found.sequences[singles]
    words = f"{removal}, {num_subsets} subsets of {kept} of {count} sequences"
    one = f"{removal}, {len(singles)} of {count} sequences left out one at a time"
    return Validation(
        quantity=found.quantity,
        removal=removal,
        lr=rate,
        lds=_correlation(predicted[chosen], truth[chosen], words, rank=True),
        lds_pearson=_correlation(predicted[chosen], truth[chosen], words, rank=False),
        leave_one_out=_correlation(single_predicted, single_true, one, rank=False),
        leave_one_out_spearman=_correlation(single_predicted, single_true, one, rank=True),
        subsets=subsets,
        subset_true=truth[chosen],
        subset_predicted=predicted[chosen],
        single_index=tuple(int(i) for i in singles),
        single_true=single_true,
        single_predicted=single_predicted,
    )


def _true_changes(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    bound: BoundQuantity,
    masks: BoolArray,
    removal: Removal,
    lr: float,
    max_sequences: int,
    progress: bool,
) -> FloatArray:
    """(mask,) true change of the quantity under the step re-made from the sequences of each mask."""
    if removal == "zeroed":
        per_unit, shares = step.token_weights, masks.astype(np.float64)
    else:
        per_unit, shares = _unit_weights(policy, step), _advantages_within(policy, step.update, masks)
    sums = weighted_gradients(
        policy,
        step.update,
        weighted_logprobs(per_unit),
        shares,
        max_sequences=max_sequences,
        progress=progress,
    )
    changes = np.empty(len(masks))
    for row in track(range(len(masks)), description="re-made steps", disable=not progress):
        remade = assemble_step(
            policy, step.update, step.token_weights, {n: t[row].to(policy.dtype) for n, t in sums.items()}
        )
        moved = values_at(
            policy, probe, (bound.quantity,), remade.direction, lr, max_sequences=max_sequences
        ).quantity(0)
        changes[row] = per_decision(bound.probe, moved).value
    return changes


def _unit_weights(policy: Policy, step: Step) -> tuple[FloatArray, ...]:
    """Token weights per unit of advantage, on-policy: w_ik = A_i times these.

    Raises:
        MeasurementError: the step's weights are not of that form.
    """
    update = step.update
    assert update.advantages is not None
    settings = replace(policy.settings, objective=None)
    unit = token_weights(replace(update, advantages=np.ones(len(update))), settings)
    proportional = settings == policy.settings and settings.beta == 0.0
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
    """(mask, seq) advantages among the sequences of each mask, zero for the others."""
    found = np.zeros(masks.shape)
    for row, mask in enumerate(masks):
        found[row, mask] = advantages(
            update.rewards[mask], update.prompt_index[mask], policy.settings.scale_rewards
        )
    return found


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

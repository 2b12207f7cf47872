"""Influence: the share of a step's first-order effect that each sequence and each token of the update has.

With direction = momentum + decay + sum_i P c_i, c_i = sum_k w_ik grad l_ik, and u = P grad F,

    dF/dlr = grad F . momentum + grad F . decay + sum_ik w_ik (u . grad l_ik)

The last sum runs over the tokens of the update batch: token (i, k) has influence w_ik (u . grad l_ik), and
the derivatives u . grad l_ik of all tokens come from one forward-mode pass in direction u. (P is symmetric,
so it may stand with grad F.) All values are per unit of the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stepscope import runs
from stepscope.errors import MeasurementError
from stepscope.measure.probe_gradient import ProbeGradient, bind_quantity, probe_gradient
from stepscope.measure.quantities import Quantity
from stepscope.measure.step import Step, weighted_logprobs
from stepscope.policy.gradients import Mode, directional_derivative, response_logprob
from stepscope.policy.gram import gram
from stepscope.policy.products import per_sequence_dots
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.stats import Estimate

DISAGREEMENT_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Largest difference between the two ways to a sequence's influence, relative to the largest influence."""


@dataclass(frozen=True)
class Influence:
    """What every sequence and token of the update batch does to a quantity, to first order.

    Attributes:
        quantity: its name.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        baseline: rung of the baseline ladder in use.
        lr: the step's own learning rate; multiply by it for the effect of the step that was to be taken.
        unit: of every value here: the quantity's unit per unit of lr.
        sequences: (seq,) influence of each sequence of the update batch.
        stderr: (seq,) standard errors, clustered by probe prompt, for a given update batch.
        tokens: per sequence (tok,) influence of each token; they add up to ``sequences``.
        momentum: effect of the momentum part of the direction.
        decay: effect of weight decay.
        bonus: effect of an entropy bonus; None where the loss has none.
        total: sequences + momentum + decay + bonus: the linear change per unit of lr.
        sum_of_sequences: the update batch's own part, with its error.
        disagreement: largest difference between sequence influences by forward and by reverse mode, relative
            to the largest.
        probe_resolved: (probe sequence, update sequence) effect of each update sequence through each probe
            sequence; its mean over probe sequences is ``sequences``. None unless asked for.
    """

    quantity: str
    normalisation: str
    version: str
    baseline: str
    lr: float
    unit: str
    sequences: FloatArray
    stderr: FloatArray
    tokens: tuple[FloatArray, ...]
    momentum: Estimate
    decay: Estimate
    total: Estimate
    sum_of_sequences: Estimate
    disagreement: float
    probe_resolved: FloatArray | None = None
    bonus: Estimate | None = None

    def sequence_columns(self) -> dict[str, list[Any]]:
        """Rows of ``influence_sequences.parquet``: one per sequence, then momentum, decay and any bonus."""
        count = len(self.sequences)
        others = {"momentum": self.momentum, "decay": self.decay}
        if self.bonus is not None:
            others["bonus"] = self.bonus
        return {
            "component": ["sequence"] * count + list(others),
            "sequence_id": [*range(count), *[None] * len(others)],
            "quantity": [self.quantity] * (count + len(others)),
            "influence": [*self.sequences.tolist(), *(e.value for e in others.values())],
            "stderr": [*self.stderr.tolist(), *(e.stderr for e in others.values())],
        }

    def token_columns(self) -> dict[str, list[Any]]:
        """Rows of ``influence_tokens.parquet``: one per response token."""
        lengths = [len(t) for t in self.tokens]
        return {
            "sequence_id": np.repeat(np.arange(len(lengths)), lengths).tolist(),
            "position": np.concatenate([np.arange(n) for n in lengths]).tolist(),
            "quantity": [self.quantity] * sum(lengths),
            "influence": np.concatenate(self.tokens).tolist(),
        }


def influence(
    policy: Policy,
    step: Step,
    update: Rollouts,
    probe: Rollouts,
    *,
    quantity: str | Quantity = "entropy",
    normalisation: str = "per_token",
    version: str = "on_policy",
    baseline: str = "best",
    reference: nn.Module | None = None,
    probe_resolved: bool = False,
    mode: Mode = "auto",
    max_groups: int = 64,
    memory_bytes: int = 2 * 2**30,
    max_sequences: int = 16,
    progress: bool = False,
) -> Influence:
    """The first-order effect of every sequence and token of an update on a quantity.

    Costs a forward and backward pass over the probe batch (two per token and on policy, the second for the
    mean length), one over the update batch, and a forward-mode pass over the update batch, whatever the
    number of sequences; besides what the baseline needs.

    Args:
        policy: where the step starts; not changed.
        step: the step, from ``reconstruct_step`` on ``update``.
        update: the batch that makes the step.
        probe: samples of the policy that are not in the update batch.
        quantity: a name, or a quantity bound to ``probe``.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` (prefixes move too) or ``fixed_prefix``.
        baseline: rung of the baseline ladder or ``best``, as in ``measure_change``.
        reference: reference model of ``kl``.
        probe_resolved: also compute the effect through every single probe sequence, which holds the update's
            gradients in ``memory_bytes``.
        mode: how token derivatives are taken, see ``directional_derivative``.
        max_groups: most groups of probe prompts kept apart for the standard errors.
        memory_bytes: budget for what is kept in parameter space.
        max_sequences: micro-batch size.
        progress: show progress bars.

    Returns:
        Influences per unit of lr. Tokens add up to sequences exactly; sequences, momentum and decay add up to
        the linear change of ``measure_change`` to round-off.

    Raises:
        MeasurementError: the step is not of this update batch, or forward and reverse mode disagree.
    """
    _check_update(step, update)
    bound = bind_quantity(
        policy,
        probe,
        quantity,
        direction=step.direction,
        normalisation=normalisation,
        version=version,
        baseline=baseline,
        reference=reference,
        max_sequences=max_sequences,
    )
    slope = probe_gradient(
        policy,
        probe,
        bound,
        max_groups=max_groups,
        memory_bytes=memory_bytes // 2,
        max_sequences=max_sequences,
        progress=progress,
    )
    momentum, decay = slope.dots(step.momentum), slope.dots(step.decay)
    bonus = slope.dots(step.bonus) if step.bonus else None
    others = momentum + decay if bonus is None else momentum + decay + bonus
    pulled = slope.scaled(step.preconditioner)
    objective = weighted_logprobs(step.token_weights)
    products = per_sequence_dots(
        policy, update, objective, pulled, max_sequences=max_sequences, progress=progress
    )
    u = {n: t[:-1].sum(0) / len(probe) for n, t in pulled.items()}
    del pulled
    derivatives = directional_derivative(
        policy, update, response_logprob, u, mode=mode, max_sequences=max_sequences
    )
    tokens = tuple(w * d.double().cpu().numpy() for w, d in zip(step.token_weights, derivatives, strict=True))
    sequences = np.array([t.sum() for t in tokens])
    unit = f"{bound.unit}/lr"
    resolved = None
    if probe_resolved:
        resolved = gram(
            policy,
            update,
            objective,
            preconditioner=step.preconditioner,
            other=(probe, bound.objective),
            other_as_trained=False,
            memory_bytes=memory_bytes,
            max_sequences=max_sequences,
            keep_logits=bound.quantity.needs_logits,
            progress=progress,
        ).numpy()
    own = products.sum(1)
    return Influence(
        quantity=bound.quantity.name,
        normalisation=normalisation,
        version=version,
        baseline=bound.baseline,
        lr=step.lr,
        unit=unit,
        sequences=sequences,
        stderr=slope.errors(products),
        tokens=tokens,
        momentum=_estimate(slope, momentum, unit, "grad F . momentum"),
        decay=_estimate(slope, decay, unit, "grad F . decay"),
        total=_estimate(
            slope,
            own + others,
            unit,
            "sum over sequences, momentum and decay" + ("" if bonus is None else " and entropy bonus"),
            value=float(sequences.sum() + others[:-1].sum() / len(probe)),
        ),
        sum_of_sequences=_estimate(
            slope, own, unit, "sum over the update batch", value=float(sequences.sum())
        ),
        disagreement=_disagreement(policy, sequences, products[:-1].sum(0) / len(probe)),
        probe_resolved=resolved,
        bonus=None if bonus is None else _estimate(slope, bonus, unit, "grad F . entropy bonus"),
    )


def _check_update(step: Step, update: Rollouts) -> None:
    if update.response_token_ids != step.update.response_token_ids:
        raise MeasurementError(
            f"the step was made by another batch ({len(step.update)} sequences) than the update given "
            f"({len(update)} sequences); pass step.update or rebuild the step"
        )


def _estimate(
    slope: ProbeGradient, products: FloatArray, unit: str, how: str, *, value: float | None = None
) -> Estimate:
    count = slope.num_groups
    error = float(slope.errors(products[:, None])[0])
    level = float(products[:-1].sum()) / len(slope.groups) if value is None else value
    pooled = "" if slope.by_prompt else " (pooled at random)"
    few = count < 2
    return Estimate(
        value=level,
        stderr=error,
        n=count,
        unit=unit,
        method=f"{how}, first order, baseline {slope.bound.baseline}, clustered by probe prompts{pooled}",
        reliable=not few,
        reason=f"{count} group of probe prompts: a standard error needs at least two" if few else "",
    )


def _disagreement(policy: Policy, by_tokens: FloatArray, by_sequences: FloatArray) -> float:
    largest = float(np.abs(by_sequences).max())
    found = float(np.abs(by_tokens - by_sequences).max()) / largest if largest > 0 else 0.0
    limit = DISAGREEMENT_LIMIT.get(policy.dtype, 0.1)
    if not found <= limit:
        raise MeasurementError(
            f"influence by forward mode and by reverse mode differ by {found:.1e} of the largest "
            f"sequence's, expected less than {limit:g}; measure with --precision float64, and report this "
            "architecture if that does not help"
        )
    return found


def write_influence(found: Sequence[Influence], sequences_path: Path, tokens_path: Path) -> None:
    """Write ``influence_sequences.parquet`` and ``influence_tokens.parquet``, atomically.

    Args:
        found: influences on one update batch, one per quantity.
        sequences_path: where the table of sequences goes.
        tokens_path: where the table of tokens goes.
    """
    for path, columns in (
        (sequences_path, [f.sequence_columns() for f in found]),
        (tokens_path, [f.token_columns() for f in found]),
    ):
        merged = {name: [value for c in columns for value in c[name]] for name in columns[0]}
        runs.write_table(path, merged)

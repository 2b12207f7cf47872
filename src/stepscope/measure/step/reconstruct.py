"""The step a checkpoint would take, as a sum: momentum + weight decay + one component per sequence.

What else the loss has that belongs to no sequence (:data:`stepscope.measure.step.terms.TERMS`) makes further
components.

With g = grad Loss, clip coefficient c = min(1, max_norm / (|g| + 1e-6)), and what the optimizer makes of c g
(:mod:`stepscope.policy.optim`): parts that are there without a gradient and a preconditioner P,

    direction = momentum + decay + P sum_ik w_ik grad l_ik + P sum over terms

where w_ik = -dLoss/dl_ik are the token weights. The parameters after the step are params + lr * direction.

Where an optimizer has no P, since its step D is not linear in the gradient, ``momentum`` is D(0), the step
without a gradient, ``sequences`` what the gradient of the sequences adds to that, D(c a) - D(0), and each
term what it adds to the step without it, in the order of the terms; so the parts add up all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import BatchError, CheckpointError, MeasurementError
from stepscope.measure.step.divergence import token_divergences
from stepscope.measure.step.terms import TERMS, term_gradients
from stepscope.policy import vectors
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import WeightedLogprobs, gradient
from stepscope.policy.group import current
from stepscope.policy.loss.surrogate import Seen, needs_reference, sums_over_vocabulary, token_weights
from stepscope.policy.numerics.finiteness import first_not_finite
from stepscope.policy.optim.base import OptimizerState, Update
from stepscope.policy.passes import Budget
from stepscope.policy.reference import reference_logprobs
from stepscope.policy.rollouts import response_text, score_discriminators, score_rollouts
from stepscope.policy.sampling.drawn_by import DRIFT_LIMIT
from stepscope.policy.state import Policy
from stepscope.results import Brief, FloatArray, Rollouts
from stepscope.results.step import Component, StepReport
from stepscope.results.views import Parts, Plotted
from stepscope.rules.program import Program

if TYPE_CHECKING:
    import pandas as pd

CLIP_EPSILON = 1e-6
"""``torch.nn.utils.clip_grad_norm_`` adds this to the norm."""


@dataclass(frozen=True, repr=False)
class Step(Plotted, Brief):
    """One step of an optimizer in components.

    All vectors are keyed by ``named_parameters()`` names and per unit of ``lr``. With several learning rates,
    ``lr`` is the first group's and the parts of group j are scaled by lr_j / lr.

    Attributes:
        components: what each contributes, by name: ``momentum``, ``decay``, ``sequences`` (the update batch,
            summed over its sequences), and of :data:`stepscope.measure.step.terms.TERMS` those that the loss
            has.
        preconditioner: P, elementwise, from sum_ik w_ik grad l_ik to ``sequences``; None where the optimizer
            has none.
        ascent: -grad Loss before clipping: sum_ik w_ik grad l_ik, and the gradients of the terms.
        token_weights: w_ik = -dLoss/dl_ik, one (tok,) array per sequence.
        lr: learning rate of the step.
        grad_norm: |g| before clipping.
        clip_coefficient: c; 1 where nothing was clipped.
        update: the batch that makes the step.
    """

    components: Mapping[str, dict[str, Tensor]]
    preconditioner: dict[str, Tensor] | None
    ascent: dict[str, Tensor]
    token_weights: tuple[FloatArray, ...]
    lr: float
    grad_norm: float
    clip_coefficient: float
    update: Rollouts

    @cached_property
    def direction(self) -> dict[str, Tensor]:
        """(params' - params) / lr, the sum of all components."""
        return vectors.add(*self.components.values())

    def report(self) -> StepReport:
        """Size and direction of its components, without what takes a policy to know."""
        total = vectors.norm(self.direction)
        return StepReport(
            lr=self.lr,
            grad_norm=self.grad_norm,
            clip_coefficient=self.clip_coefficient,
            norm_direction=total,
            norm_displacement=self.lr * total,
            num_parameters=sum(t.numel() for t in self.direction.values()),
            num_sequences=len(self.update),
            num_prompts=self.update.num_prompts,
            num_tokens=int(self.update.num_policy_tokens.sum()),
            components=step_components(self),
            initial_lr=None,
            stored_dtypes=(),
            doubt="",
            rounding=None,
            storage=None,
            routing=None,
            gradient=None,
            lifetime=None,
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row per component."""
        return self.report().to_pandas()

    def _viewed(self) -> Parts:
        return Parts("Optimizer step", {"step": self.report()})

    def metric(self) -> dict[str, Tensor]:
        """P, for what cannot do without.

        Raises:
            MeasurementError: the optimizer has none.
        """
        if self.preconditioner is None:
            raise MeasurementError(
                "this optimizer makes no elementwise product of its gradient, so it has no preconditioner; "
                "take influence through=optimizer, or re-made steps (measure --validate)"
            )
        return self.preconditioner


def reconstruct_step(
    policy: Policy,
    update: Rollouts,
    *,
    reference: Policy | None = None,
    influences: tuple[Sequence[FloatArray], Sequence[FloatArray]] | None = None,
    program: Program | None = None,
    off_policy: bool = False,
    budget: Budget = Budget(),
) -> Step:
    """Rebuild the step that a checkpoint would take on an update batch: one forward and one backward.

    Args:
        policy: with its optimizer's state; its settings give the loss and the clipping.
        update: sequences with advantages.
        reference: the policy of the KL penalty, needed when ``settings.beta`` is not zero and the policy
            is no PEFT adapter (an adapter's reference is the model without it, or under TRL's adapter
            ``ref``).
        influences: what the rule ``influence`` looks at, from ``measure.influence.token_influence``.
        program: what the rule ``frontier`` looks at, from ``measure.frontier.effects.before_step``.
        off_policy: the batch was sampled by another policy, whose log-probs it carries; they enter the ratio.
        budget: what may be used at a time.

    Raises:
        CheckpointError: no optimizer state, or one that does not fit the parameters.
        BatchError: no reward variance, or a batch that this policy did not sample.
        MeasurementError: a KL penalty without a reference, or the objectives ``influence`` and
            ``frontier`` without theirs.

    Exact up to round-off; pinned against ``torch.optim.AdamW.step()`` in ``tests/measure/test_step.py``.
    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), ``torch/optim/adam.py``.
    """
    _optimizer(policy)
    logprobs, entropies = score_rollouts(policy, update, budget=budget) if off_policy else (None, None)
    chosen = policy.settings.objective
    weights = token_weights(
        update,
        policy.settings,
        logprobs=logprobs,
        entropies=entropies,
        seen=Seen(
            discriminators=score_discriminators(policy, update, budget=budget)
            if chosen is not None and chosen.needs_discriminators
            else None,
            influences=influences,
            program=program,
            texts=response_text(policy).facts(update.response_token_ids)
            if chosen is not None and chosen.needs_texts and policy.tokenizer is not None
            else None,
        ),
        step=policy.step,
        ref_logprobs=reference_logprobs(policy, update, reference, budget)
        if needs_reference(policy.settings)
        else None,
        divergences=token_divergences(policy, update, reference, budget)
        if sums_over_vocabulary(policy.settings)
        else None,
    )
    for i, row in enumerate(weights):
        if not np.isfinite(row).all():
            raise MeasurementError(
                f"update batch: the token weight of sequence {i} ({update.prompt_ids[i]}), response token "
                f"{int(np.flatnonzero(~np.isfinite(row))[0])} is not finite; check the loss settings"
            )
    terms = term_gradients(policy, update, reference=reference, budget=budget)
    drift = _Drift(update)
    weighted = weighted_logprobs(weights)

    def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        drift.add(outputs, batch)
        return weighted(outputs, batch)

    ascent = gradient(policy, update, objective, budget=budget)
    if not off_policy:
        drift.check()
    return assemble_step(policy, update, weights, ascent, terms)


def ascent_of_sequences(policy: Policy, step: Step, budget: Budget = Budget()) -> dict[str, Tensor]:
    """sum_ik w_ik grad l_ik: the step's own ascent, or a pass where other terms are in that.

    Args:
        policy: where the step starts.
        step: the step.
        budget: what may be used at a time.
    """
    if TERMS.keys().isdisjoint(step.components):
        return step.ascent
    return gradient(policy, step.update, weighted_logprobs(step.token_weights), budget=budget)


def assemble_step(
    policy: Policy,
    update: Rollouts,
    weights: Sequence[FloatArray],
    ascent: dict[str, Tensor],
    terms: Mapping[str, dict[str, Tensor]],
) -> Step:
    """The step that the optimizer makes of a gradient: clipping, moments and preconditioner as it has them.

    Args:
        policy: with its optimizer's state.
        update: the batch the gradient is of.
        weights: its token weights w_ik, one (tok,) array per sequence.
        ascent: sum_ik w_ik grad l_ik, that is -grad Loss but for the terms that belong to no sequence.
        terms: -grad of those, by name, as :func:`term_gradients` gives them.

    Raises:
        CheckpointError: no optimizer state, or one that does not fit the parameters.
        MeasurementError: the gradient or the step is not finite.
    """
    state = _optimizer(policy)
    whole = vectors.add(ascent, *terms.values())
    norm = vectors.norm(whole)
    _refuse_broken("gradient", whole)
    limit = policy.settings.max_grad_norm
    clip = min(1.0, limit / (norm + CLIP_EPSILON)) if limit > 0 else 1.0
    lr = next((g.lr for g in state.groups if g.names and g.lr > 0), 0.0)
    made = state.update(policy.parameters, whole, clip=clip, lr=lr)
    gradients = {"sequences": ascent, **terms}
    if made.preconditioner is None:
        own = _added(policy, state, gradients, made, clip=clip, lr=lr)
    else:
        own = {name: made.made_of(part) for name, part in gradients.items()}
    step = Step(
        components=made.parts | own,
        preconditioner=made.preconditioner,
        ascent=whole,
        token_weights=tuple(weights),
        lr=lr,
        grad_norm=norm,
        clip_coefficient=clip,
        update=update,
    )
    _refuse_broken("direction of the step", step.direction)
    return step


def _added(
    policy: Policy,
    state: OptimizerState,
    gradients: Mapping[str, dict[str, Tensor]],
    whole: Update,
    *,
    clip: float,
    lr: float,
) -> dict[str, dict[str, Tensor]]:
    """What each gradient adds to the step that those before it make; the clip coefficient is the whole's."""
    *earlier, last = gradients
    found: dict[str, dict[str, Tensor]] = {}
    before = vectors.zeros_like(whole.made_of(gradients[last]))
    partial: dict[str, Tensor] | None = None
    for name in earlier:
        partial = gradients[name] if partial is None else vectors.add(partial, gradients[name])
        after = state.update(policy.parameters, partial, clip=clip, lr=lr).made_of(partial)
        found[name] = vectors.add(after, vectors.scale(before, -1.0))
        before = after
    found[last] = vectors.add(whole.made_of(gradients[last]), vectors.scale(before, -1.0))
    return found


def _refuse_broken(what: str, vector: dict[str, Tensor]) -> None:
    if problem := first_not_finite(vector.items()):
        raise MeasurementError(
            f"the {what} is not finite: {problem}; measure with --precision float64, or an earlier checkpoint"
        )


def sequence_direction(policy: Policy, step: Step, index: int) -> dict[str, Tensor]:
    """What sequence ``index`` of the update batch contributes to the direction: P sum_k w_ik grad l_ik.

    The clip coefficient and the second moment are those of the whole batch, so the contributions of all
    sequences add up to the component ``sequences``.

    Raises:
        MeasurementError: the optimizer's step is not linear in its gradient.
    """
    own = weighted_logprobs([step.token_weights[index]])
    ascent = gradient(policy, step.update.select([index]), own)
    return vectors.multiply(step.metric(), {n: ascent[n] for n in step.metric()})


def weighted_logprobs(weights: Sequence[FloatArray]) -> WeightedLogprobs:
    """The objective sum_k w_ik l_ik, (seq, tok): its gradient is -grad Loss.

    Args:
        weights: one (tok,) array per sequence of the batch it will be used on.
    """
    return WeightedLogprobs(weights)


def step_components(step: Step) -> dict[str, Component]:
    """Size and direction of every component of a step."""
    total = vectors.norm(step.direction)
    return {
        name: Component(
            norm=vectors.norm(part),
            share=vectors.dot(part, step.direction) / total**2,
            cosine=vectors.cosine(part, step.direction),
        )
        for name, part in step.components.items()
    }


class _Drift:
    """How far the policy's log-probs are from those the batch carries."""

    def __init__(self, update: Rollouts) -> None:
        self.update = update
        self.total = np.zeros(len(update))
        self.count = np.zeros(len(update))

    def add(self, outputs: TokenOutputs, batch: TokenBatch) -> None:
        """Take in one micro-batch, anew where it is run again."""
        now = outputs.logprobs.detach().double().cpu()
        written = batch.response_mask.cpu()
        apart = (now - batch.pad(self.update.logprobs, now)).abs().mul(written).sum(1)
        rows = batch.seq_index.cpu()
        self.total[rows] = apart
        self.count[rows] = written.sum(1)

    def check(self) -> None:
        """Refuse a batch of another policy."""
        current().sum_(map(torch.from_numpy, (self.total, self.count)))
        mean = float(self.total.sum() / self.count.sum())
        if not mean <= DRIFT_LIMIT:
            raise BatchError(
                f"update batch: its log-probs differ from this policy's by {mean:.3g} nats per token on "
                f"average, expected less than {DRIFT_LIMIT}; sample it from this checkpoint, or pass "
                "off_policy=True"
            )


def _optimizer(policy: Policy) -> OptimizerState:
    state = policy.optimizer
    where = policy.path or "this policy"
    if state is None:
        raise CheckpointError(
            f"{where}: no optimizer state, and a step cannot be rebuilt without it; load a checkpoint "
            "that has optimizer.pt"
        )
    known, own = set(state.names), set(policy.parameters)
    if known != own:
        odd = sorted(known ^ own)[0]
        raise CheckpointError(
            f"{where}: {odd} is "
            f"{'in the optimizer state only' if odd in known else 'without optimizer state'}; the "
            "trainable parameters must be those the optimizer has, reload the checkpoint"
        )
    return state

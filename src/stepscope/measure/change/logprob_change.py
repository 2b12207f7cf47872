"""How a step moves the log-probs of given texts, and which sequences of its batch move them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stepscope.errors import MeasurementError
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.policy.gradients.derivatives import response_logprob
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.products import per_sequence_dots
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts


@dataclass(frozen=True)
class LogprobChange:
    """First-order change of texts' log-probs under a step, per unit of lr.

    Attributes:
        total: (text,) dS/dlr along the whole direction.
        components: (text,) part of each component of the step but the sequences, by name.
        sequences: (text, update seq) part of each sequence of the update batch.
    """

    total: FloatArray
    components: dict[str, FloatArray]
    sequences: FloatArray


def predict_logprobs(
    policy: Policy,
    step: Step,
    texts: Rollouts,
    *,
    budget: Budget = Budget(),
) -> LogprobChange:
    """How the step moves the log-prob S = sum_k l_k of any given responses, and which sequences move it.

    dS/dlr = grad S . direction; the part of sequence i is grad S . P sum_k w_ik grad l_ik, the kernel between
    the text and the weighted sequence.

    Args:
        policy: where the step starts.
        step: the step.
        texts: prompts and responses, as a batch; only their token ids matter.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the parts do not add up to the total, or the optimizer has no preconditioner.
    """
    others = {name: vector for name, vector in step.components.items() if name != "sequences"}
    stacked = {n: torch.stack([d[n] for d in (step.direction, *others.values())]) for n in step.direction}
    of_texts = SequenceGradients(texts, response_logprob, as_trained=False)
    total, *rest = per_sequence_dots(policy, of_texts, stacked, budget=budget)
    parts = gram(
        policy,
        SequenceGradients(step.update, weighted_logprobs(step.token_weights)),
        preconditioner=step.metric(),
        other=of_texts,
        budget=budget,
    ).numpy()
    whole = parts.sum(1) + np.sum(rest, 0)
    scale = np.abs(parts).sum(1) + np.abs(rest).sum(0)
    miss = float((np.abs(whole - total) / np.maximum(scale, 1e-300)).max())
    if not miss <= 1e-2:
        raise MeasurementError(
            f"the parts of the predicted log-prob change differ from the total by {miss:.1e}; "
            "measure with --precision float64"
        )
    return LogprobChange(total, dict(zip(others, rest, strict=True)), parts)

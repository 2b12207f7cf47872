"""A recorded step against a model: the gradient that its weights give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepscope.policy import vectors
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.recorded import RecordedStep, RecordedTraining
from stepscope.policy.state import Policy


def errors_of_gradients(training: RecordedTraining, model: torch.nn.Module, tokenizer: Any) -> list[float]:
    """|g - g'| / |g| of every step: g as recorded, g' from its weights at its parameters."""
    policy = Policy(model.eval(), tokenizer, StepSettings())
    found = []
    for step in training:
        made = made_gradient(policy, step)
        apart = {n: g + step.clip_coefficient * made[n] for n, g in step.gradient.items()}
        found.append(vectors.norm(apart) / vectors.norm(step.gradient))
    return found


def made_gradient(policy: Policy, step: RecordedStep) -> dict[str, Tensor]:
    """sum_ik w_ik grad l_ik + sum_ik e_ik grad H_ik at the parameters before the step."""

    def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        found = batch.pad(step.token_weights, outputs.logprobs) * outputs.logprobs
        if step.entropy_weights is not None:
            found = found + batch.pad(step.entropy_weights, outputs.entropies) * outputs.entropies
        return found

    with vectors.placed(policy.parameters, step.before.parameters):
        return gradient(policy, step.rollouts, objective)


def contents(record: Path) -> dict[str, bytes]:
    """The bytes of every file of a record."""
    return {str(p.relative_to(record)): p.read_bytes() for p in record.rglob("*") if p.is_file()}

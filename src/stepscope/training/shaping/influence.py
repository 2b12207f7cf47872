"""Influences measured inside a training, before the step, for the objective that acts on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepscope.measure.influence.objective import token_influences
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.token_objectives import TokenTable
from stepscope.policy.rollouts import response_text
from stepscope.policy.state import Policy
from stepscope.results import FloatArray
from stepscope.tasks import Task
from stepscope.training.probe.batch import Captured, as_rollouts
from stepscope.training.probe.state import adamw_of, optimizer_state, undisturbed


class InfluenceMeter:
    """Adds to the tokens of a step what each would do to entropy and reward, were the loss left as it is.

    With several processes every one measures the whole batch, on the same probe batch.

    Args:
        settings: of the run, with the objective ``influence``.
        task: where probe prompts and rewards come from.
        tokenizer: of the policy.
    """

    def __init__(self, settings: StepSettings, task: Task, tokenizer: Any) -> None:
        self.settings = settings
        self.task = task
        self.tokenizer = tokenizer

    def __call__(
        self,
        model: nn.Module,
        optimizer: Any,
        accelerator: Accelerator,
        micro_batches: Sequence[Mapping[str, Any]],
        table: TokenTable,
        *,
        step: int,
    ) -> TokenTable:
        """The table with influences; all zero where no advantage is.

        Args:
            model: the policy, without wrappers.
            optimizer: AdamW, before the step.
            accelerator: gathers from all processes.
            micro_batches: TRL's inputs of the step on this process.
            table: the tokens of all processes.
            step: optimizer steps taken so far.
        """
        names = ("prompt_ids", "prompt_mask", "completion_ids")
        ids = {
            n: accelerator.gather(
                accelerator.pad_across_processes(torch.cat([m[n] for m in micro_batches]), dim=1)
            )
            for n in names
        }
        entropy, reward = (torch.zeros_like(table.logprobs) for _ in range(2))
        kept = [i for i in range(len(table.mask)) if bool(table.mask[i].any())]
        if any(bool(table.advantages[i].any()) for i in kept):
            captured: list[Captured] = [
                (
                    tuple(ids["prompt_ids"][i][ids["prompt_mask"][i].bool()].tolist()),
                    tuple(ids["completion_ids"][i][: table.mask.shape[1]][table.mask[i]].tolist()),
                    _row(table.old_logprobs, table.mask, i),
                    _row(table.entropies, table.mask, i),
                    _row(table.advantages, table.mask, i),
                )
                for i in kept
            ]
            update, own = as_rollouts(
                captured,
                self.tokenizer,
                response_text(Policy(model, self.tokenizer, self.settings)),
                temperature=self.settings.temperature,
                max_response_tokens=self.settings.max_response_tokens,
            )
            update = replace(update, advantages=np.array([values[0] for values in own]))
            now = [_row(table.logprobs, table.mask, i) for i in kept]
            with undisturbed(model):
                state = optimizer_state(adamw_of(optimizer), model, after_backward=False)
                policy = Policy(model, self.tokenizer, self.settings, optimizer=state, step=step)
                found = token_influences(policy, update, self.task, logprobs=now, max_sequences=32)
            for into, values in zip((entropy, reward), found, strict=True):
                for i, row in zip(kept, values, strict=True):
                    into[i, table.mask[i]] = torch.from_numpy(row).to(into)
        return replace(table, entropy_influence=entropy, reward_influence=reward)


def _row(values: Tensor, mask: Tensor, i: int) -> FloatArray:
    return np.asarray(values[i][mask[i]].double().cpu().numpy(), dtype=np.float64)

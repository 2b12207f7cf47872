"""Influences measured inside a training, before the step, for the objective that acts on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from stepscope.measure.frontier.effects import before_step
from stepscope.measure.influence.token_influence import token_influences
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import response_text, sample_influence_probe
from stepscope.policy.state import Policy
from stepscope.rules import FrontierWeights, Tokens
from stepscope.rules.program import no_program
from stepscope.tasks import Task
from stepscope.training.watching.capture import SeenSequence, as_rollouts
from stepscope.training.watching.state import optimizer_state, optimizer_within, undisturbed


class InfluenceMeter:
    """Adds to the tokens of a step what they would do to entropy and reward, were the loss left as it is.

    Each token for the objective ``influence``, the sequences together for ``frontier``.

    With several processes every one measures the whole batch, on the same probe batch.

    Args:
        settings: of the run, with one of these objectives.
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
        tokens: Tokens,
        *,
        step: int,
    ) -> Tokens:
        """The table with influences; without effect where no advantage is.

        Args:
            model: the policy, without wrappers.
            optimizer: the training's, before the step.
            accelerator: gathers from all processes.
            micro_batches: TRL's inputs of the step on this process.
            tokens: of all processes.
            step: optimizer steps taken so far.
        """
        prompts = _gathered_ids(accelerator, micro_batches, "prompt")
        responses = _gathered_ids(accelerator, micro_batches, "completion")
        kept, counts = np.unique(tokens.sequence, return_counts=True)
        together = isinstance(self.settings.objective, FrontierWeights)
        if not tokens.advantages[kept].any():
            nothing = np.zeros(len(tokens))
            if together:
                return replace(tokens, program=no_program(len(tokens.advantages)))
            return replace(tokens, entropy_influence=nothing, reward_influence=nothing)
        cuts = np.cumsum(counts)[:-1]
        old, now, entropies = (
            np.split(values, cuts) for values in (tokens.old_logprob, tokens.logprob, tokens.entropy)
        )
        update = as_rollouts(
            [
                SeenSequence(
                    prompt_ids=prompts[i], response_ids=responses[i], logprobs=logprobs, entropies=entropy
                )
                for i, logprobs, entropy in zip(kept, old, entropies, strict=True)
            ],
            self.tokenizer,
            response_text(Policy(model, self.tokenizer, self.settings)),
            temperature=self.settings.temperature,
            max_response_tokens=self.settings.max_response_tokens,
        )
        update = replace(update, advantages=tokens.advantages[kept])
        with undisturbed(model):
            state = optimizer_state(optimizer_within(optimizer), model, after_backward=False)
            policy = Policy(model, self.tokenizer, self.settings, optimizer=state, step=step)
            probe = sample_influence_probe(policy, self.task)
            assert probe is not None, "a meter belongs to a rule that measures"
            budget = Budget(max_sequences=32)
            if together:
                program = before_step(policy, update, probe, logprobs=now, budget=budget)
                units = np.full(len(tokens.advantages), -1)
                units[kept] = program.units
                return replace(tokens, program=replace(program, units=units))
            found = token_influences(policy, update, probe, logprobs=now, budget=budget)
        on_entropy, on_reward = (np.concatenate(rows) for rows in found)
        return replace(tokens, entropy_influence=on_entropy, reward_influence=on_reward)


def _gathered_ids(
    accelerator: Accelerator, micro_batches: Sequence[Mapping[str, Any]], part: str
) -> list[tuple[int, ...]]:
    """Ids without padding of the prompts (completions) of all processes."""
    ids, mask = (
        accelerator.gather(
            accelerator.pad_across_processes(torch.cat([m[f"{part}_{kind}"] for m in micro_batches]), dim=1)
        )
        for kind in ("ids", "mask")
    )
    return [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]

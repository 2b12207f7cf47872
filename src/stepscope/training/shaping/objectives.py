"""Objectives inside TRL: the advantages per token that its loss is given, and what its arguments say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepscope.config import EntropyBonusConfig, RlConfig
from stepscope.policy.forward import TokenBatch, TokenOutputs, forward
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.token_objectives import (
    ENTROPY_BONUS,
    INFLUENCE,
    OBJECTIVES,
    TokenTable,
    token_advantages,
)
from stepscope.tasks import Task
from stepscope.training.shaping.influence import InfluenceMeter


def objective_record(rl: RlConfig) -> dict[str, Any] | None:
    """The objective as a checkpoint records it, with the sequences its statistics are over; None for none."""
    chosen = rl.objective
    if chosen is None:
        return None
    if isinstance(chosen, EntropyBonusConfig):
        whole = rl.micro_batch_size == rl.prompts_per_step * rl.group_size
        return {
            "name": ENTROPY_BONUS,
            "coefficient": chosen.coefficient,
            "micro_batch_size": None if whole else rl.micro_batch_size,
        }
    record = chosen.model_dump()
    in_micro_batch = record.pop("scope", "batch") == "micro_batch"
    return {**record, "micro_batch_size": rl.micro_batch_size if in_micro_batch else None}


def bonus_arguments(rl: RlConfig) -> dict[str, Any]:
    """TRL's arguments of the entropy bonus; empty where there is none."""
    bonus = rl.objective
    if not isinstance(bonus, EntropyBonusConfig):
        return {}
    adaptive = {
        "use_adaptive_entropy": True,
        "entropy_target": bonus.target,
        "entropy_coef_delta": bonus.delta,
        "entropy_coef_min": 0.0,
        "entropy_coef_max": bonus.max_coefficient,
    }
    return {"entropy_coef": bonus.coefficient, **(adaptive if bonus.target is not None else {})}


class AdvantageShaper:
    """Makes advantages per token before every optimizer step, from the policy as it is then.

    All tokens of the step, over all micro-batches and processes, are scored in one pass without gradients, so
    that means, quantiles and maxima are those of the whole step unless the objective wants micro-batches. The
    log-probs of the first update on a batch are those of the policy that sampled it.

    Args:
        settings: their objective is one of :data:`OBJECTIVES`.
        meter: measures influences for the objective that looks at them.
    """

    def __init__(self, settings: StepSettings, meter: InfluenceMeter | None = None) -> None:
        self.settings = settings
        self.meter = meter
        self._old: Tensor | None = None

    def __call__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        micro_batches: Sequence[Mapping[str, Any]],
        *,
        optimizer: Any,
        first_update: bool,
        step: int,
    ) -> tuple[list[Tensor], float]:
        """Advantages of one optimizer step.

        Args:
            model: the policy.
            optimizer: about to take the step.
            accelerator: gathers from all processes.
            micro_batches: TRL's inputs of the step, in their order.
            first_update: the batch was just sampled.
            step: optimizer steps taken so far.

        Returns:
            (seq, tok) advantages of each micro-batch, and the share of tokens whose advantage was changed.
        """
        objective = self.settings.objective or {}
        outputs = [self._score(model, inputs, objective) for inputs in micro_batches]
        now = torch.cat([o.logprobs for o in outputs]).double()
        if first_update or self._old is None:
            self._old = now
        mask = torch.cat([inputs["completion_mask"] for inputs in micro_batches]).long()
        own = torch.cat([inputs["advantages"] for inputs in micro_batches])
        found = {
            "logprobs": now,
            "old_logprobs": self._old,
            "entropies": torch.cat([o.entropies for o in outputs]).double(),
            "advantages": own.double()[:, None].expand_as(now).contiguous(),
            "mask": mask,
        }
        if outputs[0].discriminators is not None:
            found["discriminators"] = torch.cat([d for o in outputs if (d := o.discriminators) is not None])
        everything = {
            name: accelerator.gather(accelerator.pad_across_processes(values, dim=1))
            for name, values in found.items()
        }
        everything["mask"] = everything["mask"].bool()
        table = TokenTable(
            **everything, epsilon_low=self.settings.epsilon_low, epsilon_high=self.settings.epsilon_high
        )
        if self.meter is not None:
            table = self.meter(model, optimizer, accelerator, micro_batches, table, step=step)
        made = token_advantages(objective, table, seed=self.settings.seed, step=step)
        changed = (made != table.advantages)[table.mask].double().mean()
        start = accelerator.process_index * len(now)
        rows = made[start : start + len(now), : now.shape[1]].to(own.dtype)
        return list(torch.split(rows, [len(inputs["advantages"]) for inputs in micro_batches])), float(
            changed
        )

    def _score(
        self, model: nn.Module, inputs: Mapping[str, Any], objective: Mapping[str, Any]
    ) -> TokenOutputs:
        """What the policy says about the completions of one micro-batch of TRL."""
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        batch = TokenBatch(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            response_ids=inputs["completion_ids"],
            response_mask=inputs["completion_mask"].bool(),
            seq_index=torch.arange(len(attention)),
        )
        with torch.no_grad():
            return forward(
                model,
                batch,
                temperature=self.settings.temperature,
                keep_squares=objective.get("form") == "vocabulary",
            )


def shaper_for(settings: StepSettings, task: Task, tokenizer: Any) -> AdvantageShaper | None:
    """What makes the advantages of these settings; None where the loss takes them as they are."""
    objective = settings.objective
    if objective is None or objective["name"] not in OBJECTIVES:
        return None
    measured = objective["name"] == INFLUENCE
    return AdvantageShaper(settings, InfluenceMeter(settings, task, tokenizer) if measured else None)

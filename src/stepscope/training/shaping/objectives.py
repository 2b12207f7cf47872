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
from stepscope.policy.texts import ResponseText
from stepscope.results.tables import TextArray
from stepscope.rules import EntropyBonus, Intervention, ScopedIntervention, Tokens, token_advantages
from stepscope.tasks import Task
from stepscope.training.shaping.influence import InfluenceMeter


def next_objective(rl: RlConfig) -> Intervention | None:
    """The objective of a step, with the sequences its statistics are over; None for none."""
    chosen = rl.objective
    if isinstance(chosen, EntropyBonusConfig):
        whole = rl.micro_batch_size == rl.prompts_per_step * rl.group_size
        return EntropyBonus(coefficient=chosen.coefficient, scope="batch" if whole else rl.micro_batch_size)
    return chosen.over(rl.micro_batch_size) if isinstance(chosen, ScopedIntervention) else chosen


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
        settings: of the run.
        objective: makes the advantages.
        meter: measures influences for the objective that looks at them.
        texts: tells what the tokens of responses say, for the objective that looks at it.
    """

    def __init__(
        self,
        settings: StepSettings,
        objective: Intervention,
        meter: InfluenceMeter | None = None,
        texts: ResponseText | None = None,
    ) -> None:
        self.settings = settings
        self.objective = objective
        self.meter = meter
        self.texts = texts
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
        outputs = [self._score(model, inputs) for inputs in micro_batches]
        now = torch.cat([o.logprobs for o in outputs]).double()
        if first_update or self._old is None:
            self._old = now
        own = torch.cat([inputs["advantages"] for inputs in micro_batches])
        found = {
            "mask": torch.cat([inputs["completion_mask"] for inputs in micro_batches]).long(),
            "logprob": now,
            "old_logprob": self._old,
            "entropy": torch.cat([o.entropies for o in outputs]),
        }
        if self.texts is not None:
            found["token_id"] = torch.cat([inputs["completion_ids"] for inputs in micro_batches])
        if outputs[0].discriminators is not None:
            found["discriminator"] = torch.cat([d for o in outputs if (d := o.discriminators) is not None])
        padded = {
            name: accelerator.gather(accelerator.pad_across_processes(values, dim=1))
            for name, values in found.items()
        }
        mask = padded.pop("mask").bool()
        ids = padded.pop("token_id", None)
        sequence, position = torch.nonzero(mask).cpu().numpy().T
        said: dict[str, TextArray] = {}
        if self.texts is not None and ids is not None:
            responses = [row[own].tolist() for row, own in zip(ids.cpu(), mask.cpu(), strict=True)]
            said = self.texts.facts(responses)
        tokens = Tokens(
            sequence=sequence,
            position=position,
            token=said.get("token"),
            kind=said.get("kind"),
            advantages=accelerator.gather(own).double().cpu().numpy(),
            epsilon_low=self.settings.epsilon_low,
            epsilon_high=self.settings.epsilon_high,
            **{name: values[mask].double().cpu().numpy() for name, values in padded.items()},
        )
        if self.meter is not None:
            tokens = self.meter(model, optimizer, accelerator, micro_batches, tokens, step=step)
        made = token_advantages(self.objective, tokens, seed=self.settings.seed, step=step)
        shaped = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        shaped[mask] = torch.from_numpy(made).to(mask.device)
        start = accelerator.process_index * len(now)
        rows = shaped[start : start + len(now), : now.shape[1]].to(own.dtype)
        pieces = torch.split(rows, [len(inputs["advantages"]) for inputs in micro_batches])
        return list(pieces), float((made != tokens.advantage).mean())

    def _score(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenOutputs:
        """What the policy says about the completions of one micro-batch of TRL."""
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        batch = TokenBatch(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            response_ids=inputs["completion_ids"],
            response_mask=inputs["completion_mask"].bool(),
            present=inputs["completion_mask"].bool(),
            seq_index=torch.arange(len(attention)),
        )
        with torch.no_grad():
            return forward(
                model,
                batch,
                temperature=self.settings.temperature,
                keep_squares=self.objective.needs_discriminators,
            )


def shaper_for(
    settings: StepSettings, task: Task, tokenizer: Any, ends: Sequence[int]
) -> AdvantageShaper | None:
    """What makes the advantages of these settings; None where the loss takes them as they are.

    Args:
        settings: of the run.
        task: asks and scores.
        tokenizer: of the policy.
        ends: ids of the tokens that end a response.
    """
    objective = settings.objective
    if objective is None or not objective.shapes_advantages:
        return None
    return AdvantageShaper(
        settings,
        objective,
        InfluenceMeter(settings, task, tokenizer) if objective.measures else None,
        ResponseText(tokenizer, ends) if objective.needs_texts else None,
    )

"""The settings of a run that decide what its next step is; stored beside a checkpoint as ``stepscope.json``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSettings:
    """Everything beside weights and optimizer state that a step depends on.

    Attributes:
        loss_type: TRL's name of the loss: ``grpo``, ``dr_grpo``, ``bnpo``, ``dapo``.
        scale_rewards: how advantages are scaled: ``none``, ``group`` or ``batch`` standard deviation.
        group_size: responses per prompt.
        prompts_per_step: prompt groups per optimizer step.
        temperature: sampling temperature.
        max_response_tokens: L, the longest response; also Dr. GRPO's divisor.
        max_prompt_tokens: longest prompt kept, or None.
        max_grad_norm: gradient clipping threshold; 0 switches clipping off.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio.
        beta: weight of the KL penalty (k3) to the reference policy.
        top_p: nucleus of the sampling; 1 is the policy itself.
        task: specification of the task, for example ``arithmetic``; empty if unknown.
        prompt_template: name of the template or a template text with ``{question}``; empty means the default.
        seed: the run's seed.
    """

    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    group_size: int = 8
    prompts_per_step: int = 16
    temperature: float = 1.0
    max_response_tokens: int = 64
    max_prompt_tokens: int | None = None
    max_grad_norm: float = 1.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    top_p: float = 1.0
    task: str = ""
    prompt_template: str = ""
    seed: int = 0

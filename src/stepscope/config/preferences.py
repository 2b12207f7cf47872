"""Configuration of learning from preferences: DPO, and HyPO with a KL divergence on the policy's samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stepscope.config.base import Section
from stepscope.config.optimizer import OptimizerConfig


class HypoConfig(Section):
    """Preferences: DPO's loss on pairs, plus the reverse KL divergence to the start on fresh samples.

    Attributes:
        pairs: file of pairs, ``.jsonl`` or ``.parquet`` with ``prompt``, ``chosen``, ``rejected``; null for
            right against wrong responses of the starting policy.
        pair_prompts: prompts of the training split that are asked for such pairs.
        pair_samples: responses sampled to each.
        pairs_per_prompt: most pairs that are made of a prompt.
        beta: weight of the log-ratios to the start, in DPO's loss.
        kl_weight: lambda, weight of the reverse KL divergence (nats per response); 0 for DPO, which samples
            nothing.
        kl_estimator: of its gradient: ``leave_one_out`` by the log-ratios of the tokens that were drawn,
            ``rao_blackwell`` with sums over the vocabulary.
        kl_group_size: responses sampled to each prompt.
        kl_prompts: prompts of these: those of the step's ``pairs``, or as many of the ``task``'s training
            split.
        max_response_tokens: longest response, sampled or in a pair.
        max_prompt_tokens: longest prompt that is asked, or null for no limit; longer ones of the task are
            left out, of a file refused.
        pairs_per_step: pairs per optimizer step, each with a prompt that is sampled.
        steps: optimizer steps.
        save_every: steps between two checkpoints.
        micro_batch_size: pairs per forward and backward pass, with their share of the samples.
        gradient_checkpointing: trade time for memory in the backward pass.
        optimizer: AdamW and its schedule.
        report_to: where curves go: any name TRL knows.
    """

    pairs: str | None = None
    pair_prompts: int = Field(default=256, ge=1)
    pair_samples: int = Field(default=8, ge=2)
    pairs_per_prompt: int = Field(default=2, ge=1)
    beta: float = Field(default=0.1, gt=0)
    kl_weight: float = Field(default=0.1, ge=0)
    kl_estimator: Literal["leave_one_out", "rao_blackwell"] = "leave_one_out"
    kl_group_size: int = Field(default=2, ge=2)
    kl_prompts: Literal["pairs", "task"] = "pairs"
    max_response_tokens: int = Field(default=64, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    pairs_per_step: int = Field(default=32, ge=1)
    steps: int = Field(default=40, ge=1)
    save_every: int = Field(default=10, ge=1)
    micro_batch_size: int = Field(default=32, ge=1)
    gradient_checkpointing: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])

    @model_validator(mode="after")
    def _batches_fit(self) -> HypoConfig:
        if self.pairs_per_step % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide the {self.pairs_per_step} "
                f"pairs of a "
                "step; give a divisor"
            )
        return self

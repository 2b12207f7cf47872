"""AdamW and its schedule, in every section that trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stepscope.config.base import Section


class OptimizerConfig(Section):
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        scheduler: schedule after the warm-up.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        max_grad_norm: clipping threshold of the gradient norm; 0 switches clipping off.
    """

    lr: float = Field(default=1e-5, gt=0)
    scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)

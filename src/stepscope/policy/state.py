"""What a checkpoint is once loaded: model, tokenizer, optimizer state by name, and settings of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.rounding import rounding_doubt
from stepscope.results import Brief


@dataclass(frozen=True, repr=False)
class Policy(Brief):
    """A policy pi(.|s) = softmax(z(s)/T) with everything one optimizer step needs.

    Attributes:
        model: the causal language model, in evaluation mode (no dropout).
        tokenizer: its tokenizer, or None for a bare model (enumeration, tests).
        settings: loss, temperature and lengths of the run it came from.
        optimizer: None where the checkpoint has no optimizer state.
        path: where it was loaded from; None for a model built in code.
        step: optimizer steps taken so far.
        stored_dtypes: floating-point types of the trained weights in the checkpoint's files; empty for a
            model built in code.
    """

    model: nn.Module
    tokenizer: Any
    settings: StepSettings
    optimizer: OptimizerState | None = None
    path: Path | None = None
    step: int = 0
    stored_dtypes: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their ``named_parameters()`` name; tied weights appear once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def rounding_doubt(self) -> str:
        """Why params + lr * direction may not be where the training goes, as far as its files tell."""
        return rounding_doubt(self.stored_dtypes, self.optimizer.moment_types if self.optimizer else None)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the trainable parameters."""
        return next(iter(self.parameters.values())).dtype

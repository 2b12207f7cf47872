"""What a checkpoint is once loaded: model, tokenizer, AdamW state by name, and the settings of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.stored import HALF_TYPES, type_name
from stepscope.results import Brief


@dataclass(frozen=True)
class ParameterGroup:
    """Hyperparameters that AdamW (or SGD) applies to the named parameters of one group.

    ``lr`` is the learning rate of the *next* step, as the scheduler left it in the checkpoint; ``foreach``
    and ``fused`` choose torch's implementation, which matters where parameters are in a half type.
    """

    names: tuple[str, ...]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    foreach: bool | None = None
    fused: bool | None = None


@dataclass(frozen=True, repr=False)
class OptimizerState(Brief):
    """AdamW's state, matched to parameters by name.

    Attributes:
        groups: parameter groups in the optimizer's order.
        exp_avg: m, first moment, per parameter.
        exp_avg_sq: v, second moment, per parameter.
        steps: number of steps taken so far, per parameter (t - 1 for the step to come).
        max_exp_avg_sq: running maximum of v, present for AMSGrad only.
        moment_types: type of the moments in the file, per parameter, where torch's AdamW made them: the type
            of the parameter in the training.
    """

    groups: tuple[ParameterGroup, ...]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    steps: Mapping[str, int]
    max_exp_avg_sq: Mapping[str, Tensor] = field(default_factory=dict)
    moment_types: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def half_types(self) -> tuple[str, ...]:
        """Names of the half types in which the training kept parameters; empty where it kept none so."""
        return tuple(sorted({type_name(t) for t in self.moment_types.values()} & set(HALF_TYPES)))


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
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the trainable parameters."""
        return next(iter(self.parameters.values())).dtype

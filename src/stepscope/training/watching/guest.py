"""How a callback lives inside somebody else's trainer: it finds it, and never ends it."""

from __future__ import annotations

import inspect
import math
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback

from stepscope.errors import ConfigError, MeasurementError, StepscopeError
from stepscope.measure.step.reconstruct import CLIP_EPSILON
from stepscope.policy.loss.settings import StepSettings
from stepscope.results import FloatArray
from stepscope.training.watching.state import optimizer_within


class Watcher(Protocol):
    """A callback that can be off while the training goes on."""

    def give_up(self, error: Exception, step: int) -> None:
        """Be off from the step after ``step`` on, and say so."""


class Guest:
    """What goes wrong inside the block ends the watcher and not the training it is a guest of.

    Model, tokenizer, data and reward functions are somebody else's, so that it may be any exception.

    Args:
        watcher: the callback.
        state: the trainer's.
    """

    def __init__(self, watcher: Watcher, state: Any) -> None:
        self.watcher, self.step = watcher, int(state.global_step)

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Give up on an exception; interrupts pass."""
        if not isinstance(error, Exception):
            return False
        self.watcher.give_up(error, self.step)
        return True


def reason_of(error: BaseException, name: str) -> str:
    """Why a watcher is off, in a line; with the place where the error is nobody's message to a user.

    Args:
        error: what was raised.
        name: of the watcher's class, which messages of its own begin with.
    """
    place = ""
    if not isinstance(error, StepscopeError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: "
    return place + " ".join(str(error).split()).removeprefix(f"{name}: ")


def warn_off(who: str, step: int, reason: str) -> None:
    """Say once that a watcher does nothing from the step after ``step`` on."""
    warnings.warn(
        f"{who}: off from step {step + 1} on, and the training goes on without it: {reason}", stacklevel=4
    )


def require_readable(args: Any, model: Any, optimizer: Any, *, parts: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a run whose steps can be read, without wrappers.

    Args:
        args: of the trainer.
        model: that is trained.
        optimizer: of the trainer.
        parts: whether both may be cut by FSDP2.

    Raises:
        ConfigError: the trainer is none of TRL's that sample, or scales its gradients.
        MeasurementError: model or optimizer are sharded, or the optimizer's steps cannot be rebuilt.
    """
    if not hasattr(args, "max_completion_length"):
        raise ConfigError(
            f"the trainer has {type(args).__name__}, expected TRL's GRPOConfig; a probe needs a policy that "
            "samples responses"
        )
    if args.fp16:
        raise ConfigError("fp16 scales the gradients; train in bf16 or float32")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise MeasurementError(
            f"the model is sharded by FSDP's first version; use {'FSDP2 or ' * parts}plain data parallelism"
        )
    return optimizer_within(optimizer, parts=parts)


def trainer_of(callback: TrainerCallback) -> Any:
    """The trainer that is calling ``callback``.

    transformers tells a callback the model and the data loaders but neither data sets nor reward functions,
    so the trainer is looked up among the callers.

    Raises:
        ConfigError: no trainer is.
    """
    for frame in _callers():
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(c is callback for c in found.callback_handler.callbacks):
            return found
    name = type(callback).__name__
    raise ConfigError(f"{name}: no trainer calls it; use it as GRPOTrainer(..., callbacks=[{name}()])")


def settings_of(args: Any) -> StepSettings:
    """What a batch needs of the run's settings; its gradient is clipped already."""
    return StepSettings(
        group_size=args.num_generations,
        temperature=args.temperature,
        max_response_tokens=args.max_completion_length,
        max_grad_norm=0.0,
    )


def clipping_of(trainer: Any) -> tuple[float, float]:
    """Norm of the gradient before the trainer clipped it, and the coefficient c that clipping made of it.

    The trainer shows the norm to nobody before the step is over, so it is read where it stands: in the
    variable ``grad_norm`` of the trainer's loop, which is the caller of a callback's ``on_*optimizer_step``.

    Raises:
        MeasurementError: no caller has such a variable.
    """
    for frame in _callers():
        owner, norm = (frame.f_locals.get(name) for name in ("self", "grad_norm"))
        if owner is trainer and owner is not None and isinstance(norm, float | Tensor):
            limit, found = float(owner.args.max_grad_norm or 0.0), float(norm)
            clip = min(1.0, limit / (found + CLIP_EPSILON)) if limit > 0 and math.isfinite(found) else 1.0
            return found, clip
    raise MeasurementError(
        "the trainer's loop has no variable grad_norm, so that what clipping did cannot be seen; use the "
        "version of transformers in constraints.txt"
    )


def weighted_rewards(trainer: Any, rewards: Tensor) -> FloatArray:
    """(seq,) weighted sums of what the trainer's reward functions gave, as TRL takes them; nan where all are.

    Args:
        trainer: of TRL.
        rewards: (seq, function).
    """
    weighted = rewards * trainer.reward_weights.to(rewards.device)
    sums = torch.where(rewards.isnan().all(1), torch.nan, weighted.nansum(1))
    return np.asarray(sums.double().cpu().numpy(), dtype=np.float64)


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back

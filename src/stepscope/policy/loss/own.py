"""A user's own loss: a function of a module of theirs, imported when they name it, never when a file does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.own_code import own_function, own_source
from stepscope.policy.loss.base import Loss, LossParameters
from stepscope.policy.loss.batch import LossBatch
from stepscope.policy.loss.registry import LOSSES
from stepscope.policy.loss.verl import PREFIX

SIGNATURE = "(logprobs, old_logprobs, advantages, mask, settings, ref_logprobs)"
"""What the function is called with: (seq, tok) tensors in float64, the settings, and a tensor or None."""


class AnyParameters(LossParameters):
    """Whatever the user's function reads from ``settings.loss_parameters``."""

    model_config = ConfigDict(extra="allow")


def names_own_loss(name: str) -> bool:
    """Whether a name is that of a function, ``module:function``."""
    return ":" in name and not name.startswith(PREFIX)


def use_own_loss(name: str) -> None:
    """Import the function of a name and make it a loss that settings can name.

    Args:
        name: ``module:function``, given by the user; a module beside the working directory will do.

    Raises:
        ConfigError: there is no such module or function.
    """
    function = own_function(name, "loss_type")
    LOSSES[name] = Loss(name, _checked(name, function), AnyParameters, aggregation="")


def own_loss_source(name: str) -> dict[str, str] | None:
    """Where a user's loss came from, for the provenance: its name, file and SHA-256; None for others."""
    return own_source(name) if names_own_loss(name) and name in LOSSES else None


def _checked(name: str, function: Callable[..., Any]) -> Callable[[LossBatch, Any], Tensor]:
    """The function, with what it returns checked."""

    def loss(batch: LossBatch, own: LossParameters) -> Tensor:
        found = function(
            batch.logprobs,
            batch.old_logprobs.clone(),
            batch.advantages.clone(),
            batch.mask.clone(),
            batch.settings,
            None if batch.ref_logprobs is None else batch.ref_logprobs.clone(),
        )
        if not isinstance(found, Tensor) or found.dim() != 0:
            shape = (
                f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.60}"
            )
            raise MeasurementError(f"loss {name}: it returned {shape}, expected a scalar tensor; sum it up")
        if not found.requires_grad:
            raise MeasurementError(
                f"loss {name}: its value does not depend on the log-probs in a way that can be "
                "differentiated; compute it from logprobs with torch, without detach() or numpy"
            )
        if not torch.isfinite(found):
            raise MeasurementError(
                f"loss {name}: its value is {float(found.detach())}; mind tokens outside the mask, whose "
                "log-probs are 0"
            )
        (slope,) = torch.autograd.grad(found, batch.logprobs, retain_graph=True, allow_unused=True)
        if slope is None or not slope.any():
            raise MeasurementError(
                f"loss {name}: its derivative by every log-prob is 0 on this batch, so it makes no step; "
                "mend the function"
            )
        if not torch.isfinite(slope).all() or bool((slope * ~batch.mask).any()):
            raise MeasurementError(
                f"loss {name}: its derivative is not finite, or not 0 outside the mask; use "
                "torch.where(mask, ..., 0) before it sums"
            )
        return found

    return loss

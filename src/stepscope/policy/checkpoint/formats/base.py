"""What a checkpoint format does: say what it has in a folder, and read it.

A format is a subclass of :class:`Format` in a file of its own, and an entry in
:data:`stepscope.policy.checkpoint.formats.registry.FORMATS`. A checkpoint may be of two formats: weights as
Hugging Face keeps them beside an optimizer state that some sharding library wrote.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.base import OptimizerState

Part = Literal["weights", "optimizer", "settings"]
"""What a format may have of a checkpoint."""

PARTS: tuple[Part, ...] = ("weights", "optimizer", "settings")
"""All of them."""

Matching = Callable[[nn.Module, torch.dtype | None], OptimizerState]
"""Gives a state that was read the names of a model's parameters, its tensors at a type or as they are."""


@dataclass(frozen=True)
class Contents:
    """What a format has found in a folder, for people.

    Attributes:
        parts: where each part that is there comes from, and of which types its tensors are, such as
            ``weights: pytorch_model_fsdp.bin (float32)``.
        processes: number of those that wrote it; None where the files do not tell.
        missing: what is not there and what cannot be done without it, a clause each.
    """

    parts: tuple[str, ...] = ()
    processes: int | None = None
    missing: tuple[str, ...] = ()


class Format(ABC):
    """One way to lay a checkpoint out; what it does not have of a folder is never asked of it."""

    name: str
    """What people call it."""
    tensors: tuple[str, ...] = ()
    """Patterns of the files with weights and moments; a manifest's digests of them are verified."""
    configs: tuple[str, ...] = ()
    """Patterns of further files that belong to what the checkpoint is."""

    def holds(self, folder: Path) -> frozenset[Part]:
        """What a folder has in this format; nothing where it is not of this format at all."""
        return frozenset()

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        """Model and tokenizer, in evaluation mode.

        Raises:
            CheckpointError: something is missing, damaged, or not to be read.
        """
        raise self.lacking(folder, "weights")

    def optimizer(self, folder: Path) -> Matching:
        """Read the optimizer's state; which parameters it is of is found once there is a model.

        Raises:
            CheckpointError: it is missing, damaged, of another optimizer, or not to be read.
        """
        raise self.lacking(folder, "optimizer state")

    def settings(self, folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
        """The settings of the loss, some of them changed.

        Raises:
            CheckpointError: one is known from nowhere, or no measurement can follow the run.
        """
        raise self.lacking(folder, "loss settings")

    def steps(self, folder: Path) -> int | None:
        """Optimizer steps taken; None where nothing but the optimizer's state may tell.

        Raises:
            CheckpointError: the file that tells is damaged.
        """
        return None

    def contents(self, folder: Path) -> Contents:
        """What there is of the checkpoint and what is missing, as far as it is told without reading tensors.

        Raises:
            CheckpointError: a file that tells is damaged.
        """
        return Contents(tuple(sorted(self.holds(folder))))

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Names of the floating-point types of the stored weights, as far as they are told by headers.

        Raises:
            CheckpointError: a header is damaged.
        """
        return ()

    def lacking(self, folder: Path, what: str) -> CheckpointError:
        """Why a part of a checkpoint is not read here."""
        return CheckpointError(f"{folder}: a checkpoint of {self.name} has no {what} that can be read")

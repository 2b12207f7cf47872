"""Checkpoints of DeepSpeed (ZeRO 1, 2, 3) as Hugging Face's Trainer and OpenRLHF write them.

The Trainer puts ``global_stepN`` and ``latest`` beside the files that it always writes; OpenRLHF has them in
a folder ``_actor``, without the model's config and tokenizer. The masters in float32 are the parameters that
the optimizer moves: the weights in ``model.safetensors`` and in ``*_model_states.pt`` are rounded copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.policy.checkpoint.formats.base import PARTS, Contents, Format, Matching, Part
from stepscope.policy.checkpoint.formats.deepspeed_files import LATEST, STATES, step_folder
from stepscope.policy.checkpoint.formats.deepspeed_state import Shards
from stepscope.policy.checkpoint.formats.frame import (
    beside,
    settings_in_frame,
    trainer_steps,
    weights_in_frame,
)
from stepscope.policy.checkpoint.optimizer_state import match_optimizer, state_by_name
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import type_name
from stepscope.policy.optim.base import OptimizerState


class DeepSpeed(Format):
    """Flat masters and moments of every rank, put together again under names."""

    name = "DeepSpeed (ZeRO)"
    tensors = (f"*/{STATES}", STATES)
    configs = (LATEST,)

    def holds(self, folder: Path) -> frozenset[Part]:
        """All of a checkpoint where the files of a step are."""
        return frozenset(PARTS if step_folder(folder) else ())

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        """The model, or the adapter on its base, with the masters as its weights."""
        return weights_in_frame(folder, Shards.of(folder).weights(), dtype=dtype, device=device)

    def optimizer(self, folder: Path) -> Matching:
        """The moments by name."""
        shards = Shards.of(folder)
        saved, where = shards.optimizer(), str(shards.where)
        found = state_by_name if shards.optimizers else match_optimizer

        def match(model: nn.Module, dtype: torch.dtype | None) -> OptimizerState:
            return found(saved, model, where=where, dtype=dtype)

        return match

    def settings(self, folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
        """The run's, with DeepSpeed's own clipping, which is the one that acts."""
        clip = Shards.of(folder).clip
        known = {} if clip is None else {"max_grad_norm": clip}
        return settings_in_frame(folder, known | dict(overrides or {}), for_step=for_step)

    def steps(self, folder: Path) -> int | None:
        """The Trainer's where it kept them, or else DeepSpeed's."""
        told = trainer_steps(folder)
        return Shards.of(folder).steps if told is None else told

    def contents(self, folder: Path) -> Contents:
        """ZeRO's stage, where masters and moments are, and what is missing beside them."""
        shards = Shards.of(folder)
        kinds = "/".join(self.stored_types(folder))
        kept = "masters" if shards.optimizers else "weights"
        parts, missing = beside(folder)
        parts.insert(0, f"weights: {kept} in {shards.where.name} ({kinds})")
        parts.append(f"optimizer state: ZeRO stage {shards.stage}")
        return Contents(tuple(parts), shards.processes, tuple(missing))

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Of the masters, or of the weights where there are none."""
        return tuple(sorted({type_name(kind) for kind in Shards.of(folder).types}))

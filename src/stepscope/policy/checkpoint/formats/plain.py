"""The layout of Hugging Face's Trainer and TRL: a full model or a PEFT adapter, beside ``optimizer.pt``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from stepscope.policy.checkpoint.formats.base import Contents, Format, Matching, Part
from stepscope.policy.checkpoint.formats.frame import MODEL_CONFIG, beside, trainer_steps, writers
from stepscope.policy.checkpoint.models import load_model, stored_types
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE, match_optimizer, read_optimizer
from stepscope.policy.checkpoint.settings.run_settings import run_settings
from stepscope.policy.checkpoint.settings.training_args import TRAINING_ARGS_FILE, base_revision
from stepscope.policy.loss.settings import SETTINGS_FILE, StepSettings
from stepscope.policy.optim.base import OptimizerState


class Plain(Format):
    """Weights as safetensors, state as ``torch.save`` wrote it, settings as stepscope or TRL left them."""

    name = "Hugging Face's Trainer or TRL"
    tensors = ("*.safetensors", OPTIMIZER_FILE)
    configs = (MODEL_CONFIG, ADAPTER_CONFIG)

    def holds(self, folder: Path) -> frozenset[Part]:
        """Settings where there is a config of a model or an adapter; weights and state where files are."""
        found: set[Part] = set()
        if any((folder / config).is_file() for config in self.configs):
            found.add("settings")
            if any(True for _ in folder.glob("*.safetensors")):
                found.add("weights")
            if (folder / OPTIMIZER_FILE).is_file():
                found.add("optimizer")
        return frozenset(found)

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        """The model, or the adapter on its base, of the revision that TRL was told to load."""
        if not (folder / ADAPTER_CONFIG).is_file():
            return load_model(folder, dtype=dtype, device=device)
        told = folder / TRAINING_ARGS_FILE
        revision = None if (folder / SETTINGS_FILE).is_file() else base_revision(told)
        return load_adapter(folder, dtype=dtype, device=device, revision=revision)

    def optimizer(self, folder: Path) -> Matching:
        """The state in ``optimizer.pt``, whose running numbers are matched to names."""
        file = folder / OPTIMIZER_FILE
        saved = read_optimizer(file)

        def match(model: nn.Module, dtype: torch.dtype | None) -> OptimizerState:
            return match_optimizer(saved, model, where=str(file), dtype=dtype)

        return match

    def settings(self, folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
        """Those of ``stepscope.json``, or else of TRL's arguments."""
        return run_settings(folder, overrides, for_step=for_step)

    def steps(self, folder: Path) -> int | None:
        """According to ``trainer_state.json``; None where there is no such file."""
        return trainer_steps(folder)

    def contents(self, folder: Path) -> Contents:
        """The files of weights, state, steps and settings."""
        parts, missing = beside(folder)
        if "weights" in self.holds(folder):
            weights = ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).is_file() else "*.safetensors"
            parts.insert(0, f"weights: {weights} ({'/'.join(stored_types(folder))})")
        if "optimizer" in self.holds(folder):
            parts.append(f"optimizer state: {OPTIMIZER_FILE}")
        return Contents(tuple(parts), writers(folder), tuple(missing))

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Of the safetensors files."""
        return stored_types(folder)

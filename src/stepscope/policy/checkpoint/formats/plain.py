"""The layout of Hugging Face's Trainer and TRL: a full model or a PEFT adapter, beside ``optimizer.pt``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from stepscope.policy.checkpoint.formats.base import Contents, Format, Matching, Part
from stepscope.policy.checkpoint.models import brief, load_model, stored_types
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE, match_optimizer, read_optimizer
from stepscope.policy.checkpoint.settings.run_settings import run_settings
from stepscope.policy.checkpoint.settings.training_args import TRAINING_ARGS_FILE, base_revision
from stepscope.policy.loss.settings import SETTINGS_FILE, StepSettings
from stepscope.policy.numerics.finiteness import MOST_STEPS, whole_number
from stepscope.policy.optim.base import OptimizerState

MODEL_CONFIG = "config.json"

TRAINER_STATE = "trainer_state.json"
"""Where the Trainer keeps the number of steps."""


_BESIDE = (
    ((OPTIMIZER_FILE,), "optimizer state", "no step can be rebuilt"),
    ((TRAINER_STATE,), "steps", "the number of steps is that of the optimizer's state"),
    ((SETTINGS_FILE, TRAINING_ARGS_FILE), "settings", "the loss has to be given (loss.KEY=VALUE)"),
)
"""What stands beside weights, and what is not known without it."""


class Plain(Format):
    """Weights as safetensors, state as ``torch.save`` wrote it, settings as stepscope or TRL left them."""

    name = "Hugging Face's Trainer or TRL"
    tensors = ("*.safetensors", OPTIMIZER_FILE)
    configs = (MODEL_CONFIG, ADAPTER_CONFIG)

    def holds(self, folder: Path) -> frozenset[Part]:
        """Weights and settings where there is a model's or an adapter's config, a state where its file is."""
        found: set[Part] = set()
        if any((folder / config).is_file() for config in self.configs):
            found |= {"weights", "settings"}
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
        path = folder / TRAINER_STATE
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({brief(error)}); copy it again") from error
        step = whole_number(value, "global_step", str(path))
        if not 0 <= step <= MOST_STEPS:
            raise CheckpointError(f"{path}: global_step is {step}, expected 0 or more; copy it again")
        return step

    def contents(self, folder: Path) -> Contents:
        """The files of weights, state, steps and settings."""
        kinds = "/".join(stored_types(folder)) or "no tensors"
        weights = ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).is_file() else "*.safetensors"
        parts, missing = [f"weights: {weights} ({kinds})"], []
        for file, what, without in _BESIDE:
            names = [name for name in file if (folder / name).is_file()]
            if names:
                parts.append(f"{what}: {names[0]}")
            else:
                missing.append(f"no {' or '.join(file)}: {without}")
        return Contents(tuple(parts), missing=tuple(missing))

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Of the safetensors files."""
        return stored_types(folder)

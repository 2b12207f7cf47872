"""What stands beside weights that a sharding library wrote: config, tokenizer, settings, number of steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG, load_adapter
from stepscope.policy.checkpoint.formats.base import Format
from stepscope.policy.checkpoint.models import TOKENIZER_FILES, brief, load_tokenizer, load_weights
from stepscope.policy.checkpoint.settings.run_settings import run_settings
from stepscope.policy.checkpoint.settings.training_args import TRAINING_ARGS_FILE, base_revision
from stepscope.policy.checkpoint.tensors import Stored
from stepscope.policy.checkpoint.trainer_log import TRAINER_STATE
from stepscope.policy.loss.settings import SETTINGS_FILE, StepSettings
from stepscope.policy.numerics.finiteness import MOST_STEPS, whole_number

MODEL_CONFIG = "config.json"

TOKENIZER_FOLDER = "tokenizer"
"""Where NeMo-RL keeps the tokenizer, beside its shards."""


def frame_of(folder: Path) -> Path | None:
    """Where the config of a checkpoint's model or adapter is: in it, or in the folder of its run."""
    configs = (MODEL_CONFIG, ADAPTER_CONFIG)
    return next((p for p in (folder, folder.parent) if any((p / c).is_file() for c in configs)), None)


def weights_in_frame(
    folder: Path, tensors: Mapping[str, Stored], *, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a checkpoint whose weights are given, by the config beside them.

    Raises:
        CheckpointError: there is no config, or what it describes and the weights do not fit each other.
    """
    frame = frame_of(folder)
    if frame is None:
        raise CheckpointError(
            f"{folder}: there are weights and neither {MODEL_CONFIG} nor {ADAPTER_CONFIG} to say of which "
            "model; copy the run's (or its starting model's) config and tokenizer files there"
        )
    if (frame / ADAPTER_CONFIG).is_file():
        told = frame / TRAINING_ARGS_FILE
        revision = None if (frame / SETTINGS_FILE).is_file() else base_revision(told)
        return load_adapter(frame, dtype=dtype, device=device, revision=revision, tensors=tensors)
    model = load_weights(frame, dtype=dtype, device=device, tensors=tensors)
    own = any(any(frame.glob(pattern)) for pattern in TOKENIZER_FILES)
    inner = folder / TOKENIZER_FOLDER
    return model, load_tokenizer(inner if inner.is_dir() and not own else frame)


def settings_in_frame(folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
    """The settings in the folder, or else in that of its run.

    Raises:
        CheckpointError: as :func:`~stepscope.policy.checkpoint.settings.run_settings.run_settings`.
    """
    files = (SETTINGS_FILE, TRAINING_ARGS_FILE)
    told = next((p for p in (folder, folder.parent) if any((p / f).is_file() for f in files)), folder)
    return run_settings(told, overrides, for_step=for_step)


def trainer_steps(folder: Path) -> int | None:
    """Steps taken according to ``trainer_state.json``; None where there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
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


class Framed(Format):
    """A format of shards whose settings and number of steps stand beside them as the Trainer leaves them."""

    def settings(self, folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
        """Those beside it."""
        return settings_in_frame(folder, overrides, for_step=for_step)

    def steps(self, folder: Path) -> int | None:
        """According to ``trainer_state.json``."""
        return trainer_steps(folder)


def beside(folder: Path) -> tuple[list[str], list[str]]:
    """Of config, steps and settings, what there is and what is missing, in words."""
    parts, missing = [], []
    for what, files, without in _BESIDE:
        found = next((p for p in (folder, folder.parent) for f in files if (p / f).is_file()), None)
        if found is None:
            missing.append(f"{' or '.join(files)} ({without})")
        else:
            name = next(f for f in files if (found / f).is_file())
            parts.append(f"{what}: {name if found == folder else f'../{name}'}")
    return parts, missing


_BESIDE = (
    ("config", (ADAPTER_CONFIG, MODEL_CONFIG), "of which model the weights are"),
    ("settings", (SETTINGS_FILE, TRAINING_ARGS_FILE), "what the loss was; or give loss.KEY=VALUE"),
)


def writers(folder: Path) -> int | None:
    """Number of processes by the files in which each leaves the state of its random numbers, if it does."""
    return len(list(folder.glob("rng_state_*.pth"))) or None

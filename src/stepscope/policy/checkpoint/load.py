"""Loading a checkpoint of the Hugging Face Trainer or TRL as a policy that can be measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import is_adapted
from stepscope.policy.checkpoint.first_pass import made_up_sequences
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.formats.registry import (
    checkpoint_folder,
    files_of,
    format_of,
    format_of_state,
)
from stepscope.policy.checkpoint.manifest import MANIFEST, altered
from stepscope.policy.checkpoint.models import load_model, usable_device
from stepscope.policy.checkpoint.schedule import at_scheduled_rates
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.state import Policy

__all__ = ["checkpoint_digest", "load_checkpoint", "load_model", "read_settings"]

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
"""Precisions a checkpoint can be loaded at."""


@reads_foreign
def load_checkpoint(
    path: str | Path,
    *,
    precision: str = "float32",
    device: torch.device | str | None = None,
    settings: StepSettings | None = None,
    require_optimizer: bool = True,
    keep_source: bool = False,
) -> Policy:
    """Load model, tokenizer, the optimizer's state by name and the settings of the loss.

    The folder is of a known format (:data:`~stepscope.policy.checkpoint.formats.registry.FORMATS`), such as a
    full model or a PEFT adapter saved by ``transformers.Trainer`` or a TRL trainer. The trainable parameters
    are those the optimizer has state for. The model is in evaluation mode.

    Args:
        path: checkpoint folder.
        precision: ``float32``, ``float64`` (true float64, see :mod:`stepscope.policy.numerics.precision`) or
            ``bfloat16``; the optimizer's moments are kept at float32 or better.
        device: where it goes; None for a GPU where there is one.
        settings: of the loss; None for those of the checkpoint (:func:`read_settings`).
        require_optimizer: False leaves the optimizer's state alone, there or not, for evaluation.
        keep_source: hold on to the optimizer's state as its file has it, to write it anew.

    Raises:
        ConfigError: the device is not there.
        CheckpointError: something is missing, damaged, or of another model. A missing optimizer state is
            never replaced by a fresh one.
    """
    device = usable_device(device)
    folder = checkpoint_folder(Path(path).expanduser())
    if precision not in PRECISIONS:
        raise CheckpointError(
            f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}; use one of these"
        )
    refuse_altered(folder)
    dtype = PRECISIONS[precision]
    settings = read_settings(folder) if settings is None else settings
    match = format_of_state(folder).optimizer(folder) if require_optimizer else None
    stored = format_of(folder, "weights")
    step = stored.steps(folder)
    model, tokenizer = stored.weights(folder, dtype=dtype, device=device)
    optimizer: OptimizerState | None = None
    if match is not None:
        optimizer = match(model, torch.float64 if dtype == torch.float64 else None)
        optimizer = at_scheduled_rates(optimizer, folder)
        optimizer = optimizer if keep_source else replace(optimizer, source=None)
        own = set(optimizer.names)
        _refuse_half_tied(model, own, folder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in own)
        step = max(optimizer.steps.values(), default=0) if step is None else step
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        optimizer=optimizer,
        path=folder,
        step=0 if step is None else step,
        stored_dtypes=stored.stored_types(folder),
    )
    made_up_sequences(policy)  # a first pass: a config can describe what loads and does not run
    return policy


def _refuse_half_tied(model: nn.Module, trained: Set[str], folder: Path) -> None:
    """Refuse embeddings that were one in training, as config and optimizer have it, and are two in the files.

    transformers unties what differs, so that one of them would stand still.
    """
    whole: Any = model
    if is_adapted(model) or not getattr(whole.config.get_text_config(), "tie_word_embeddings", False):
        return
    ends = [getattr(e, "weight", None) for e in (whole.get_input_embeddings(), whole.get_output_embeddings())]
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {own[id(weight)] for weight in ends if id(weight) in own}
    if len(names & trained) == 1 < len(names):
        raise CheckpointError(
            f"{folder}: {' and '.join(sorted(names))} differ in the files, and are one weight by "
            "tie_word_embeddings and by the optimizer's state; copy the weights again, or set "
            "tie_word_embeddings to false if the training had two and left one of them as it was"
        )


def refuse_altered(folder: Path) -> None:
    """Refuse weights and moments that are not what this project's training wrote.

    Raises:
        CheckpointError: naming the file.
    """
    if fault := altered(folder, *files_of(folder, tensors_only=True)):
        raise CheckpointError(
            f"{folder}: {fault}, says {MANIFEST}; copy the checkpoint again, or delete {MANIFEST} if the "
            "change was made on purpose"
        )


@reads_foreign
def read_settings(
    path: str | Path, *, overrides: Mapping[str, Any] | None = None, for_step: bool = True
) -> StepSettings:
    """The loss settings of a checkpoint, some of them changed; to sample, less must be known than for a step.

    Raises:
        CheckpointError: a setting is known from nowhere, or no measurement can follow the run.
    """
    folder = checkpoint_folder(Path(path).expanduser())
    return format_of(folder, "settings").settings(folder, overrides, for_step=for_step)


def checkpoint_digest(path: str | Path) -> str:
    """SHA-256 over names and contents of a checkpoint's weights, optimizer state and configs, or of a file.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    target = Path(path).expanduser()
    folder = target.parent if target.is_file() else checkpoint_folder(target)
    patterns = [target.name] if target.is_file() else files_of(folder)
    digest = hashlib.sha256()
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

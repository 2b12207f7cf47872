"""Loading a checkpoint of the Hugging Face Trainer or TRL as a policy that can be measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG, load_adapter
from stepscope.policy.checkpoint.devices import usable_device
from stepscope.policy.checkpoint.examination import Finding, examine, made_up_sequences
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.layouts import layout_of
from stepscope.policy.checkpoint.manifest import MANIFEST, altered
from stepscope.policy.checkpoint.models import brief, load_model, stored_types
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE, match_optimizer, read_optimizer
from stepscope.policy.checkpoint.run_settings import run_settings
from stepscope.policy.checkpoint.training_args import TRAINING_ARGS_FILE, base_revision
from stepscope.policy.loss.settings import SETTINGS_FILE, UNKNOWN, StepSettings
from stepscope.policy.numerics.finiteness import MOST_STEPS, whole_number
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.state import Policy

__all__ = [
    "Finding",
    "checkpoint_digest",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_model",
    "read_settings",
]

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
"""Precisions a checkpoint can be loaded at."""

_DIGESTED = ("*.safetensors", OPTIMIZER_FILE, "config.json", ADAPTER_CONFIG)


@reads_foreign
def load_checkpoint(
    path: str | Path,
    *,
    precision: str = "float32",
    device: torch.device | str | None = None,
    settings: StepSettings | None = None,
    require_optimizer: bool = True,
) -> Policy:
    """Load model, tokenizer, AdamW's state by name and the settings of the loss.

    The folder holds a full model or a PEFT adapter as saved by ``transformers.Trainer`` or a TRL trainer. The
    trainable parameters are those the optimizer has state for. The model is in evaluation mode.

    Args:
        path: checkpoint folder.
        precision: ``float32``, ``float64`` (true float64, see :mod:`stepscope.policy.numerics.precision`) or
            ``bfloat16``; the optimizer's moments are kept at float32 or better.
        device: where it goes; None for a GPU where there is one.
        settings: of the loss; None for those of the checkpoint (:func:`read_settings`).
        require_optimizer: False leaves the optimizer's state alone, there or not, for evaluation.

    Raises:
        ConfigError: the device is not there.
        CheckpointError: something is missing, damaged, or of another model. A missing optimizer state is
        never
            replaced by a fresh one.
    """
    device = usable_device(device)
    folder = _folder(Path(path).expanduser())
    if precision not in PRECISIONS:
        raise CheckpointError(
            f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}; use one of these"
        )
    if fault := altered(folder, "*.safetensors", OPTIMIZER_FILE):
        raise CheckpointError(
            f"{folder}: {fault}, says {MANIFEST}; copy the checkpoint again, or delete {MANIFEST} if the "
            "change was made on purpose"
        )
    dtype = PRECISIONS[precision]
    settings = read_settings(folder) if settings is None else settings
    file = folder / OPTIMIZER_FILE
    saved = read_optimizer(file) if require_optimizer else None
    step = _global_step(folder / "trainer_state.json")
    if (folder / ADAPTER_CONFIG).is_file():
        told = folder / TRAINING_ARGS_FILE
        revision = None if (folder / SETTINGS_FILE).is_file() else base_revision(told)
        model, tokenizer = load_adapter(folder, dtype=dtype, device=device, revision=revision)
    else:
        model, tokenizer = load_model(folder, dtype=dtype, device=device)
    optimizer: OptimizerState | None = None
    if saved is not None:
        optimizer = match_optimizer(
            saved, model, where=str(file), dtype=torch.float64 if dtype == torch.float64 else None
        )
        own = set(optimizer.names)
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
        stored_dtypes=stored_types(folder),
    )
    made_up_sequences(policy)  # a first pass: a config can describe what loads and does not run
    return policy


@reads_foreign
def read_settings(
    path: str | Path, *, overrides: Mapping[str, Any] | None = None, for_step: bool = True
) -> StepSettings:
    """The loss settings of a checkpoint, some of them changed; see ``policy.checkpoint.run_settings``."""
    return run_settings(_folder(Path(path).expanduser()), overrides, for_step=for_step)


def checkpoint_digest(path: str | Path) -> str:
    """SHA-256 over names and contents of the weight, optimizer and model config files of a checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    target = Path(path).expanduser()
    if target.is_file():
        files = [target]
    else:
        files = sorted({f for pattern in _DIGESTED for f in _folder(target).glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def inspect_checkpoint(
    path: str | Path, *, precision: str = "float32", overrides: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Is this checkpoint fit to be measured? What is missing, and what to do about it.

    Loads it without demanding anything but a model, then examines weights, optimizer state, settings, loss,
    dropout, precision, tied weights, determinism, and invariance to batch size and padding.

    Args:
        path: checkpoint folder.
        precision: to load it at.
        overrides: settings that are changed, see :func:`read_settings`.
    """
    found, policy = inspect_loaded(path, precision=precision, overrides=overrides)
    return found if policy is None else found + examine(policy)


def inspect_loaded(
    path: str | Path,
    *,
    precision: str = "float32",
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[list[Finding], Policy | None]:
    """What stands against loading a checkpoint, and the policy with as much of it as there is."""
    try:
        folder = _folder(Path(path).expanduser())
    except CheckpointError as error:
        return [Finding.from_error(error)], None
    findings: list[Finding] = []
    settings = UNKNOWN
    try:
        settings = read_settings(folder, overrides=overrides)
    except CheckpointError as error:
        findings.append(Finding.from_error(error))
    for require_optimizer in (True, False):
        try:
            policy = load_checkpoint(
                folder,
                precision=precision,
                device=device,
                settings=settings,
                require_optimizer=require_optimizer,
            )
        except CheckpointError as error:
            found = Finding.from_error(error)
            if found not in findings:
                findings.append(found)
        else:
            return findings, policy
    return findings, None


def _folder(path: Path) -> Path:
    """The checkpoint folder itself, or an error that says what is there instead."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; check the path")
    if (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file():
        return path
    inside = [
        p for pattern in ("checkpoints/step-*", "checkpoint-*") for p in path.glob(pattern) if p.is_dir()
    ]
    if inside:
        latest = max(inside, key=lambda p: (p.stat().st_mtime, p.name))
        raise CheckpointError(
            f"{path}: a run with {len(inside)} checkpoints, expected one checkpoint; point at one, such "
            f"as {latest}"
        )
    if (layout := layout_of(path)) is not None:
        raise CheckpointError(f"{path}: {layout}")
    raise CheckpointError(
        f"{path}: neither config.json nor {ADAPTER_CONFIG} is there, so it is no checkpoint of a model; "
        "point at a folder saved by the Hugging Face Trainer or TRL"
    )


def _global_step(path: Path) -> int | None:
    """Optimizer steps according to ``trainer_state.json``; None where there is no such file."""
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

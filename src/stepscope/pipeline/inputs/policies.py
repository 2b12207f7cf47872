"""Policies: which checkpoints a path stands for, and how one is loaded with the settings of its run."""

from __future__ import annotations

from pathlib import Path

from stepscope.config import LossConfig
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.load import load_checkpoint, load_model, read_settings
from stepscope.policy.state import Policy


def checkpoints_in(source: Path) -> list[Path]:
    """The checkpoint folders that ``source`` stands for, in order of step.

    A checkpoint stands for itself; a run folder for ``checkpoints/step-N``; a Trainer's output folder for its
    ``checkpoint-N``.

    Raises:
        CheckpointError: there is none.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give a checkpoint or a run folder")
    found = [
        path
        for pattern in ("checkpoints/step-*", "checkpoint-*", "step-*")
        for path in source.glob(pattern)
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    if found:
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))
    if any((source / name).exists() for name in ("config.json", "adapter_config.json")):
        return [source]
    raise CheckpointError(
        f"{source}: neither a checkpoint (config.json or adapter_config.json) nor a run folder with "
        "checkpoints/step-N or checkpoint-N; is the path right?"
    )


def open_policy(
    checkpoint: Path,
    *,
    precision: str,
    device: str | None,
    loss: LossConfig,
    require_optimizer: bool = True,
) -> Policy:
    """Load a checkpoint with its own loss settings, changed where the configuration says so.

    Without a need for the optimizer's state there is none for what only a step depends on.
    """
    settings = read_settings(checkpoint, overrides=loss.given(), for_step=require_optimizer)
    return load_checkpoint(
        checkpoint, precision=precision, device=device, settings=settings, require_optimizer=require_optimizer
    )


def open_reference(model: str | None, policy: Policy) -> Policy | None:
    """The policy that KL divergences are taken to, where one is named.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if model is None:
        return None
    loaded, tokenizer = load_model(model, dtype=policy.dtype, device=policy.device)
    return Policy(loaded, tokenizer, policy.settings)

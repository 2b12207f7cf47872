"""Policies: which checkpoints a path stands for, and how one is loaded with the settings of its run."""

from __future__ import annotations

from pathlib import Path

import torch

from stepscope.config import LossConfig
from stepscope.console import say
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.load import load_checkpoint, load_model, read_settings
from stepscope.policy.checkpoint.models import usable_device
from stepscope.policy.distribution import bytes_held, dealt_out
from stepscope.policy.group import current
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

    In a group in lockstep each process gets its part of it. Without a need for the optimizer's state there is
    none for what only a step depends on.
    """

    def loaded(device: str | None) -> Policy:
        settings = read_settings(checkpoint, overrides=loss.given(), for_step=require_optimizer)
        return load_checkpoint(
            checkpoint,
            precision=precision,
            device=device,
            settings=settings,
            require_optimizer=require_optimizer,
        )

    if not current().lockstep:
        return loaded(device)
    policy = dealt_out(lambda: loaded("cpu"), current(), usable_device(device))
    most = current().most(bytes_held(policy)) / 2**20
    say(f"sharded over {current().size} processes: at most {most:,.1f} MiB of parameters and moments on each")
    return policy


def open_reference(model: str | None, policy: Policy) -> Policy | None:
    """The policy that KL divergences are taken to, where one is named.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if model is None:
        return None

    def loaded(device: torch.device) -> Policy:
        weights, tokenizer = load_model(model, dtype=policy.dtype, device=device)
        return Policy(weights, tokenizer, policy.settings)

    if not current().lockstep:
        return loaded(policy.device)
    return dealt_out(lambda: loaded(torch.device("cpu")), current(), policy.device)

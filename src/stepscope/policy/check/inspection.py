"""What stands against loading a checkpoint, and all that is found about it once it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.check.examination import examine
from stepscope.policy.check.findings import Finding
from stepscope.policy.checkpoint.formats.base import Contents
from stepscope.policy.checkpoint.formats.registry import checkpoint_folder, formats_in
from stepscope.policy.checkpoint.load import load_checkpoint, read_settings
from stepscope.policy.loss.settings import UNKNOWN
from stepscope.policy.state import Policy


def inspect_checkpoint(
    path: str | Path, *, precision: str = "float32", overrides: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Is this checkpoint fit to be measured? What is missing, and what to do about it.

    Loads it without demanding anything but a model, then examines weights, optimizer state, settings, loss,
    dropout, precision, tied weights, determinism, and invariance to batch size and padding.

    Args:
        path: checkpoint folder.
        precision: to load it at.
        overrides: settings that are changed, by name.
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
        folder = checkpoint_folder(Path(path).expanduser())
    except CheckpointError as error:
        return [Finding.from_error(error)], None
    findings = _layouts(folder)
    settings = UNKNOWN
    try:
        settings = read_settings(folder, overrides=overrides)
    except CheckpointError as error:
        if (found := Finding.from_error(error)) not in findings:
            findings.append(found)
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


def _layouts(folder: Path) -> list[Finding]:
    """For each format that has a part of the checkpoint: who wrote it, what is there and what is missing."""
    findings = []
    for known in formats_in(folder):
        try:
            findings.append(_layout(known.name, known.contents(folder)))
        except CheckpointError as error:
            findings.append(Finding.from_error(error))
    return findings


def _layout(name: str, contents: Contents) -> Finding:
    by = contents.processes
    written = "" if by is None else f", written by {by} process{'es' * (by > 1)}"
    what = f"layout of {name}{written}: {'; '.join(contents.parts)}"
    if not contents.missing:
        return Finding("ok", what)
    return Finding("warn", f"{what}; not there: {'; '.join(contents.missing)}", "copy it if there is one")

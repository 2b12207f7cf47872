"""What a training goes on from is what it left: checkpoints are verified before they are used."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.manifest import MANIFEST, damage, has_manifest

_PARSING = (
    *(AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, SafetensorError),
)
"""What the parsers of damaged files raise."""

DAMAGED = "damaged-"
"""Put before the name of a checkpoint that is not gone on from."""


def trained_checkpoints(out: Path) -> list[Path]:
    """The checkpoints ``OUT/checkpoints/step-N``, by N."""
    found = [p for p in (out / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of ``step-N``."""
    return int(checkpoint.name.removeprefix("step-"))


def set_damaged_aside(out: Path, *, processes: int) -> None:
    """Leave the last sound checkpoint as the last one; later ones are damaged and get another name.

    A checkpoint is sound when its files have the digests of its manifest. One without a manifest (older, or
    made by something else) can only be asked for its files: they must be there and load.

    Args:
        out: run folder.
        processes: that train, each of which needs its random state.

    Raises:
        CheckpointError: there are checkpoints to go on from and none is sound, or the base is damaged.
    """
    base = out / "base"
    if base.is_dir() and has_manifest(base) and (fault := damage(base)):
        raise CheckpointError(
            f"{base}: {fault}, says {MANIFEST}; every checkpoint rests on it: restore it from a copy, delete "
            f"{base / MANIFEST} if the change was made on purpose, or train into another folder"
        )
    damaged: list[tuple[Path, str]] = []
    sound = None
    for checkpoint in reversed([c for c in trained_checkpoints(out) if step_of(c) > 0]):
        fault = damage(checkpoint) if has_manifest(checkpoint) else _unusable(checkpoint, processes)
        if not fault:
            sound = checkpoint
            break
        damaged.append((checkpoint, fault))
    if damaged and sound is None:
        found = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in damaged)
        raise CheckpointError(
            f"{out / 'checkpoints'}: no checkpoint is sound ({found}); restore one from a copy, or delete "
            f"{out / 'checkpoints'} to begin the reinforcement learning again"
        )
    for checkpoint, fault in damaged:
        aside = checkpoint.with_name(DAMAGED + checkpoint.name)
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint.rename(aside)
        assert sound is not None
        warnings.warn(
            f"{checkpoint}: {fault}; it is kept as {aside.name}, and the training goes on from {sound.name}",
            stacklevel=2,
        )
    if sound is not None:
        _say_what_is_not_known(sound, processes)


def _say_what_is_not_known(checkpoint: Path, processes: int) -> None:
    if not has_manifest(checkpoint):
        warnings.warn(
            f"{checkpoint}: has no {MANIFEST}, so that its files load but cannot be verified; changed "
            "weights or moments would not be noticed",
            stacklevel=3,
        )
    if missing := [name for name in _random_states(processes) if not (checkpoint / name).is_file()]:
        warnings.warn(
            f"{checkpoint}: was written by another number of processes than {processes} ({missing[0]} is not "
            "there): what is sampled from here on is not what the interrupted run would have sampled",
            stacklevel=3,
        )


def _random_states(processes: int) -> list[str]:
    return [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]


def _unusable(checkpoint: Path, processes: int) -> str:
    """Which file that a training goes on from is missing or does not load; empty where all do."""
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "model.safetensors or adapter_model.safetensors is missing"
    states = ["optimizer.pt", "scheduler.pt", *_random_states(processes)]
    for path in (*weights, *(checkpoint / name for name in states), checkpoint / "trainer_state.json"):
        if not path.is_file():
            return f"{path.name} is missing"
        try:
            _read(path)
        except _PARSING as error:
            return f"{path.name} cannot be read ({' '.join(str(error).split())[:80]})"
    return ""


def _read(path: Path) -> None:
    """Read a file the way the training will."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)

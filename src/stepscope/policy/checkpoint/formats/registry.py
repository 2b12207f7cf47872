"""Which format has what of a checkpoint: loading, checks and digests ask here."""

from __future__ import annotations

import re
from pathlib import Path

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.base import Format, Part
from stepscope.policy.checkpoint.formats.deepspeed import DeepSpeed
from stepscope.policy.checkpoint.formats.distributed.format import Distributed
from stepscope.policy.checkpoint.formats.fsdp import FilePerProcess, FullState
from stepscope.policy.checkpoint.formats.megatron import Megatron
from stepscope.policy.checkpoint.formats.plain import Plain
from stepscope.policy.checkpoint.formats.verl import Verl

_PLAIN = Plain()

FORMATS: list[Format] = [
    DeepSpeed(),
    FullState(),
    Verl(),
    Megatron(),
    Distributed(),
    _PLAIN,
    FilePerProcess(),
]
"""Known formats; each part of a checkpoint is read by the first that has it. One more is an entry here.

What a sharding library wrote goes before ``model.safetensors``, which may be a copy in a smaller type, or the
starting model that somebody put beside for its config.
"""

_RUNS = ("checkpoints/step[-_]*", "checkpoint-*", "global_step_*")


def format_of(folder: Path, part: Part) -> Format:
    """The format that reads a part of a checkpoint, or that says why nobody can."""
    has = [known for known in FORMATS if part in known.holds(folder)]
    return (has or [known for known in FORMATS if known.holds(folder)] or [_PLAIN])[0]


def format_of_state(folder: Path) -> Format:
    """The format that reads the optimizer's state, where it is the only one that has one.

    Raises:
        CheckpointError: several formats have a state, and nothing says which is the checkpoint's.
    """
    has = [known for known in FORMATS if "optimizer" in known.holds(folder)]
    if len(has) > 1:
        names = ", ".join(known.name for known in has)
        raise CheckpointError(
            f"{folder}: it has optimizer states of {len(has)} layouts ({names}), expected one, and nothing "
            "says which belongs to these weights; remove what another run or a conversion left there"
        )
    return format_of(folder, "optimizer")


def formats_in(folder: Path) -> list[Format]:
    """The formats that weights and optimizer's state are read from, those that refuse to be read included."""
    found = (format_of(folder, part) for part in ("weights", "optimizer"))
    return list(dict.fromkeys(known for known in found if {"weights", "optimizer"} & known.holds(folder)))


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoints of a run folder in the order of the steps that their names end with."""
    found = {p for pattern in _RUNS for p in run.glob(pattern) if p.is_dir()}
    return sorted(found, key=lambda p: (step_in_name(p) or 0, p.name))


def step_in_name(folder: Path) -> int | None:
    """The number at the end of a folder's name."""
    number = re.search(r"\d{1,18}$", folder.name, re.ASCII)
    return int(number[0]) if number else None


def checkpoint_folder(path: Path) -> Path:
    """The folder itself where some format knows it, or an error that says what is there instead.

    Raises:
        CheckpointError: no checkpoint, or a run with several.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; check the path")
    if _PLAIN.holds(path):
        return path
    inside = checkpoints_in(path)
    if inside:
        latest = inside[-1]
        raise CheckpointError(
            f"{path}: a run with {len(inside)} checkpoints, expected one checkpoint; point at one, such "
            f"as {latest}"
        )
    if not any(known.holds(path) for known in FORMATS):
        raise CheckpointError(
            f"{path}: neither config.json nor adapter_config.json is there, so it is no checkpoint of a "
            "model; point at a folder saved by the Hugging Face Trainer or TRL"
        )
    return path


def files_of(folder: Path, *, tensors_only: bool = False) -> tuple[str, ...]:
    """Patterns of the files that make a checkpoint what it is, of all formats that have a part of it."""
    found = [known for known in FORMATS if known.holds(folder)]
    return tuple(p for known in found for p in (known.tensors + (() if tensors_only else known.configs)))

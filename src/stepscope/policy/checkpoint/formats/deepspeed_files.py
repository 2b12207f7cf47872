"""The files of a DeepSpeed checkpoint: which there are, and what is in them, without running any of it.

``engine.save_checkpoint`` writes a folder per step, named in ``latest`` beside it (DeepSpeed 0.19.8,
``runtime/engine.py``). In it, with R the rank and W the number of data-parallel processes,

    mp_rank_00_model_states.pt                               weights in the training's type, ZeRO 0, 1, 2
    zero_pp_rank_R_mp_rank_00_model_states.pt                the same in ZeRO 3: names and frozen parts
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt         masters in fp32 and moments, ZeRO 1, 2, 3
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError, printable, shown
from stepscope.policy.checkpoint.pickles import Stubs, read_tensors

LATEST = "latest"
"""The file that names the folder of the last step."""

STATES = "*_states.pt"
"""Pattern of all files of a step."""

_OPTIMIZER = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")
_EXPERTS = re.compile(r"(?:layer_\d+_)?exp(?:ert|p_rank)_\d+_.*_states\.pt")
_STAGES = ("disabled", "optimizer_states", "gradients", "weights")


class _Stage(int):
    """Stands for ``ZeroStageEnum``, pickled by its value or, by some versions of Python, its name."""


class _Scaler:
    """Stands for the scaler of a loss in float16, of which nothing is used."""


class _Slice:
    """Stands for ``fragment_address``: where a parameter's part is in a flat tensor."""

    numel: int
    start: int


def _member(_: object, name: object) -> int:
    return _STAGES.index(str(name))


_STUBS: Stubs = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Scaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Scaler,
    "deepspeed.utils.tensor_fragment.fragment_address": _Slice,
    "builtins.getattr": _member,
}


@dataclass(frozen=True)
class Files:
    """The files of one step.

    Attributes:
        folder: where they are.
        model: ``*_model_states.pt`` by rank; that of rank 0 alone but for ZeRO 3.
        optimizer: ``*_optim_states.pt`` by rank; none where the optimizer's state is among the model's.
    """

    folder: Path
    model: Mapping[int, Path]
    optimizer: Mapping[int, Path]

    def read(self, which: Mapping[int, Path], world: int) -> list[Mapping[str, Any]]:
        """What the files of ranks 0 to ``world`` - 1 hold, mapped into memory.

        Raises:
            CheckpointError: one is missing, damaged, or holds what DeepSpeed does not put there.
        """
        if missing := [rank for rank in range(world) if rank not in which]:
            last = next(iter(which.values())).name if which else "*_states.pt"
            raise CheckpointError(
                f"{self.folder}: the file of rank {', '.join(map(str, missing[:8]))} is missing, expected "
                f"one of each of {world} processes, such as {last}; copy it from the machine of that process"
            )
        if over := [which[rank].name for rank in sorted(which) if rank >= world]:
            raise CheckpointError(
                f"{self.folder}: {over[0]} is not of this checkpoint, which {world} processes wrote; remove "
                "what another one left there"
            )
        return [read_states(which[rank]) for rank in range(world)]


def read_states(path: Path) -> Mapping[str, Any]:
    """What one file holds, its tensors left in it until they are used.

    Raises:
        CheckpointError: it is damaged, or holds what DeepSpeed does not put there.
    """
    found = read_tensors(path, stubs=_STUBS, lazily=True)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: got {type(found).__name__}, expected a mapping; copy the file again")
    return found


def step_folder(folder: Path) -> Path | None:
    """The folder with the files of the last step; None where this is no checkpoint of DeepSpeed."""
    tag = _named(folder)
    if tag and Path(tag).name == tag and any((folder / tag).glob(STATES)):
        return folder / tag
    inside = [inner for inner in sorted(folder.glob("global_step*")) if any(inner.glob(STATES))]
    if len(inside) > 1:
        return max(inside, key=lambda inner: (len(inner.name), inner.name))
    return inside[0] if inside else folder if any(folder.glob(STATES)) else None


def _named(folder: Path) -> str:
    """The folder that ``latest`` names; empty where there is no such file, or no name in it."""
    file = folder / LATEST
    if not file.is_file() or file.stat().st_size >= 1000:
        return ""
    return file.read_text(encoding="utf-8", errors="replace").strip()


def files_in(folder: Path) -> Files:
    """The files of a checkpoint that has some.

    Raises:
        CheckpointError: the model was spread over more than data-parallel processes, it is open which step
            is meant, or that step is not there.
    """
    inner = step_folder(folder)
    assert inner is not None
    tag = _named(folder)
    if tag and inner.name != tag:
        raise CheckpointError(
            f"{folder / LATEST}: it names {shown(tag)}, of which no files are there; copy that folder, or "
            f"write the name of the one that is meant into the file, such as {inner.name}"
        )
    others = [p.name for p in sorted(folder.glob("global_step*")) if any(p.glob(STATES))]
    if not tag and inner != folder and len(others) > 1:
        raise CheckpointError(
            f"{folder}: it holds {', '.join(others[:6])} and no file {LATEST!r} that says which; write the "
            f"name of one into {folder / LATEST}"
        )
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    for file in sorted(inner.glob("*.pt")):
        for pattern, found in ((_MODEL, model), (_OPTIMIZER, optimizer)):
            if match := pattern.fullmatch(file.name):
                _refuse_parallel(file, int(match[2]))
                rank = int(match[1] or 0)
                if rank in found:
                    raise CheckpointError(
                        f"{inner}: {found[rank].name} and {file.name} are of one rank; remove what another "
                        "training left there"
                    )
                found[rank] = file
        if _EXPERTS.fullmatch(file.name):
            raise CheckpointError(
                f"{file}: experts were spread over processes (expert parallelism), which is not read; "
                "train without it (ep_size 1)"
            )
        if file.name.startswith("layer_"):
            raise CheckpointError(
                f"{file}: the layers were spread over processes (pipeline parallelism), which is not read; "
                "train with ZeRO instead"
            )
    return Files(inner, model, optimizer)


def _refuse_parallel(file: Path, model_rank: int) -> None:
    if model_rank:
        raise CheckpointError(
            f"{printable(str(file))}: weights were split over processes (tensor parallelism), which is not "
            "read; train with data parallelism and ZeRO, or convert with deepspeed's ds_to_universal.py, "
            "which keeps the moments, and save them under names"
        )


def sequence(value: object, what: str, where: Path) -> Sequence[Any]:
    """A list of a file.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, list | tuple):
        raise CheckpointError(
            f"{where}: {what} is {type(value).__name__}, expected a list as DeepSpeed writes it; copy the "
            "file again"
        )
    return value


def mapping(value: object, what: str, where: Path) -> Mapping[Any, Any]:
    """A mapping of a file.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where}: {what} is {type(value).__name__}, expected a mapping as DeepSpeed writes it; copy the "
            "file again"
        )
    return value

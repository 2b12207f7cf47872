"""FSDP's full state, as accelerate and Hugging Face's Trainer write it: whole tensors, everything by name.

Written by ``save_fsdp_model`` and ``save_fsdp_optimizer`` of ``accelerate.utils.fsdp_utils`` (1.15) with
``FULL_STATE_DICT``, of FSDP 1 and 2. Where the Trainer wrote the folder, the same weights stand in
``model.safetensors``; of an adapter under FSDP 1 they stand in its own file alone. Without FSDP,
``Accelerator.save_state`` gives the optimizer's file the same name, with running numbers in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.formats.base import PARTS, Contents, Format, Matching, Part
from stepscope.policy.checkpoint.formats.frame import (
    Framed,
    beside,
    weights_in_frame,
    writers,
)
from stepscope.policy.checkpoint.optimizer_state import (
    match_optimizer,
    read_optimizer,
    state_by_name,
)
from stepscope.policy.checkpoint.pickles import read_tensors
from stepscope.policy.checkpoint.tensors import trained_types, types_of
from stepscope.policy.optim.base import OptimizerState

WEIGHTS = "pytorch_model_fsdp.bin"
STATE = "optimizer.bin"


_EMPTY = 4096
"""Bytes of a file that may have no tensors."""

_RANKS = re.compile(r"(?:optimizer|pytorch_model_fsdp)_\d+_rank(\d{1,6})\.bin")


class FullState(Framed):
    """Weights and moments in a file each, gathered by the first process."""

    name = "FSDP (full state)"
    tensors = (WEIGHTS, STATE)
    configs = ()

    def holds(self, folder: Path) -> frozenset[Part]:
        """What files there are; settings beside either. Of no tensors at all, it has no weights."""
        found: set[Part] = set()
        if _has_weights(folder):
            found |= {"weights", "settings"}
        if (folder / STATE).is_file():
            found |= {"optimizer", "settings"}
        return frozenset(found)

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        """The model of the config beside the weights, or the adapter on its base."""
        return weights_in_frame(folder, _weights(folder), dtype=dtype, device=device)

    def optimizer(self, folder: Path) -> Matching:
        """The state in ``optimizer.bin``, whose parameters are names, or numbers if FSDP did not write it."""
        file = folder / STATE
        saved = read_optimizer(file, lazily=True)
        found = match_optimizer if _numbered(saved) else state_by_name

        def match(model: nn.Module, dtype: torch.dtype | None) -> OptimizerState:
            return found(saved, model, where=str(file), dtype=dtype)

        return match

    def contents(self, folder: Path) -> Contents:
        """Its two files and what is beside them."""
        parts, missing = beside(folder)
        if (folder / WEIGHTS).is_file():
            kinds = "/".join(types_of(_tensors(folder).values())) or "empty"
            parts.insert(0, f"weights: {WEIGHTS} ({kinds})")
        if (folder / STATE).is_file():
            parts.append(f"optimizer state: {STATE}")
        return Contents(tuple(parts), writers(folder), tuple(missing))

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Of the weights, which are mapped and not read."""
        return trained_types(_weights(folder))


class FilePerProcess(Format):
    """What accelerate writes with ``use_dcp=False``: each process its own shards, which say not of what."""

    name = "FSDP (a file per process)"

    def holds(self, folder: Path) -> frozenset[Part]:
        """All of a checkpoint, so that whatever is asked for is refused."""
        return frozenset(PARTS if self._ranks(folder) else ())

    def contents(self, folder: Path) -> Contents:
        """Nothing that can be read.

        Raises:
            CheckpointError: always.
        """
        raise self.lacking(folder, "content")

    def lacking(self, folder: Path, what: str) -> CheckpointError:
        """What was found and what to do, in one sentence."""
        return CheckpointError(
            f"{folder}: a checkpoint of {self.name} of {len(self._ranks(folder))} processes, which is not "
            "read; resume it with accelerate and save it with use_dcp=True, or with FULL_STATE_DICT"
        )

    def _ranks(self, folder: Path) -> set[str]:
        return {found[1] for file in folder.glob("*_rank*.bin") if (found := _RANKS.fullmatch(file.name))}


def _numbered(saved: Mapping[str, Any]) -> bool:
    """Whether a state has running numbers for its parameters, as torch's ``state_dict()`` does."""
    groups = saved["param_groups"]
    if not isinstance(groups, list):
        return False
    owned = [group.get("params") for group in groups if isinstance(group, Mapping)]
    return any(type(n) is int for params in owned if isinstance(params, list) for n in params)


def _has_weights(folder: Path) -> bool:
    """Whether there are tensors, or something that reading has to say."""
    file = folder / WEIGHTS
    if not file.is_file() or file.stat().st_size > _EMPTY:
        return file.is_file()
    try:
        return bool(_tensors(folder))
    except CheckpointError:
        return True


def _weights(folder: Path) -> dict[str, Tensor]:
    found = _tensors(folder)
    if not found:
        raise CheckpointError(
            f"{folder / WEIGHTS}: it is empty, as accelerate leaves it of an adapter under FSDP 1; copy the "
            "adapter's adapter_model.safetensors there"
        )
    return found


@reads_foreign
def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    found = read_tensors(path, lazily=True)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path}: it holds no weights by name; copy the file again")
    return {str(name): tensor for name, tensor in found.items()}

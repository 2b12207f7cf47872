"""Checkpoints in shards: accelerate's sharded state, prime-rl's, NeMo-RL's, and others of torch's own format.

Where a trainer puts its shards does not matter: all folders with ``.metadata`` up to two levels down are
looked through for an optimizer's state and for weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.formats.base import Contents, Matching, Part
from stepscope.policy.checkpoint.formats.distributed.metadata import METADATA, read_directory
from stepscope.policy.checkpoint.formats.distributed.state import Sorted, optimizer_dict, sort_items
from stepscope.policy.checkpoint.formats.distributed.tensors import ChunkedTensor
from stepscope.policy.checkpoint.formats.distributed.weights import weights_among
from stepscope.policy.checkpoint.formats.frame import (
    Framed,
    beside,
    weights_in_frame,
)
from stepscope.policy.checkpoint.optimizer_state import state_by_name
from stepscope.policy.checkpoint.tensors import trained_types, types_of
from stepscope.policy.optim.base import OptimizerState

_CHECKPOINT = re.compile(r"(checkpoint-|step[-_]|global_step_?|iter_)\d+")
"""A folder of a run that is a checkpoint of its own."""

_SHARD = re.compile(r"__(\d{1,6})_\d{1,6}\.distcp")


class Distributed(Framed):
    """Tensors in chunks, read one by one and put together by their offsets."""

    name = "torch.distributed.checkpoint (sharded state)"
    tensors = tuple(f"{inside}*.distcp" for inside in ("", "*/", "*/*/"))
    configs = tuple(f"{inside}{METADATA}" for inside in ("", "*/", "*/*/"))

    def holds(self, folder: Path) -> frozenset[Part]:
        """What the directories of shards name; everything where one cannot be read, so that it is said."""
        found: set[Part] = set()
        for inner in shard_folders(folder):
            found.add("settings")
            try:
                items = _items(inner)
            except CheckpointError:
                return frozenset({"weights", "optimizer", "settings"})
            found |= {"optimizer"} if items.states else set()
            found |= {"weights"} if items.others else set()
        return frozenset(found)

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        """The model of the config beside the shards, or the adapter on its base."""
        return weights_in_frame(folder, self._weights(folder), dtype=dtype, device=device)

    def optimizer(self, folder: Path) -> Matching:
        """The state, read when there is a model whose parameters it is of."""
        (inner,) = self._with(folder, "optimizer")

        def match(model: nn.Module, dtype: torch.dtype | None) -> OptimizerState:
            saved = optimizer_dict(_items(inner), where=str(inner))
            return state_by_name(saved, model, where=str(inner), dtype=dtype)

        return match

    def contents(self, folder: Path) -> Contents:
        """Folders of shards, who wrote them, and what is beside."""
        parts, missing = beside(folder)
        for inner in shard_folders(folder):
            items, place = _items(inner), inner.relative_to(folder).as_posix()
            if items.others:
                kinds = "/".join(types_of(items.others.values()))
                parts.append(f"weights: {len(items.others)} tensors in {place} ({kinds})")
            if items.states:
                roots = ", ".join(items.states)
                parts.append(f"optimizer state: {roots or 'state'} in {place}")
        files = [f for inner in shard_folders(folder) for f in read_directory(inner).files]
        missing += [f"{f.relative_to(folder)} (a process's part)" for f in sorted(files) if not f.is_file()]
        ranks = {int(found[1]) for f in files if (found := _SHARD.fullmatch(f.name))}
        return Contents(tuple(parts), max(ranks) + 1 if ranks else None, tuple(missing))

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Of the weights, by the directory."""
        return trained_types(self._weights(folder))

    def _weights(self, folder: Path) -> dict[str, ChunkedTensor]:
        (inner,) = self._with(folder, "weights")
        return weights_among(folder, _items(inner).others)

    def _with(self, folder: Path, part: Part) -> list[Path]:
        """The one folder of shards that has a part."""
        has = [
            inner
            for inner in shard_folders(folder)
            if (_items(inner).states if part == "optimizer" else _items(inner).others)
        ]
        if not has:
            what = (
                "weights, as those of an adapter under FSDP 1" if part == "weights" else "optimizer's state"
            )
            raise CheckpointError(
                f"{folder}: none of its folders with {METADATA} has the {what}; save the run with "
                "FULL_STATE_DICT, or copy what is missing"
            )
        if len(has) > 1:
            raise CheckpointError(
                f"{folder}: {len(has)} of its folders with {METADATA} have {part}, expected one; point at a "
                "checkpoint of one model"
            )
        return has


def shard_folders(folder: Path) -> list[Path]:
    """The folders with a directory of shards, but for those that Megatron wrote."""
    return [inner for inner in _candidates(folder) if not (inner / "common.pt").is_file()]


def _candidates(folder: Path) -> Iterator[Path]:
    for pattern in ("", "*/", "*/*/"):
        for inner in sorted(path.parent for path in folder.glob(f"{pattern}{METADATA}")):
            if not any(map(_CHECKPOINT.fullmatch, inner.relative_to(folder).parts)):
                yield inner


@reads_foreign
def _items(folder: Path) -> Sorted:
    return sort_items(read_directory(folder))

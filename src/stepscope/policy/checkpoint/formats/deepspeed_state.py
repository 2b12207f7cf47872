"""Weights and optimizer state of a DeepSpeed checkpoint under the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.deepspeed_files import (
    Files,
    files_in,
    mapping,
    read_states,
    sequence,
)
from stepscope.policy.checkpoint.formats.deepspeed_places import (
    Joined,
    Master,
    Place,
    places_by_partition,
    places_by_slices,
    split_evenly,
)
from stepscope.policy.checkpoint.tensors import Stored
from stepscope.policy.numerics.finiteness import real_number, whole_number


@dataclass(frozen=True)
class Shards:
    """What the processes of a training wrote.

    Attributes:
        where: the folder of the step.
        models: of the model's files, in rank order.
        optimizers: ``optimizer_state_dict`` of the optimizer's files, in rank order; none in stage 0.
        config: DeepSpeed's configuration as the training gave it.
    """

    where: Path
    models: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """Read a checkpoint, its tensors left in their files.

        Raises:
            CheckpointError: a file is missing, damaged, or of a layout that is not read.
        """
        files = files_in(folder)
        if not files.optimizer:
            models = files.read(files.model, 1)
            return cls(files.folder, models, (), _config(models[0]))
        first = files.optimizer[min(files.optimizer)]
        states = read_states(first)
        own = mapping(states.get("optimizer_state_dict"), "optimizer_state_dict", first)
        world = _world(own, files)
        optimizers = [
            mapping(state.get("optimizer_state_dict"), "optimizer_state_dict", files.folder)
            for state in files.read(files.optimizer, world)
        ]
        models = files.read(files.model, world if "fp32_flat_groups" in own else 1)
        if (split := models[0].get("mp_world_size")) not in (None, 1):
            raise CheckpointError(
                f"{files.folder}: weights were split over {split} processes (tensor parallelism), which is "
                "not read; train with data parallelism and ZeRO"
            )
        return cls(files.folder, models, optimizers, _config(states))

    @property
    def stage(self) -> int:
        """Of ZeRO; that of a training in bfloat16 without ZeRO, whose state is split as in stage 1, is 1."""
        if not self.optimizers:
            return 0
        return whole_number(int(self.optimizers[0].get("zero_stage", 1)), "zero_stage", str(self.where))

    @property
    def processes(self) -> int:
        """Number of data-parallel processes."""
        if self.optimizers:
            return len(self.optimizers)
        return whole_number(self.models[0].get("dp_world_size", 1), "dp_world_size", str(self.where))

    @property
    def clip(self) -> float | None:
        """``max_grad_norm`` of the training, 0 for none; None where the files do not say.

        DeepSpeed multiplies the gradient by min(1, clip / (norm + 1e-6)), as torch's ``clip_grad_norm_``.
        """
        kept = self.optimizers[0].get("clip_grad") if self.optimizers else None
        given = self.config.get("gradient_clipping", 0.0) if kept is None else kept
        return None if isinstance(given, str) else real_number(given, "gradient_clipping", str(self.where))

    @property
    def steps(self) -> int | None:
        """Optimizer steps taken; None where the files do not say."""
        taken, skipped = self.models[0].get("global_steps"), self.models[0].get("skipped_steps", 0)
        if taken is None:
            return None
        where = str(self.where)
        return whole_number(taken, "global_steps", where) - whole_number(skipped, "skipped_steps", where)

    @property
    def types(self) -> set[torch.dtype]:
        """Of the weights that train."""
        if self.optimizers:
            return {tensor.dtype for tensor in self._masters(0)}
        return {t.dtype for t in self._module.values() if t.dtype.is_floating_point}

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Of all trained parameters, in the optimizer's order.

        Raises:
            CheckpointError: the files do not say where a parameter is.
        """
        groups = sequence(self.models[0].get("param_shapes"), "param_shapes", self.where)
        ranks = range(len(self.optimizers))
        lengths = [[len(flat) for flat in self._masters(rank)] for rank in ranks]
        if any(len(own) != len(groups) for own in lengths):
            raise CheckpointError(
                f"{self.where}: {len(groups)} groups of parameters, and a rank has other flat tensors "
                f"({', '.join(str(len(own)) for own in lengths)}); copy the checkpoint again"
            )
        if self.stage == 3:
            return tuple(places_by_partition(groups, lengths, self.where))
        slices = [
            sequence(own.get("param_slice_mappings"), "param_slice_mappings", self.where)
            for own in self.optimizers
        ]
        return tuple(places_by_slices(groups, slices, self.where))

    def weights(self) -> dict[str, Stored]:
        """The model's tensors by name: what trains from the masters, all else as the training had it.

        Raises:
            CheckpointError: the files do not say where a parameter is.
        """
        module = self._module
        if not self.optimizers:
            return dict(module)
        found: dict[str, Stored] = {name: t for name, t in module.items() if t.numel()}
        found |= self._frozen()
        masters = [self._masters(rank) for rank in range(len(self.optimizers))]
        for place in self.places:
            flats, copy = [own[place.group] for own in masters], module.get(place.name)
            if copy is not None and copy.numel() and copy.dtype.is_floating_point:
                found[place.name] = Master(place, flats, copy, self.where)
            else:
                found[place.name] = Joined(place, flats)
        shared = self.models[0].get("shared_params") or {}
        for alias, name in mapping(shared, "shared_params", self.where).items():
            if name in found:
                found[str(alias)] = found[name]
        return found

    def optimizer(self) -> dict[str, Any]:
        """``state_dict()`` of the optimizer with names for numbers; running numbers in stage 0.

        Raises:
            CheckpointError: the state is missing, incomplete, or that of an optimizer whose state is no
                number per weight.
        """
        _refuse_coupled(self.config, self.where)
        if not self.optimizers:
            return self._unsplit()
        states = [self._base(rank) for rank in range(len(self.optimizers))]
        groups = sequence(states[0].get("param_groups"), "param_groups", self.where)
        if any(repr(state.get("param_groups")) != repr(groups) for state in states):
            raise CheckpointError(
                f"{self.where}: the parameter groups of the ranks have other settings each; the files are of "
                "different steps or trainings, copy the checkpoint again"
            )
        numbers = [n for group in groups for n in group["params"]]
        if numbers != list(range(len(self._masters(0)))):
            raise CheckpointError(
                f"{self.where}: the optimizer's groups hold tensors {numbers[:8]}, expected "
                f"0 to {len(self._masters(0)) - 1}; copy the checkpoint again"
            )
        by_group: dict[int, list[Place]] = {}
        for place in self.places:
            by_group.setdefault(place.group, []).append(place)
        named: dict[str, dict[str, Any]] = {}
        for group in groups:
            for number in group["params"]:
                entries = [mapping(state["state"], "state", self.where).get(number) for state in states]
                if all(entry is None for entry in entries):
                    continue
                for place in by_group.get(number, []):
                    named[place.name] = self._entry(place, entries, group)
        return {
            "state": named,
            "param_groups": [
                {**group, "params": [p.name for n in group["params"] for p in by_group.get(n, [])]}
                for group in groups
            ],
        }

    def _entry(
        self, place: Place, entries: Sequence[Mapping[str, Any] | None], group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A parameter's own part of the flat entries of its group, one per rank."""
        own = [mapping(entry, f"state of group {place.group}", self.where) for entry in entries]
        found: dict[str, Any] = {}
        for key, value in own[0].items():
            flat = isinstance(value, Tensor) and value.dim() > 0
            if flat and value.shape != (self._length(0, place.group, value),):
                raise CheckpointError(
                    f"{self.where}: {key} of a flat group has shape {tuple(value.shape)}, expected one "
                    "number per weight; the state of such an optimizer cannot be taken apart: train with "
                    "AdamW"
                )
            if flat:
                found[key] = place.join([entry[key] for entry in own])
            elif any(other.get(key) != value for other in own[1:]):
                raise CheckpointError(
                    f"{self.where}: {key} is {value} on rank 0 and another on a later one; the files are of "
                    "different steps, copy the checkpoint again"
                )
            else:
                found[key] = value
        if "step" not in found and "step" in group:  # FusedAdam before 2024 counted in the group
            found["step"] = group["step"]
        return found

    def _length(self, rank: int, group: int, value: Tensor) -> int:
        """What a moment may have: the length of the masters, and in stages 1 and 2 padding after them."""
        own = len(self._masters(rank)[group])
        return own if self.stage == 3 else max(own, len(value))

    @property
    def _module(self) -> Mapping[str, Tensor]:
        module = mapping(self.models[0].get("module"), "module", self.where)
        return {str(name): value for name, value in module.items() if isinstance(value, Tensor)}

    def _frozen(self) -> dict[str, Stored]:
        """Frozen weights, which stage 3 keeps in parts like all others."""
        shapes = self.models[0].get("frozen_param_shapes")
        if self.stage != 3 or not shapes:
            return {}
        key = "frozen_param_fragments"
        parts = [mapping(model.get(key), key, self.where) for model in self.models]
        return {
            str(name): Joined(
                split_evenly(str(name), shape, len(parts)), [own[name].reshape(-1) for own in parts]
            )
            for name, shape in mapping(shapes, "frozen_param_shapes", self.where).items()
        }

    def _masters(self, rank: int) -> Sequence[Tensor]:
        own = self.optimizers[rank]
        key = "fp32_flat_groups" if "fp32_flat_groups" in own else "single_partition_of_fp32_groups"
        found = sequence(own.get(key), key, self.where)
        if not all(isinstance(flat, Tensor) and flat.dim() == 1 for flat in found):
            raise CheckpointError(f"{self.where}: {key} holds no flat tensors; copy the checkpoint again")
        return found

    def _base(self, rank: int) -> Mapping[str, Any]:
        own = self.optimizers[rank]
        found = own.get("optimizer_state_dict", own.get("base_optimizer_state"))
        if isinstance(found, list):
            raise CheckpointError(
                f"{self.where}: an elastic checkpoint, which lacks the optimizer's groups (learning rate, "
                "decay, betas); save it with elastic_checkpoint false"
            )
        return mapping(found, "the optimizer's state", self.where)

    def _unsplit(self) -> dict[str, Any]:
        kept = self.models[0].get("optimizer")
        if not isinstance(kept, Mapping):
            raise CheckpointError(
                f"{self.where}: no optimizer state, and a step cannot be rebuilt without it; save the "
                "checkpoint with engine.save_checkpoint"
            )
        if "fp32_groups" in kept or "fp32_groups_flat" in kept:
            raise CheckpointError(
                f"{self.where}: trained in a half type without ZeRO, whose masters have no names; train with "
                "ZeRO stage 1 or higher, which costs nothing"
            )
        return dict(kept)


def _world(own: Mapping[str, Any], files: Files) -> int:
    """Number of data-parallel processes, by what one of them wrote."""
    count = own.get("partition_count")
    counts = set(count) if isinstance(count, list | tuple) else {count}
    if "ds_zero_partition_groups" in own or len(counts) != 1:
        raise CheckpointError(
            f"{files.folder}: groups of parameters are split over {sorted(map(str, counts))} processes, so "
            "experts were spread (expert parallelism), which is not read; train without it"
        )
    return whole_number(counts.pop(), "partition_count", str(files.folder))


def _config(states: Mapping[str, Any]) -> Mapping[str, Any]:
    found = states.get("ds_config")
    return found if isinstance(found, Mapping) else {}


def _refuse_coupled(config: Mapping[str, Any], where: Path) -> None:
    """Refuse Adam with decay inside the gradient; FusedAdam and CPUAdam keep that to themselves."""
    chosen = config.get("optimizer")
    if not isinstance(chosen, Mapping) or str(chosen.get("type")).lower() != "adam":
        return
    given = chosen.get("params")
    if isinstance(given, Mapping) and not given.get("adam_w_mode", True) and given.get("weight_decay"):
        raise CheckpointError(
            f"{where}: Adam with weight decay {given['weight_decay']} inside the gradient (adam_w_mode "
            "false), expected AdamW (decoupled decay); only AdamW can be measured"
        )

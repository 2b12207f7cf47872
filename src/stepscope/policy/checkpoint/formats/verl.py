"""verl's FSDP engine: ``global_step_N/actor`` with a file for each process.

Read after ``FSDPCheckpointManager.save_checkpoint`` of verl 0.9.1: weights under the model's names, in pieces
(``DTensor``), at the type in which they are trained; the optimizer's state under running numbers over
``module.parameters()``, frozen ones too, in one of three layouts (``verl_moments.py``); configuration and
tokenizer under ``huggingface/``, whose weights, where there are any, are of a lesser type and not read. verl
steps its schedule before it saves, so the learning rate in the groups is the next step's. It leaves no
settings of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from stepscope.errors import CheckpointError, shown
from stepscope.policy.checkpoint.adapters import adapter_on
from stepscope.policy.checkpoint.formats.base import Contents, Format, Matching, Part
from stepscope.policy.checkpoint.formats.verl_moments import state_of_ranks
from stepscope.policy.checkpoint.formats.verl_shards import Joined, grid_of, joined, processes, read_ranks
from stepscope.policy.checkpoint.models import (
    brief,
    load_tokenizer,
    load_weights,
    model_of_tensors,
    placed,
    quiet,
)
from stepscope.policy.checkpoint.names import ADAPTED
from stepscope.policy.checkpoint.settings.run_settings import run_settings
from stepscope.policy.checkpoint.tensors import types_of
from stepscope.policy.loss.settings import SETTINGS_FILE, StepSettings
from stepscope.policy.numerics.finiteness import refuse_broken_weights
from stepscope.policy.optim.base import OptimizerState

_FILES = ("model_world_size_*_rank_*.pt", "optim_world_size_*_rank_*.pt")
_CONFIGS = ("fsdp_config.json", "lora_train_meta.json", "huggingface/config.json")


class Verl(Format):
    """Full models and LoRA adapters, FSDP1 and FSDP2, of any number of processes."""

    name = "verl (FSDP)"
    tensors = (*_FILES, *(f"actor/{file}" for file in _FILES))
    configs = (*_CONFIGS, *(f"actor/{file}" for file in _CONFIGS))

    def holds(self, folder: Path) -> frozenset[Part]:
        """Weights and settings where a process has left its weights, a state where one has left its own."""
        inner = _inner(folder)
        if not any(inner.glob(_FILES[0])):
            return frozenset()
        weights: frozenset[Part] = frozenset({"weights", "settings"})
        return weights | {"optimizer"} if any(inner.glob(_FILES[1])) else weights

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        """The model of all processes, or the adapter on its base."""
        inner = _inner(folder)
        tensors, described = _weights(inner), inner / "huggingface"
        if not (described / "config.json").is_file():
            raise CheckpointError(
                f"{described / 'config.json'}: not there, and it says what model this is; copy the folder "
                "huggingface of the first process"
            )
        if not _is_adapted(tensors):
            return model_of_tensors(described, tensors, dtype=dtype, device=device)
        early = torch.float32 if dtype == torch.float64 else dtype
        base: Any = _base(described, tensors, early)
        with quiet():
            adapted = adapter_on(base, _lora(inner, tensors), tensors, where=str(inner))
        refuse_broken_weights(adapted, str(inner))
        return placed(adapted, dtype, device), load_tokenizer(described)

    def optimizer(self, folder: Path) -> Matching:
        """The state of all processes, whose numbers are matched to names once there is a model."""
        inner = _inner(folder)
        ranks, kept = read_ranks(inner, "optim"), read_ranks(inner, "model")
        if len(ranks) != len(kept):
            raise CheckpointError(
                f"{inner}: weights of {len(kept)} processes and moments of {len(ranks)}; copy the checkpoint "
                "again"
            )
        grid, names = grid_of(kept, str(inner)), [str(name) for name in kept[0]]

        def match(model: nn.Module, dtype: torch.dtype | None) -> OptimizerState:
            return state_of_ranks(ranks, grid, names, model, where=str(inner), dtype=dtype)

        return match

    def settings(self, folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
        """Those of ``stepscope.json`` where somebody has put one there, and the user's."""
        inner = _inner(folder)
        said = next((place for place in (folder, inner) if (place / SETTINGS_FILE).is_file()), inner)
        return run_settings(said, overrides, for_step=for_step)

    def contents(self, folder: Path) -> Contents:
        """Version of FSDP, types, and what of the checkpoint was not saved."""
        inner = _inner(folder)
        world, told = processes(inner, "model"), _read(inner / "fsdp_config.json")
        if told.get("world_size", world) != world:
            raise CheckpointError(
                f"{inner / 'fsdp_config.json'}: world_size is {shown(told['world_size'])}, and there are "
                f"files of {world} processes; copy the checkpoint again"
            )
        version = f"FSDP{told['FSDP_version']}" if told.get("FSDP_version") in (1, 2) else "FSDP"
        weights = _weights(inner)
        kind = "a LoRA adapter" if _is_adapted(weights) else "a model"
        types = "/".join(types_of(weights.values()))
        parts = [f"weights: model_world_size_{world}_rank_*.pt ({version}, {kind}, {types})"]
        if not any(inner.glob(_FILES[1])):
            return Contents(tuple(parts), world, (f"no {_FILES[1]}: no step can be rebuilt",))
        parts.append(f"optimizer state: optim_world_size_{world}_rank_*.pt")
        return Contents(tuple(parts), world)

    def stored_types(self, folder: Path) -> tuple[str, ...]:
        """Of what is trained: of an adapter its own weights."""
        tensors = _weights(_inner(folder))
        trained = {n: t for n, t in tensors.items() if "lora_" in n} or tensors
        return types_of(trained.values())


def _inner(folder: Path) -> Path:
    """Where the policy's files are: in the folder, or in its ``actor``."""
    return folder if any(folder.glob(_FILES[0])) or not (folder / "actor").is_dir() else folder / "actor"


def _weights(inner: Path) -> dict[str, Joined]:
    ranks = read_ranks(inner, "model")
    if any(list(rank) != list(ranks[0]) for rank in ranks):
        raise CheckpointError(
            f"{inner}: the processes have saved other weights each; copy the checkpoint again"
        )
    grid = grid_of(ranks, str(inner))
    return {str(name): joined([rank[name] for rank in ranks], grid, f"{inner}: {name}") for name in ranks[0]}


def _is_adapted(tensors: Mapping[str, Any]) -> bool:
    return any(".lora_" in name for name in tensors)


def _base(described: Path, tensors: Mapping[str, Joined], dtype: torch.dtype) -> nn.Module:
    """The model under an adapter: from the same files, or its own where they hold the adapter alone."""
    own = {
        name.removeprefix(ADAPTED).replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }
    if own:
        return load_weights(described, dtype=dtype, device="cpu", tensors=own)
    base = _read(described / "config.json").get("_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{described / 'config.json'}: the run has saved the adapter alone (checkpoint.save_lora_only), "
            "and nothing says what model it is on; write the model's name or folder there as _name_or_path"
        )
    return load_weights(base, dtype=dtype, device="cpu")


def _lora(inner: Path, tensors: Mapping[str, Joined]) -> LoraConfig:
    """The adapter as ``_build_lora_module`` of verl configures it, on the modules that have weights of it."""
    told = _read(inner / "lora_train_meta.json")
    numbers = {key: told.get(key) for key in ("r", "lora_alpha")}
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{inner / 'lora_train_meta.json'}: {key} is {shown(value)}, expected a positive whole "
                "number, which the adapter is scaled by; write it in as the run had it"
            )
    modules = {name.removeprefix(ADAPTED).partition(".lora_")[0] for name in tensors if ".lora_" in name}
    return LoraConfig(
        task_type="CAUSAL_LM",
        bias="none",
        target_modules=sorted(modules),
        base_model_name_or_path="",
        **numbers,
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, expected an object; copy it again")
    return content
